// Package k8s applies what deploy/k8s holds to a real cluster, the one that
// KUBECONFIG names, and looks at it from outside, from each container, and, where
// the node is this machine, from the node.
package k8s

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// patience is how long anything may take before a test gives up. Most of it is never
// needed; the machine may be busy with other things.
const patience = 4 * time.Minute

// rig is what the tests of this run have in common.
type rig struct {
	oncefs  string // the built binary
	app     string // image with a shell
	image   string // image of oncefs
	metrics string // image of oncefs with oncefs-metrics
	device  string // image of the device plugin
	node    string // scripts of the cluster on this machine; "" where it is another's
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{node: os.Getenv("ONCEFS_CLUSTER_DIR")}
	for name, to := range map[string]*string{"ONCEFS_BIN": &r.oncefs, "ONCEFS_IMAGE": &r.image, "ONCEFS_METRICS_IMAGE": &r.metrics, "ONCEFS_APP_IMAGE": &r.app, "ONCEFS_DEVICE_IMAGE": &r.device} {
		if *to = os.Getenv(name); *to == "" {
			t.Fatalf("%s is not set; run make test-cluster", name)
		}
	}
	return r
}

// onNode skips what takes the node to be this machine.
func (r *rig) onNode(t *testing.T) {
	t.Helper()
	if r.node == "" {
		t.Skip("the node is another machine")
	}
}

// result is how a command ended.
type result struct {
	out, err string
	code     int
}

func run(t *testing.T, stdin string, name string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var out, err bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &err
	e := cmd.Run()
	var exit *exec.ExitError
	if e != nil && !errors.As(e, &exit) {
		t.Fatalf("%s: %v", name, e)
	}
	return result{out.String(), err.String(), cmd.ProcessState.ExitCode()}
}

// object is anything that the API server knows.
type object map[string]any

// at follows the path, making what is missing.
func (o object) at(path ...string) object {
	for _, p := range path {
		next, ok := o[p].(map[string]any)
		if !ok {
			next = map[string]any{}
			o[p] = next
		}
		o = next
	}
	return o
}

func clone(o object) object {
	text, err := json.Marshal(o)
	if err != nil {
		panic(err) // it was JSON
	}
	var c object
	if err := json.Unmarshal(text, &c); err != nil {
		panic(err)
	}
	return c
}

// container finds one, of either kind, by its name.
func (o object) container(t *testing.T, name string) object {
	t.Helper()
	for _, kind := range []string{"initContainers", "containers"} {
		list, _ := o.at("spec")[kind].([]any)
		for _, c := range list {
			if c.(map[string]any)["name"] == name {
				return c.(map[string]any)
			}
		}
	}
	t.Fatalf("there is no container %s", name)
	return nil
}

// space is a namespace of one test with a secret of its own.
type space struct {
	*rig
	t          *testing.T
	name       string
	content    string
	passphrase string
	encrypted  string
	config     string // directory on the node that migration has as its volume
}

