package integration

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"oncefs/integration/rig"
)

// scrape asks as Prometheus does.
func scrape(t testing.TB, address string) string {
	t.Helper()
	r, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("%s: %v", r.Status, err)
	}
	return string(text)
}

// become waits until the samples have the values that they should have. What it
// saw then Prometheus' own checker has to like.
func become(t testing.TB, now func() string, want ...string) {
	t.Helper()
	var text string
	rig.WaitFor(t, "the counters", func() bool {
		text = now()
		for i := 0; i < len(want); i += 2 {
			if !regexp.MustCompile(`(?m)^oncefs_` + want[i] + `\{[^}]*\} ` + want[i+1] + `$`).MatchString(text) {
				return false
			}
		}
		return true
	})
	check := exec.Command(rig.Need(t, "promtool", "prometheus"), "check", "metrics")
	check.Stdin = strings.NewReader(text)
	if r := rig.Exec(t, check); r.Code != 0 || r.Err != "" {
		t.Errorf("promtool: %+v\n%s", r, text)
	}
	for _, secret := range []string{"hunter2", rig.Passphrase} {
		if strings.Contains(text, secret) {
			t.Errorf("a secret: %s", text)
		}
	}
}

func TestC20_Metrics(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	address := "127.0.0.1:" + freePort(t)
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pr.Close()
	fmt.Fprintln(pw, rig.Passphrase)
	pw.Close()
	cmd := exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", "/dev/fd/3", "--metrics", address)
	cmd.ExtraFiles = []*os.File{pr}
	m := rig.Start(t, cmd, d.Conf)
	m.WaitReady()
	now := func() string { return scrape(t, address) }
	become(t, now, "serving", "1", "reads_left", "1", "sealed_total", "1", "claimed_total", "0", "delivered_total", "0", "late_total", "0", "refused_total", "0")
	if label := fmt.Sprintf("oncefs_reads_left{mount=%q,secret=%q} 1\n", d.Conf, "secrets.yaml"); !strings.Contains(now(), label) {
		t.Errorf("it lacks %s", label)
	}
	r := rig.NewReader(t, nil)
	r.Want("ok", "open", d.Secret())
	r.Want("ok", "close")
	become(t, now, "claimed_total", "1", "given_back_total", "1", "intrusions_total", "0", "reads_left", "1")
	r.Want("ok", "open", d.Secret())
	r.Want(sum([]byte(content)), "read-all")
	r.Want("ok", "close")
	rig.Cat(t, d.Secret())
	// The kernel may look it up more than once for cat; one attempt is in the log.
	become(t, now, "claimed_total", "2", "delivered_total", "1", "late_total", `[1-9]\d*`, "intrusions_total", "1", "expired_total", "0", "reads_left", "0")
	if st := rig.Run(t, "status", d.Conf, "--json"); !regexp.MustCompile(`"counts":{"sealed":1,"claimed":2,"given_back":1,"delivered":1,"expired":0,"refused":0,"late":[1-9]\d*},"intrusions":1`).MatchString(st.Out) {
		t.Errorf("%+v", st)
	}
	rig.Need(t, "curl", "curl")
	if r := rig.Exec(t, exec.Command("curl", "--silent", "--fail", "http://"+address+"/metrics")); r.Out != now() {
		t.Errorf("curl: %+v", r)
	}
	if r := rig.Exec(t, exec.Command("curl", "--silent", "--fail", "http://"+address+"/")); r.Code != 22 || r.Out != "" {
		t.Errorf("another path: %+v", r)
	}

	// What it has, as the kernel tells it.
	pid := child(t, m.Cmd.Process.Pid, "oncefs-metrics")
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"CapEff:\t0000000000000000\n", "CapPrm:\t0000000000000000\n", "NoNewPrivs:\t1\n", "Seccomp:\t2\n"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("its status lacks %q:\n%s", want, status)
		}
	}
	if os.Geteuid() == 0 { // to others it shows nothing
		var ours syscall.Stat_t
		if err := syscall.Fstat(int(pr.Fd()), &ours); err != nil {
			t.Fatal(err)
		}
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil || len(fds) == 0 {
			t.Errorf("no descriptors: %v", err)
		}
		for _, fd := range fds {
			var st syscall.Stat_t
			if syscall.Stat(fd, &st) == nil && st.Ino == ours.Ino && st.Dev == ours.Dev {
				t.Errorf("it has the passphrase's descriptor: %s", fd)
			}
		}
	}
	m.Stop()
	if r := rig.Exec(t, exec.Command("curl", "--silent", "http://"+address+"/metrics")); r.Code != 7 {
		t.Errorf("it is there after the end: %+v", r)
	}
}

