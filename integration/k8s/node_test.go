package k8s

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
)

// deviceSpace is the namespace of the device plugin, for all tests of a run.
var deviceSpace = fmt.Sprintf("oncefs-device-%d", os.Getpid())

var deviceOnce sync.Once

// TestMain takes the device plugin away at the end.
func TestMain(m *testing.M) {
	code := m.Run()
	_ = exec.Command("kubectl", "delete", "namespace", deviceSpace, "--ignore-not-found", "--wait=false").Run()
	os.Exit(code)
}

// devicePlugin sees to it that the node offers squat.ai/fuse.
func (s *space) devicePlugin() {
	s.t.Helper()
	deviceOnce.Do(func() {
		s.must("create", "namespace", deviceSpace)
		s.says(fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: fuse-device, namespace: %s}
spec:
  containers:
    - name: fuse-device
      image: %s
      imagePullPolicy: IfNotPresent
      args: [squat.ai/fuse]
      securityContext: {privileged: true}
      volumeMounts: [{name: plugins, mountPath: /var/lib/kubelet/device-plugins}]
  volumes: [{name: plugins, hostPath: {path: /var/lib/kubelet/device-plugins}}]
`, deviceSpace, s.device), "-n", deviceSpace, "apply", "-f", "-")
	})
	s.until("the node offers the device", func() bool {
		offered := s.must("get", "nodes", "-o", `jsonpath={.items[*].status.allocatable.squat\.ai/fuse}`)
		return strings.Trim(offered, "0 ") != ""
	})
}

// volume is a place for the one claim of the space, on the node.
func (s *space) volume() {
	s.t.Helper()
	if s.node == "" {
		return // other clusters have a storage class
	}
	dir := s.t.TempDir()
	s.says(fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolume
metadata: {name: %[1]s}
spec:
  capacity: {storage: 16Mi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  claimRef: {namespace: %[1]s, name: config}
  hostPath: {path: %[2]s, type: Directory}
`, s.name, dir), "apply", "-f", "-")
	s.t.Cleanup(func() { _ = exec.Command("kubectl", "delete", "pv", s.name, "--wait=false").Run() })
}
