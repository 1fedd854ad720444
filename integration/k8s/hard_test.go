package k8s

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What follows is the table of docs/kubernetes.md, a test a line or two: which
// shape, who crashed, what happens.

// kill sends SIGKILL to a container's first process, from the node.
func (s *space) kill(pod, container string) {
	s.t.Helper()
	if err := syscall.Kill(s.init1(pod, container), syscall.SIGKILL); err != nil {
		s.t.Fatal(err)
	}
}

// restarts is how often a container was started again.
func (s *space) restarts(pod, container string) int {
	s.t.Helper()
	return s.status(pod, container).RestartCount
}

// reads counts how often the program has had all of it.
func (s *space) reads(pod, container string, more ...string) int {
	s.t.Helper()
	r := s.kubectl(append([]string{"logs", pod, "-c", container}, more...)...)
	return strings.Count(r.out, s.digest())
}

// endProgram has the program end with a signal. The shell of the in-container
// shape and the program of the sidecar's are told apart by who is asked.
func (s *space) endProgram(pod, container string) {
	s.t.Helper()
	if r := s.exec(pod, container, "killall", "-9", "httpd"); r.code != 0 {
		s.t.Fatalf("%+v", r)
	}
}

// In the container, the program dies: oncefs ends, and the pod with it.
func TestInContainer_ProgramDies(t *testing.T) {
	t.Parallel()
	s, pod := started(t, "in-container", "app")
	s.endProgram(pod, "app")
	s.wait("pod/"+pod, "jsonpath={.status.phase}=Failed")
	if end := s.status(pod, "app").State.Terminated; end == nil || end.ExitCode != 137 {
		t.Errorf("it ended with %+v, and the program with SIGKILL", end)
	}
	s.remove(pod)
}

// With --restart the program that dies is started again and reads again, and
// nobody else can.
func TestInContainer_ProgramDiesWithRestart(t *testing.T) {
	t.Parallel()
	s := newRig(t).space(t)
	pod := s.shape("in-container")
	app := pod.container(t, "app")
	command := app["command"].([]any)
	last := len(command) - 1 // --
	app["command"] = append(append([]any{}, command[:last]...), "--restart=on-failure", "--restart-delay=1s", "--")
	name := s.start(pod)
	s.waitReady(name)
	s.endProgram(name, "app")
	s.until("it has read again", func() bool { return s.reads(name, "app") == 2 })
	s.isGone(name, "app", "cat", "/config/secrets.yaml")
	if n := s.restarts(name, "app"); n != 0 {
		t.Errorf("the container was started again %d times", n)
	}
	s.remove(name)
}

// In the container, oncefs is killed: all of it ends, and nothing is on the node.
func TestInContainer_Killed(t *testing.T) {
	t.Parallel()
	s, pod := started(t, "in-container", "app")
	s.onNode(t)
	s.kill(pod, "app")
	s.wait("pod/"+pod, "jsonpath={.status.phase}=Failed")
	s.remove(pod)
}

// Beside a sidecar, the program dies: the pod ends, as restartPolicy Never has it.
func TestSidecar_ProgramDies(t *testing.T) {
	t.Parallel()
	s, pod := started(t, "sidecar", "app")
	s.endProgram(pod, "app")
	s.wait("pod/"+pod, "jsonpath={.status.phase}=Failed")
	s.remove(pod)
}