func TestC20_MetricsTextfile(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	dir := filepath.Join(d.Path, "textfile")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := func() string {
		names, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			if path := filepath.Join(dir, n.Name()); filepath.Ext(path) == ".prom" {
				return path
			}
		}
		return ""
	}
	now := func() string {
		text, err := os.ReadFile(file())
		if err != nil {
			return ""
		}
		return string(text)
	}
	m := d.MountOver("--metrics-textfile", dir)
	become(t, now, "serving", "1", "reads_left", "1")
	if info, err := os.Stat(file()); err != nil || info.Mode() != 0o644 {
		t.Errorf("%v: %v", info.Mode(), err)
	}
	rig.Cat(t, d.Secret())
	become(t, now, "delivered_total", "1", "reads_left", "0")
	// Also when nobody can say goodbye.
	pid := child(t, m.Cmd.Process.Pid, "oncefs-metrics")
	m.Signal(syscall.SIGKILL)
	m.Wait()
	rig.WaitFor(t, "its end", func() bool { return syscall.Kill(pid, 0) == syscall.ESRCH })
	become(t, now, "serving", "0", "delivered_total", "1")
	if names, _ := os.ReadDir(dir); len(names) != 1 {
		t.Errorf("beside the file: %v", names)
	}
	if r := rig.Run(t, "umount", d.Conf); r.Code != 0 {
		t.Errorf("%+v", r)
	}
	// The next one of the same mount begins anew, in the same file.
	d.WritePass()
	d.MountOver("--metrics-textfile", dir).Stop()
	become(t, now, "serving", "0", "delivered_total", "0", "reads_left", "0", "sealed_total", "1")
	if names, _ := os.ReadDir(dir); len(names) != 1 {
		t.Errorf("beside the file: %v", names)
	}
}

// Who shows counters can hang or die, and who asks can be slow: nobody waits.
func TestC20_MetricsNeverBlock(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	address := "127.0.0.1:" + freePort(t)
	m := d.MountOver("--metrics", address, "--reads", "3")
	for range 50 { // more than it answers at once
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprint(conn, "GET /metr")
	}
	if got := rig.Cat(t, d.Secret()); got.Out != content {
		t.Errorf("with slow readers: %+v", got)
	}
	pid := child(t, m.Cmd.Process.Pid, "oncefs-metrics")
	syscall.Kill(pid, syscall.SIGSTOP)
	defer syscall.Kill(pid, syscall.SIGCONT)
	if got := rig.Cat(t, d.Secret()); got.Out != content {
		t.Errorf("with one that hangs: %+v", got)
	}
	m.WaitEvent("delivery", 2)
	syscall.Kill(pid, syscall.SIGKILL)
	if e := m.WaitEvent("metrics", 1); !strings.Contains(fmt.Sprint(e["error"]), "oncefs-metrics has ended") {
		t.Errorf("%v", e)
	}
	if got := rig.Cat(t, d.Secret()); got.Out != content {
		t.Errorf("with one that is dead: %+v", got)
	}
	if r := m.Stop(); r.Code != 0 {
		t.Errorf("%+v", r)
	}
	d.WritePass()
	m = d.MountOver("--metrics", address)
	pid = child(t, m.Cmd.Process.Pid, "oncefs-metrics")
	syscall.Kill(pid, syscall.SIGSTOP)
	defer syscall.Kill(pid, syscall.SIGCONT)
	if r := m.Stop(); r.Code != 0 || rig.Mounted(t, d.Conf) {
		t.Errorf("the end with one that hangs: %+v", r)
	}
}

