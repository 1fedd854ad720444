package k8s

import (
	"regexp"
	"strings"
	"testing"
)

// started is a pod of a shape that has read its secret.
func started(t *testing.T, shape, app string) (*space, string) {
	t.Helper()
	s := newRig(t).space(t)
	pod := s.start(s.whole(shape))
	s.waitReady(pod)
	s.wasRead(pod, app)
	return s, pod
}

// unprivileged checks that a container's program has no capability and can gain
// none; pid is that of the program as its container counts.
func (s *space) unprivileged(pod, container, pid, uid string) {
	s.t.Helper()
	status := s.exec(pod, container, "cat", "/proc/"+pid+"/status")
	fields := map[string]string{}
	for line := range strings.Lines(status.out) {
		if name, value, ok := strings.Cut(line, ":"); ok {
			fields[name] = strings.Join(strings.Fields(value), " ")
		}
	}
	none := "0000000000000000"
	for name, want := range map[string]string{"CapInh": none, "CapPrm": none, "CapEff": none, "CapAmb": none, "NoNewPrivs": "1",
		"Uid": strings.Join([]string{uid, uid, uid, uid}, " ")} {
		if fields[name] != want {
			s.t.Errorf("%s of the program is %q, want %q (%+v)", name, fields[name], want, status)
		}
	}
}

// program is the process id of the sample's server in its container.
func (s *space) program(pod, container string) string {
	s.t.Helper()
	r := s.exec(pod, container, "pidof", "httpd")
	if r.code != 0 {
		s.t.Fatalf("the program does not run: %+v", r)
	}
	return strings.TrimSpace(r.out)
}

func TestInContainer(t *testing.T) {
	t.Parallel()
	s, pod := started(t, "in-container", "app")
	s.isGone(pod, "app", "cat", "/config/secrets.yaml")
	s.isGone(pod, "app", "cat", "/etc/init-secrets/secretfile_pw")
	s.unprivileged(pod, "app", s.program(pod, "app"), "10001")
	s.nowhere(pod)
	s.notOnNode(pod)
	s.remove(pod)
}

// notOnNode checks that the node sees no mount of ours in the pod's volumes.
func (s *space) notOnNode(pod string) {
	s.t.Helper()
	if s.node == "" {
		return
	}
	for _, line := range mounts(s.t, s.get("pod/"+pod, ".metadata.uid")) {
		if strings.Contains(line, "fuse.oncefs") {
			s.t.Errorf("the node sees the mount: %s", line)
		}
	}
}

// TestUserNamespace is the shape without privilege: nobody in there has a
// capability, and root of there would be nobody on the node.
func TestUserNamespace(t *testing.T) {
	t.Parallel()
	s, pod := started(t, "user-namespace", "app")
	s.isGone(pod, "app", "cat", "/config/secrets.yaml")
	s.isGone(pod, "app", "cat", "/etc/init-secrets/secretfile_pw")
	s.unprivileged(pod, "app", s.program(pod, "app"), "10001")
	if r := s.exec(pod, "app", "cat", "/proc/self/uid_map"); strings.Join(strings.Fields(r.out), " ") == "0 0 4294967295" {
		t.Errorf("it is the node's user namespace: %+v", r)
	}
	if r := s.exec(pod, "app", "grep", "-E", "Cap(Eff|Bnd)", "/proc/1/status"); strings.Join(strings.Fields(r.out), " ") != "CapEff: 0000000000000000 CapBnd: 0000000000200000" {
		t.Errorf("the container has a capability, or others than SYS_ADMIN to be had: %+v", r)
	}
	s.nowhere(pod)
	s.notOnNode(pod)
	s.remove(pod)
}

// TestMigration is the pod of the old scripts on its first start: it waits for an
// encrypted file, is not ready, and goes on by itself.
func TestMigration(t *testing.T) {
	t.Parallel()
	s := newRig(t).space(t)
	again := s.shape("migration")
	pod := s.start(clone(again))
	s.until("it says what it waits for", func() bool {
		r := s.kubectl("logs", pod, "-c", "app")
		return r.code == 0 && strings.Contains(r.out+r.err, "oncefs encrypt")
	})
	if ready := s.get("pod/"+pod, `.status.conditions[?(@.type=="Ready")].status`); ready != "False" {
		t.Errorf("Ready is %q and there is no encrypted file", ready)
	}
	s.must("exec", pod, "-c", "app", "--", "sh", "-c", `printf %s "$1" >/tmp/secrets.yaml`, "sh", s.content)
	if r := s.exec(pod, "app", "/oncefs/oncefs", "encrypt", "/tmp/secrets.yaml", "-o", "/config/secrets.yaml.enc", "--remove-plaintext"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	s.waitReady(pod)
	s.wasRead(pod, "app")
	s.isGone(pod, "app", "cat", "/config/secrets.yaml")
	s.isGone(pod, "app", "cat", "/etc/init-secrets/secretfile_pw")
	s.isGone(pod, "app", "cat", "/tmp/secrets.yaml")
	s.unprivileged(pod, "app", s.program(pod, "app"), "10001")
	s.nowhere(pod)
	s.remove(pod)
	// The second start finds the file, and serves again.
	pod = s.start(again)
	s.waitReady(pod)
	s.wasRead(pod, "app")
	s.remove(pod)
}

func TestSidecar(t *testing.T) {
	t.Parallel()
	s, pod := started(t, "sidecar", "app")
	s.isGone(pod, "app", "cat", "/config/once/secrets.yaml")
	s.isGone(pod, "oncefs", "oncefs", "check", "/served/once/secrets.yaml")
	s.isGone(pod, "oncefs", "oncefs", "check", "/etc/init-secrets/secretfile_pw")
	if r := s.exec(pod, "oncefs", "oncefs", "status", "/served/once"); r.code != 91 {
		t.Errorf("status: %+v", r)
	}
	s.unprivileged(pod, "app", "1", "10001")
	s.nowhere(pod)
	s.remove(pod)
}

// TestMetrics has the counters asked for as Prometheus does, from within the pod.
func TestMetrics(t *testing.T) {
	t.Parallel()
	for _, shape := range []string{"in-container", "sidecar"} {
		t.Run(shape, func(t *testing.T) {
			t.Parallel()
			s := newRig(t).space(t)
			s.image = s.metrics
			pod := s.shape(shape)
			if shape == "sidecar" {
				oncefs := pod.container(t, "oncefs")
				oncefs["args"] = append(oncefs["args"].([]any), "--metrics=127.0.0.1:9735")
			} else {
				app := pod.container(t, "app")
				command := app["command"].([]any)
				last := len(command) - 1 // --
				app["command"] = append(append([]any{}, command[:last]...), "--metrics=127.0.0.1:9735", "--")
			}
			name := s.start(pod)
			s.waitReady(name)
			s.wasRead(name, "app")
			s.until("the read is counted", func() bool {
				r := s.exec(name, "app", "wget", "-qO-", "http://127.0.0.1:9735/metrics")
				return regexp.MustCompile(`(?m)^oncefs_delivered_total{.*} 1$`).MatchString(r.out)
			})
			s.remove(name)
		})
	}
}
