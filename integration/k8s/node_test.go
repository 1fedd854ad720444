package k8s

import (
	"fmt"
	"os"
	"os/exec"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
)

// deviceSpace is the namespace of the device plugin, for all tests of a run.
var deviceSpace = fmt.Sprintf("oncefs-device-%d", os.Getpid())

// device says whether the plugin's namespace was made, and whether it was started.
var device struct {
	sync.Mutex
	namespace, started bool
}

// TestMain takes the device plugin away at the end.
func TestMain(m *testing.M) {
	// They wait for many programs at once, and need no collection: see internal/wait.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(2 << 30)
	code := m.Run()
	_ = exec.Command("kubectl", "delete", "namespace", deviceSpace, "--ignore-not-found", "--wait=false").Run()
	os.Exit(code)
}

// devicePlugin sees to it that the node offers squat.ai/fuse.
func (s *space) devicePlugin() {
	s.t.Helper()
	device.Lock()
	defer device.Unlock()
	if device.started {
		return
	}
	if !device.namespace {
		s.namespace(deviceSpace)
		device.namespace = true
	}
	s.says(fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: fuse-device, namespace: %[1]s}
spec:
  containers:
    - name: fuse-device
      image: %[2]s
      imagePullPolicy: IfNotPresent
      args: [squat.ai/fuse]
      securityContext: {privileged: true}
      volumeMounts: [{name: plugins, mountPath: /var/lib/kubelet/device-plugins}]
  volumes: [{name: plugins, hostPath: {path: /var/lib/kubelet/device-plugins}}]
`, deviceSpace, s.device), "-n", deviceSpace, "apply", "-f", "-")
	s.until("the node offers the device", s.offered)
	device.started = true
}

// noDevicePlugin takes it away, until the node says so: a kubelet that was started
// again has no device to give, and its node's status does not show that at once.
func (s *space) noDevicePlugin() {
	s.t.Helper()
	device.Lock()
	defer device.Unlock()
	s.must("-n", deviceSpace, "delete", "pod", "fuse-device", "--grace-period=1", "--timeout="+patience.String())
	s.until("the node offers no device", func() bool { return !s.offered() })
	device.started = false
}

func (s *space) offered() bool {
	s.t.Helper()
	return strings.Trim(s.must("get", "nodes", "-o", `jsonpath={.items[*].status.allocatable.squat\.ai/fuse}`), "0 ") != ""
}

// volume is a place for the one claim of the space, on the node.
func (s *space) volume() {
	s.t.Helper()
	if s.node == "" {
		return // other clusters have a storage class
	}
	s.config = s.t.TempDir()
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
`, s.name, s.config), "apply", "-f", "-")
	s.t.Cleanup(func() { _ = exec.Command("kubectl", "delete", "pv", s.name, "--wait=false").Run() })
}