// A sidecar that was killed, whose file was not read yet: it takes its dead mount
// off the node, says what is lost, and goes on saying it, while a pod that is
// deleted goes.
func TestSidecar_KilledUnread(t *testing.T) {
	t.Parallel()
	s := newRig(t).space(t)
	s.onNode(t)
	pod := s.start(s.idle("sidecar"))
	s.waitReady(pod)
	uid := s.get("pod/"+pod, ".metadata.uid")
	if seen := mounts(t, uid); !strings.Contains(strings.Join(seen, "\n"), "fuse.oncefs") {
		t.Fatalf("the node does not see the mount: %v", seen)
	}
	s.kill(pod, "oncefs")
	s.until("it says that the secret is lost", func() bool {
		for _, previous := range []string{"--previous=false", "--previous"} {
			if r := s.kubectl("logs", pod, "-c", "oncefs", previous); strings.Contains(r.out, "the secret is lost") {
				return true
			}
		}
		return false
	})
	for _, line := range mounts(t, uid) {
		if strings.Contains(line, "fuse.oncefs") {
			t.Errorf("the dead mount is still there: %s", line)
		}
	}
	s.isGone(pod, "app", "cat", "/config/once/secrets.yaml")
	s.remove(pod)
}

// A sidecar that was killed after the read does not disturb the program.
func TestSidecar_KilledSpent(t *testing.T) {
	t.Parallel()
	s, pod := started(t, "sidecar", "app")
	s.onNode(t)
	s.kill(pod, "oncefs")
	s.until("it was started again", func() bool { return s.restarts(pod, "oncefs") > 0 })
	if n := s.restarts(pod, "app"); n != 0 {
		t.Errorf("the program was started again %d times", n)
	}
	s.isGone(pod, "app", "cat", "/config/once/secrets.yaml")
	s.remove(pod)
}

// From 1.36 on, who is killed or dies has the whole pod start over, and be served.
func TestSidecar136_Killed(t *testing.T) { restarted(t, "oncefs") }

func TestSidecar136_ProgramDies(t *testing.T) { restarted(t, "app") }

func restarted(t *testing.T, who string) {
	t.Parallel()
	s, pod := started(t, "sidecar-1.36", "app")
	s.onNode(t)
	if who == "app" {
		s.endProgram(pod, "app")
	} else {
		s.kill(pod, who)
	}
	for _, c := range []string{"passphrase", "oncefs", "app"} {
		s.until(c+" was started again", func() bool { return s.restarts(pod, c) > 0 })
	}
	s.until("the program has read again", func() bool { return s.reads(pod, "app", "--previous=false") == 1 })
	s.waitReady(pod)
	s.isGone(pod, "app", "cat", "/config/once/secrets.yaml")
	s.isGone(pod, "oncefs", "oncefs", "check", "/etc/init-secrets/secretfile_pw")
	s.remove(pod)
}

// idle is a shape whose program does not read.
func (s *space) idle(shape string) object {
	s.t.Helper()
	pod := s.shape(shape)
	app := pod.container(s.t, "app")
	args := app["args"].([]any)
	last := len(args) - 1
	args[last] = "trap 'exit 0' TERM; httpd -f -p 8080 -h /tmp & wait $!"
	return pod
}

// A pod that is deleted goes within seconds, with its mount, also when nobody has
// read and when somebody is reading.
func TestDeleted(t *testing.T) {
	for _, shape := range []struct{ name, path string }{{"in-container", "/config/secrets.yaml"}, {"sidecar", "/config/once/secrets.yaml"}} {
		t.Run(shape.name+"/unread", func(t *testing.T) {
			t.Parallel()
			s := newRig(t).space(t)
			pod := s.start(s.idle(shape.name))
			s.waitReady(pod)
			s.remove(pod)
		})
		t.Run(shape.name+"/held", func(t *testing.T) {
			t.Parallel()
			s := newRig(t).space(t)
			idle := s.idle(shape.name)
			app := idle.container(t, "app")
			args := app["args"].([]any)
			args[len(args)-1] = "exec 3<" + shape.path + "; head -c 1 <&3 >/dev/null; " + args[len(args)-1].(string)
			pod := s.start(idle)
			s.waitReady(pod)
			s.isGone(pod, "app", "cat", shape.path)
			s.remove(pod)
		})
	}
}