func (r *rig) space(t *testing.T) *space {
	t.Helper()
	nonce := make([]byte, 12)
	if _, err := rand.Read(nonce); err != nil {
		t.Fatal(err)
	}
	id := hex.EncodeToString(nonce)
	s := &space{rig: r, t: t, name: "oncefs-" + id[:8], passphrase: "passphrase-" + id, content: "password: content-" + id + "\n"}
	dir := t.TempDir()
	s.write(dir, "secrets.yaml", s.content)
	s.write(dir, "passphrase", s.passphrase+"\n")
	if e := run(t, "", r.oncefs, "encrypt", filepath.Join(dir, "secrets.yaml"), "--passphrase-file", filepath.Join(dir, "passphrase")); e.code != 0 {
		t.Fatalf("%+v", e)
	}
	enc, err := os.ReadFile(filepath.Join(dir, "secrets.yaml.enc"))
	if err != nil {
		t.Fatal(err)
	}
	s.encrypted = string(enc)
	t.Cleanup(func() {
		if t.Failed() {
			s.dump()
		}
		cmd := exec.Command("kubectl", "delete", "namespace", s.name, "--ignore-not-found", "--wait=false")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	s.namespace(s.name)
	return s
}

// namespace makes one that pods can be made in: not before a controller has made its
// account.
func (s *space) namespace(name string) {
	s.t.Helper()
	s.must("create", "namespace", name)
	s.must("-n", name, "wait", "--for=create", "serviceaccount/default", "--timeout="+patience.String())
}

func (s *space) write(dir, name, content string) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// dump shows what there is to know about a failure.
func (s *space) dump() {
	for _, args := range [][]string{
		{"get", "pods", "-o", "wide"},
		{"describe", "pods"},
		{"get", "events", "--sort-by=.lastTimestamp"},
	} {
		out, _ := exec.Command("kubectl", append([]string{"-n", s.name}, args...)...).CombinedOutput()
		s.t.Logf("kubectl %s\n%s", strings.Join(args, " "), out)
	}
	pods, _ := exec.Command("kubectl", "-n", s.name, "get", "pods", "-o", "name").Output()
	for _, pod := range strings.Fields(string(pods)) {
		for _, previous := range []string{"--previous=false", "--previous"} {
			out, _ := exec.Command("kubectl", "-n", s.name, "logs", pod, "--all-containers", "--prefix", previous).CombinedOutput()
			s.t.Logf("logs %s %s\n%s", pod, previous, out)
		}
	}
}

func (s *space) kubectl(args ...string) result {
	s.t.Helper()
	return run(s.t, "", "kubectl", append([]string{"-n", s.name}, args...)...)
}

// says has kubectl read from its standard input.
func (s *space) says(stdin string, args ...string) {
	s.t.Helper()
	if r := run(s.t, stdin, "kubectl", append([]string{"-n", s.name}, args...)...); r.code != 0 {
		s.t.Fatalf("kubectl %s: %+v\n%s", strings.Join(args, " "), r, stdin)
	}
}

// must is kubectl, and its standard output.
func (s *space) must(args ...string) string {
	s.t.Helper()
	r := s.kubectl(args...)
	if r.code != 0 {
		s.t.Fatalf("kubectl %s: %+v", strings.Join(args, " "), r)
	}
	return r.out
}

// shape reads what kubectl apply -k would send, with the images and the secret of
// this run. The pod is returned apart, for the test to change.
func (s *space) shape(name string) (pod object) {
	s.t.Helper()
	text := s.must("apply", "--dry-run=client", "-o", "json", "-k", filepath.Join("../../deploy/k8s", name))
	// The images are not those of a registry.
	text = strings.NewReplacer(`"oncefs:latest"`, `"`+s.image+`"`, `"busybox:1.37"`, `"`+s.app+`"`).Replace(text)
	var list struct {
		Items []object
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		s.t.Fatal(err)
	}
	for _, o := range list.Items {
		switch o["kind"] {
		case "Pod":
			pod = o
			continue
		case "Secret":
			delete(o, "data")
			o["stringData"] = map[string]string{"passphrase": s.passphrase + "\n"}
		case "ConfigMap":
			o["data"] = map[string]string{"secrets.yaml.enc": s.encrypted}
		}
		s.apply(o)
	}
	if pod == nil {
		s.t.Fatalf("there is no pod in %s", name)
	}
	switch name {
	case "user-namespace":
		s.devicePlugin()
	case "migration":
		s.volume()
	}
	return pod
}

// whole is a shape that finds its encrypted file: that of migration begins without.
func (s *space) whole(name string) object {
	s.t.Helper()
	pod := s.shape(name)
	if name == "migration" {
		s.onNode(s.t)
		s.write(s.config, "secrets.yaml.enc", s.encrypted)
	}
	return pod
}

func (s *space) apply(o object) {
	s.t.Helper()
	o.at("metadata")["namespace"] = s.name
	text, err := json.Marshal(o)
	if err != nil {
		s.t.Fatal(err)
	}
	s.says(string(text), "apply", "-f", "-")
}

// start applies the pod and returns its name.
func (s *space) start(pod object) string {
	s.t.Helper()
	s.apply(pod)
	return pod.at("metadata")["name"].(string)
}

// wait is told by the API server when something is so. The condition is as for
// kubectl wait --for.
func (s *space) wait(what, condition string) {
	s.t.Helper()
	if r := s.kubectl("wait", "--for="+condition, what, "--timeout="+patience.String()); r.code != 0 {
		s.t.Fatalf("wait for %s of %s: %+v", condition, what, r)
	}
}

func (s *space) waitReady(pod string) {
	s.t.Helper()
	s.wait("pod/"+pod, "condition=Ready")
}

func (s *space) exec(pod, container string, command ...string) result {
	s.t.Helper()
	return s.kubectl(append([]string{"exec", pod, "-c", container, "--"}, command...)...)
}

func (s *space) logs(pod, container string, more ...string) string {
	s.t.Helper()
	return s.must(append([]string{"logs", pod, "-c", container}, more...)...)
}

func (s *space) get(what, path string) string {
	s.t.Helper()
	return s.must("get", what, "-o", "jsonpath={"+path+"}")
}

// digest is what the sample program prints of what it read.
func (s *space) digest() string {
	sum := sha256.Sum256([]byte(s.content))
	return hex.EncodeToString(sum[:])
}

// wasRead checks that the program had all of it.
func (s *space) wasRead(pod, container string) {
	s.t.Helper()
	if log := s.logs(pod, container); !strings.Contains(log, s.digest()) {
		s.t.Errorf("the program did not read it:\n%s", log)
	}
}

// isGone checks that a file does not exist for a process that is started in the
// container. command opens it: cat, or, where there is none, oncefs check, which
// exits with 20.
func (s *space) isGone(pod, container string, command ...string) {
	s.t.Helper()
	r := s.exec(pod, container, command...)
	if r.code != 20 && (r.code == 0 || !strings.Contains(strings.ToLower(r.err), "no such file or directory")) {
		s.t.Errorf("%s in %s: %+v", strings.Join(command, " "), container, r)
	}
	if strings.Contains(r.out+r.err, s.content) {
		s.t.Errorf("the content came out of %s", container)
	}
}

// remove deletes the pod and checks that it goes within seconds, with its volumes.
func (s *space) remove(pod string) {
	s.t.Helper()
	uid := s.get("pod/"+pod, ".metadata.uid")
	began := time.Now()
	s.must("delete", "pod", pod, "--timeout="+patience.String())
	s.t.Logf("the pod was gone after %v", time.Since(began).Round(100*time.Millisecond))
	s.nothingLeft(uid)
}

// nothingLeft waits until the node has forgotten the pod, and looks for mounts.
func (s *space) nothingLeft(uid string) {
	s.t.Helper()
	if s.node == "" {
		return
	}
	began := time.Now()
	dir := filepath.Join("/var/lib/kubelet/pods", uid)
	s.until("the node forgets the pod", func() bool {
		_, err := os.Lstat(dir)
		return errors.Is(err, fs.ErrNotExist)
	})
	s.t.Logf("the node had forgotten it %v later", time.Since(began).Round(100*time.Millisecond))
	if left := mounts(s.t, uid); len(left) > 0 {
		s.t.Errorf("left mounted on the node: %v", left)
	}
}

// until asks again until it is so. It is for what tells nobody. Most of what asks is
// a process of kubectl's, so it does not ask often.
func (s *space) until(what string, so func() bool) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	for tick := time.NewTicker(500 * time.Millisecond); !so(); {
		select {
		case <-tick.C:
		case <-ctx.Done():
			tick.Stop()
			s.t.Fatalf("%s: waited in vain", what)
		}
	}
}

// mounts lists the node's mounts whose line has the word in it.
func mounts(t *testing.T, word string) (found []string) {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, word) {
			found = append(found, strings.TrimSpace(line))
		}
	}
	return found
}