// Where the counters cannot be shown nothing is mounted.
func TestC20_MetricsRefused(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, args := range [][]string{
		{"--metrics", taken.Addr().String()},
		{"--metrics", "192.0.2.1:9735"}, // RFC 5737: nobody's
		{"--metrics-textfile", filepath.Join(d.Path, "nowhere")},
		{"--metrics-textfile", d.Enc},
		{"--metrics-textfile", "/proc"},
	} {
		if r := refused(t, d, 71, args...); !strings.Contains(r.Err, "oncefs: hint: the address must be free") {
			t.Errorf("%v: %+v", args, r)
		}
	}
	refused(t, d, 80, "--metrics", "9735")
	// The program alone.
	binary, err := os.ReadFile(rig.Binary(t))
	if err != nil {
		t.Fatal(err)
	}
	alone := filepath.Join(t.TempDir(), "oncefs")
	if err := os.WriteFile(alone, binary, 0o755); err != nil {
		t.Fatal(err)
	}
	r := refusedCommand(t, d, 71, exec.Command(alone, "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass, "--metrics", "127.0.0.1:0"))
	if !strings.Contains(r.Err, "oncefs: hint: install it in the same directory as oncefs") {
		t.Errorf("%+v", r)
	}
	// A mount that is there keeps its file.
	dir := t.TempDir()
	d.MountOver("--metrics-textfile", dir)
	var before []byte
	names, _ := filepath.Glob(dir + "/*.prom")
	rig.WaitFor(t, "the file", func() bool { names, _ = filepath.Glob(dir + "/*.prom"); return len(names) == 1 })
	before, _ = os.ReadFile(names[0])
	d.WritePass()
	if r := rig.Run(t, "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass, "--metrics-textfile", dir); r.Code != 11 {
		t.Errorf("%+v", r)
	}
	if after, _ := os.ReadFile(names[0]); !bytes.Equal(before, after) {
		t.Errorf("it became:\n%s", after)
	}
}

// By hand the other program does nothing.
func TestC20_MetricsByHand(t *testing.T) {
	r := rig.Exec(t, exec.Command(filepath.Join(filepath.Dir(rig.Binary(t)), "oncefs-metrics"), "127.0.0.1:0"))
	if r.Code != 1 || !strings.Contains(r.Err, "is started by oncefs mount") {
		t.Errorf("%+v", r)
	}
}

// Refused and expired are counted too.
func TestC20_MetricsOfPolicyAndTime(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	address := "127.0.0.1:" + freePort(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	d.MountOver("--metrics", address, "--reader-exe", exe, "--hold", "1ms")
	now := func() string { return scrape(t, address) }
	if got := rig.Cat(t, d.Secret()); got.Code == 0 || got.Out != "" {
		t.Errorf("%+v", got)
	}
	become(t, now, "refused_total", "1", "intrusions_total", "1", "claimed_total", "0", "reads_left", "1")
	r := rig.NewReader(t, nil)
	r.Want("ok", "open", d.Secret())
	r.Want(`"user"`, "read", "4")
	become(t, now, "expired_total", "1", "delivered_total", "0", "reads_left", "0")
}

func TestRun_Metrics(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	address := "127.0.0.1:" + freePort(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := runCommand(d, "--log", filepath.Join(d.Path, "log"), "--metrics", address, "--", exe, "reader")
	cmd.Stderr = os.Stderr
	r := rig.StartReader(t, cmd)
	r.Want("ok", "open", d.Secret())
	r.Want(sum([]byte(content)), "read-all")
	r.Want("ok", "close")
	become(t, func() string { return scrape(t, address) }, "delivered_total", "1", "reads_left", "0")
	r.End()
	nothingLeft(t, d)
}
