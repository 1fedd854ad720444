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

// shapes are those of deploy/k8s that differ in more than a field.
var shapes = []string{"in-container", "user-namespace", "migration", "sidecar"}

// served is where the program finds its file.
func served(shape string) string {
	if shape == "sidecar" {
		return "/config/once/secrets.yaml"
	}
	return "/config/secrets.yaml"
}

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

// The program dies: oncefs ends as it did, or is stopped, and the pod is over.
func TestProgramDies(t *testing.T) {
	t.Parallel()
	for _, shape := range shapes {
		t.Run(shape, func(t *testing.T) {
			t.Parallel()
			s, pod := started(t, shape, "app")
			s.endProgram(pod, "app")
			s.wait("pod/"+pod, "jsonpath={.status.phase}=Failed")
			if end := s.status(pod, "app").State.Terminated; end == nil || end.ExitCode != 137 {
				t.Errorf("it ended with %+v, and the program with SIGKILL", end)
			}
			s.remove(pod)
		})
	}
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
func TestKilled(t *testing.T) {
	t.Parallel()
	for _, shape := range shapes {
		if shape == "sidecar" {
			continue // it goes on, see below
		}
		t.Run(shape, func(t *testing.T) {
			t.Parallel()
			s, pod := started(t, shape, "app")
			s.onNode(t)
			s.kill(pod, "app")
			s.wait("pod/"+pod, "jsonpath={.status.phase}=Failed")
			s.notOnNode(pod)
			s.remove(pod)
		})
	}
}

// In a Deployment, from 1.36 on: oncefs is killed, the whole pod starts over, with a
// copy of the passphrase, and the program is served again.
func TestDeployment136_Killed(t *testing.T) {
	t.Parallel()
	s := newRig(t).space(t)
	s.onNode(t)
	pod := s.shape("in-container")
	app := pod.container(t, "app")
	app["restartPolicy"] = "Never"
	app["restartPolicyRules"] = []any{map[string]any{"action": "RestartAllContainers", "exitCodes": map[string]any{"operator": "NotIn", "values": []int{0}}}}
	spec := pod.at("spec")
	delete(spec, "restartPolicy") // a Deployment's is Always
	labels := map[string]any{"of": "deployment"}
	s.apply(object{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": map[string]any{"name": "app"},
		"spec": map[string]any{"selector": map[string]any{"matchLabels": labels}, "template": map[string]any{"metadata": map[string]any{"labels": labels}, "spec": map[string]any(spec)}}})
	s.wait("deployment/app", "condition=Available")
	name := s.must("get", "pods", "-l", "of=deployment", "-o", "jsonpath={.items[0].metadata.name}")
	uid := s.get("pod/"+name, ".metadata.uid")
	s.wasRead(name, "app")
	s.kill(name, "app")
	for _, c := range []string{"passphrase", "app"} {
		s.until(c+" was started again", func() bool { return s.restarts(name, c) > 0 })
	}
	s.until("the program has read again", func() bool { return s.reads(name, "app", "--previous=false") == 1 })
	s.waitReady(name)
	s.isGone(name, "app", "cat", "/config/secrets.yaml")
	s.isGone(name, "app", "cat", "/etc/init-secrets/secretfile_pw")
	s.must("delete", "deployment", "app", "--cascade=foreground", "--timeout="+patience.String())
	s.nothingLeft(uid)
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
	pod := s.whole(shape)
	app := pod.container(s.t, "app")
	args := app["args"].([]any)
	last := len(args) - 1
	args[last] = "trap 'exit 0' TERM; httpd -f -p 8080 -h /tmp & wait $!"
	return pod
}

// A pod that is deleted goes within seconds, with its mount, also when nobody has
// read and when somebody is reading.
func TestDeleted(t *testing.T) {
	t.Parallel()
	for _, shape := range shapes {
		path := served(shape)
		t.Run(shape+"/unread", func(t *testing.T) {
			t.Parallel()
			s := newRig(t).space(t)
			pod := s.start(s.idle(shape))
			s.waitReady(pod)
			s.remove(pod)
		})
		t.Run(shape+"/held", func(t *testing.T) {
			t.Parallel()
			s := newRig(t).space(t)
			idle := s.idle(shape)
			app := idle.container(t, "app")
			args := app["args"].([]any)
			args[len(args)-1] = "exec 3<" + path + "; head -c 1 <&3 >/dev/null; " + args[len(args)-1].(string)
			pod := s.start(idle)
			s.waitReady(pod)
			s.isGone(pod, "app", "cat", path)
			s.remove(pod)
		})
	}
}

// Jobs end: oncefs keeps nobody waiting.
func TestJob(t *testing.T) {
	t.Parallel()
	for _, shape := range shapes {
		t.Run(shape, func(t *testing.T) {
			t.Parallel()
			s := newRig(t).space(t)
			pod := s.whole(shape)
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
	type held struct {
		*space
		shape, pod string
	}
	var pods []held
	for _, shape := range shapes {
		s := newRig(t).space(t)
		s.onNode(t)
		pods = append(pods, held{s, shape, s.start(s.whole(shape))})
	}
	unread := newRig(t).space(t)
	idle := unread.start(unread.idle("sidecar"))
	unread.waitReady(idle)
	for _, p := range pods {
		p.waitReady(p.pod)
	}
	if out, err := exec.Command(filepath.Join(unread.node, "restart-kubelet")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	unread.until("the kubelet answers", func() bool { return unread.exec(idle, "app", "true").code == 0 })
	if r := unread.exec(idle, "app", "cat", served("sidecar")); r.out != unread.content {
		t.Errorf("%+v", r)
	}
	unread.isGone(idle, "app", "cat", served("sidecar"))
	for _, p := range pods {
		p.isGone(p.pod, "app", "cat", served(p.shape))
	}
	for _, p := range append(pods, held{unread, "sidecar", idle}) {
		for _, c := range []string{"app", "oncefs"} {
			if n := p.restarts(p.pod, c); n != 0 {
				t.Errorf("%s of %s was started again %d times", c, p.pod, n)
			}
		}
		p.remove(p.pod)
	}
	unread.noDevicePlugin()
}

// Fifty pods at once, of three shapes (migration is in-container): each reads its
// own, and nothing is left.
func TestFiftyPods(t *testing.T) {
	const pods = 50
	s := newRig(t).space(t)
	var items []any
	kinds := []object{s.whole("in-container"), s.whole("sidecar"), s.whole("user-namespace")}
	for _, pod := range kinds {
		// Of the fifty each probe forks a process, which a small node has better use for.
		pod.container(t, "app").at("readinessProbe")["periodSeconds"] = 10
	}
	for i := range pods {
		one := clone(kinds[i%len(kinds)])
		meta := one.at("metadata")
		meta["name"] = fmt.Sprintf("%s-%d", meta["name"], i)
		meta["namespace"] = s.name
		one.at("metadata", "labels")["of"] = "fifty"
		items = append(items, one)
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
	if len(uids) != pods {
		t.Fatalf("%d pods", len(uids))
	}
	began = time.Now()
	s.must("delete", "pods", "-l", "of=fifty", "--timeout="+(3*patience).String())
	t.Logf("they were gone after %v", time.Since(began).Round(time.Second))
	for _, uid := range uids {
		s.nothingLeft(uid)
	}
}