// nowhere checks that no process of this machine has the passphrase in its
// environment, and no volume of the pod in a file, but for the Secret's own.
func (s *space) nowhere(pod string) {
	s.t.Helper()
	if s.node == "" {
		return
	}
	environments, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil || len(environments) == 0 {
		s.t.Fatalf("no processes: %v", err)
	}
	for _, path := range environments {
		if text, err := os.ReadFile(path); err == nil && bytes.Contains(text, []byte(s.passphrase)) {
			s.t.Errorf("the passphrase is in %s", path)
		}
	}
	volumes := filepath.Join("/var/lib/kubelet/pods", s.get("pod/"+pod, ".metadata.uid"), "volumes")
	seen := 0
	err = filepath.WalkDir(volumes, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() && (e.Name() == "kubernetes.io~secret" || e.Name() == "once") {
			return fs.SkipDir // the Secret itself, and the mount
		}
		if !e.Type().IsRegular() {
			return nil
		}
		seen++
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for name, secret := range map[string]string{"passphrase": s.passphrase, "content": strings.TrimSpace(s.content)} {
			if bytes.Contains(text, []byte(secret)) {
				s.t.Errorf("the %s is in %s", name, path)
			}
		}
		return nil
	})
	if err != nil || seen == 0 {
		s.t.Errorf("looked at %d files in %s: %v", seen, volumes, err)
	}
}

// containerStatus is what the API server says of a container.
type containerStatus struct {
	Name         string
	ContainerID  string
	RestartCount int
	State        struct {
		Terminated *struct{ ExitCode int }
	}
}

func (s *space) status(pod, container string) containerStatus {
	s.t.Helper()
	var o struct {
		Status struct{ InitContainerStatuses, ContainerStatuses []containerStatus }
	}
	if err := json.Unmarshal([]byte(s.must("get", "pod", pod, "-o", "json")), &o); err != nil {
		s.t.Fatal(err)
	}
	for _, c := range append(o.Status.InitContainerStatuses, o.Status.ContainerStatuses...) {
		if c.Name == container {
			return c
		}
	}
	return containerStatus{}
}

// init1 is the process id, on this machine, of a container's first process.
func (s *space) init1(pod, container string) int {
	s.t.Helper()
	_, id, _ := strings.Cut(s.status(pod, container).ContainerID, "://")
	if id == "" {
		s.t.Fatalf("no container %s in %s", container, pod)
	}
	processes, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, path := range processes {
		text, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(text, []byte(id)) {
			continue
		}
		status, err := os.ReadFile(filepath.Join(filepath.Dir(path), "status"))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(status)) {
			// The last of the numbers is the one in the innermost namespace.
			if pids, ok := strings.CutPrefix(line, "NSpid:"); ok {
				if f := strings.Fields(pids); len(f) > 1 && f[len(f)-1] == "1" {
					var pid int
					fmt.Sscan(filepath.Base(filepath.Dir(path)), &pid)
					return pid
				}
			}
		}
	}
	s.t.Fatalf("no process of container %s", id)
	return 0
}