// Jobs end: oncefs keeps nobody waiting.
func TestJob(t *testing.T) {
	for _, shape := range []string{"in-container", "sidecar"} {
		t.Run(shape, func(t *testing.T) {
			t.Parallel()
			s := newRig(t).space(t)
			pod := s.shape(shape)
			app := pod.container(t, "app")
			args := app["args"].([]any)
			for i, a := range args {
				args[i] = strings.Split(a.(string), "httpd")[0] // it reads, and that is all
			}
			delete(app, "readinessProbe")
			spec := pod.at("spec")
			spec["restartPolicy"] = "Never"
			job := object{"apiVersion": "batch/v1", "kind": "Job", "metadata": map[string]any{"name": "job"},
				"spec": map[string]any{"backoffLimit": 0, "template": map[string]any{"metadata": map[string]any{"labels": map[string]any{"of": "job"}}, "spec": map[string]any(spec)}}}
			s.apply(job)
			s.wait("job/job", "condition=Complete")
			name := s.must("get", "pods", "-l", "of=job", "-o", "jsonpath={.items[0].metadata.name}")
			s.wasRead(name, "app")
			uid := s.get("pod/"+name, ".metadata.uid")
			s.until("the volumes are taken down", func() bool { return s.node == "" || len(mounts(t, uid)) == 0 })
			s.remove(name)
		})
	}
}

// The kubelet is killed and comes back: pods go on, what was spent is spent, what
// was not read can be.
func TestKubeletRestarts(t *testing.T) {
	s := newRig(t).space(t)
	s.onNode(t)
	read := s.start(s.shape("in-container"))
	unread := s.start(s.idle("sidecar"))
	s.waitReady(read)
	s.waitReady(unread)
	if out, err := exec.Command(filepath.Join(s.node, "restart-kubelet")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s.until("the kubelet answers", func() bool { return s.exec(read, "app", "true").code == 0 })
	s.isGone(read, "app", "cat", "/config/secrets.yaml")
	if r := s.exec(unread, "app", "cat", "/config/once/secrets.yaml"); r.out != s.content {
		t.Errorf("%+v", r)
	}
	s.isGone(unread, "app", "cat", "/config/once/secrets.yaml")
	for pod, containers := range map[string][]string{read: {"app"}, unread: {"app", "oncefs"}} {
		for _, c := range containers {
			if n := s.restarts(pod, c); n != 0 {
				t.Errorf("%s of %s was started again %d times", c, pod, n)
			}
		}
		s.remove(pod)
	}
}

// Fifty pods at once, of both shapes: each reads its own, and nothing is left.
func TestFiftyPods(t *testing.T) {
	const each = 25
	s := newRig(t).space(t)
	var items []any
	for _, shape := range []string{"in-container", "sidecar"} {
		pod := s.shape(shape)
		pod.at("metadata", "labels")["of"] = "fifty"
		for i := range each {
			one := clone(pod)
			one.at("metadata")["name"] = fmt.Sprintf("%s-%d", shape, i)
			one.at("metadata")["namespace"] = s.name
			items = append(items, one)
		}
	}
	text, err := json.Marshal(object{"apiVersion": "v1", "kind": "List", "items": items})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	s.says(string(text), "apply", "-f", "-")
	s.must("wait", "pods", "--all", "--for=condition=Ready", "--timeout="+(3*patience).String())
	t.Logf("%d pods were ready after %v", len(items), time.Since(began).Round(time.Second))
	if n := strings.Count(s.must("logs", "-l", "of=fifty", "-c", "app", "--max-log-requests=50", "--tail=-1"), s.digest()); n != len(items) {
		t.Errorf("%d of %d programs have read it", n, len(items))
	}
	uids := strings.Fields(s.must("get", "pods", "-o", "jsonpath={.items[*].metadata.uid}"))
	if len(uids) != 2*each {
		t.Fatalf("%d pods", len(uids))
	}
	began = time.Now()
	s.must("delete", "pods", "-l", "of=fifty", "--timeout="+(3*patience).String())
	t.Logf("they were gone after %v", time.Since(began).Round(time.Second))
	for _, uid := range uids {
		s.nothingLeft(uid)
	}
}
