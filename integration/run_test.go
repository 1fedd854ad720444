package integration

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"oncefs/integration/rig"
)

// runCommand is `oncefs run` on the directory's target with its files.
func runCommand(d *rig.Dir, args ...string) *exec.Cmd {
	return exec.Command(rig.Binary(d.T), append([]string{"run", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass}, args...)...)
}

// private skips where a user who is not root gets no namespaces.
func private(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 && exec.Command("unshare", "--user", "--mount", "true").Run() != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("this system lets no plain user have a user namespace")
		}
		t.Skip("SKIPPED: this system lets no plain user have a user namespace")
	}
}

// insideReader is a reader that is the command of `oncefs run`, and its log.
func insideReader(t testing.TB, d *rig.Dir, args ...string) (*rig.Reader, string) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(d.Path, "log")
	cmd := runCommand(d, append(append([]string{"--log", log}, args...), "--", exe, "reader")...)
	cmd.Stderr = os.Stderr
	return rig.StartReader(t, cmd), log
}

// child is the process of ours below another that has a word in its command
// line.
func child(t testing.TB, pid int, word string) (found int) {
	t.Helper()
	rig.WaitFor(t, "the process with "+word, func() bool {
		found = rig.Child(pid, word)
		return found > 0
	})
	return found
}

// nothingLeft shows that run took everything down.
func nothingLeft(t testing.TB, d *rig.Dir) {
	t.Helper()
	if rig.Mounted(t, d.Conf) {
		t.Error("still mounted")
	}
	rig.WaitFor(t, "the end of every process", func() bool {
		for _, l := range rig.Leftovers() {
			if strings.HasPrefix(l, "process") && strings.Contains(l, d.Path+"/") {
				return false
			}
		}
		return true
	})
}

func TestRun_CommandReadsOnceAndItsStatusIsPassedOn(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	m := rig.Start(t, runCommand(d, "--", "sh", "-c", "cat $0; cat $0; ls $1; exit 7", d.Secret(), d.Pass), d.Conf)
	r := m.Wait()
	if r.Code != 7 || r.Out != content {
		t.Errorf("%+v", r)
	}
	if strings.Count(r.Err, "No such file") != 2 {
		t.Errorf("the second read or the passphrase file: %s", r.Err)
	}
	m.WaitEvent("command-started", 1)
	if e := m.WaitEvent("command-ended", 1); e["status"] != 7.0 {
		t.Errorf("%v", e)
	}
	if e := m.WaitEvent("delivery", 1); e["whole"] != true {
		t.Errorf("%v", e)
	}
	nothingLeft(t, d)
}

// Only the command and its children see the mount.
func TestRun_OthersDoNotSeeTheMount(t *testing.T) {
	private(t)
	d := rig.NewDir(t, []byte(content))
	inside, _ := insideReader(t, d, "--require", "private")
	inside.Want("secrets.yaml", "list", d.Conf)
	outside := rig.NewReader(t, nil)
	outside.Want("", "list", d.Conf)
	outside.Want("ENOENT", "open", d.Secret())
	if rig.Mounted(t, d.Conf) {
		t.Error("the mount is in the caller's namespace")
	}
	if s := rig.Run(t, "status", d.Conf); s.Code != 92 {
		t.Errorf("status from outside: %+v", s)
	}
	inside.Want("ok", "open", d.Secret())
	inside.Want(strconv.Quote(content), "read", "1000")
	inside.Want("ok", "close")
	inside.Want("ENOENT", "open", d.Secret())
	inside.End()
	nothingLeft(t, d)
}

func TestRun_OverAFile(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	r := rig.Exec(t, exec.Command(rig.Binary(t), "run", d.Secret(), "--enc", d.Enc, "--passphrase-file", d.Pass, "--", "sh", "-c", `cat "$0"; ls -A "$1"; exit 3`, d.Secret(), d.Conf))
	if r.Code != 3 || r.Out != content {
		t.Errorf("%+v", r)
	}
	nothingLeft(t, d)
	if left, _ := os.ReadDir(d.Conf); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestRun_SharedMountIsSeenByAll(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	inside, _ := insideReader(t, d, "--shared-mount")
	inside.Want("secrets.yaml", "list", d.Conf)
	outside := rig.NewReader(t, nil)
	outside.Want("secrets.yaml", "list", d.Conf)
	inside.End()
	nothingLeft(t, d)
	outside.Want("", "list", d.Conf)
}

// Where no namespace can be had the log says so, and --require private refuses.
func TestRun_WithoutNamespaces(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	// Another user than one's own takes more than a user namespace has.
	without := func(args ...string) *exec.Cmd {
		cmd := runCommand(d, args...)
		cmd.Args = append([]string{"unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
			"echo 0 >/proc/sys/user/max_mnt_namespaces && exec \"$@\"", "sh"}, cmd.Args...)
		cmd.Path = rig.Need(t, "unshare", "util-linux")
		return cmd
	}
	private(t)
	r := rig.Exec(t, without("--require", "private", "--", "true"))
	if r.Code != 51 || !strings.Contains(r.Err, "no private mount namespace") {
		t.Errorf("%+v", r)
	}
	if _, err := os.Stat(d.Pass); err != nil {
		t.Errorf("the passphrase file: %v", err)
	}
	r = rig.Exec(t, without("--", "cat", d.Secret()))
	if r.Code != 0 || r.Out != content || !strings.Contains(r.Err, `"no-private-mount"`) {
		t.Errorf("%+v", r)
	}
	nothingLeft(t, d)
}

// What fails before the command is started leaves everything as it was.
func TestRun_CommandThatCannotBe(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	plain := d.Write("plain", []byte("no program"))
	script := d.Write("script", []byte("#!/nonexistent/interpreter\n"))
	os.Chmod(script, 0o755)
	for _, c := range []struct {
		args []string
		code int
		keep bool
	}{
		{[]string{"--", "no-such-command"}, 127, true},
		{[]string{"--", "/no/such/command"}, 127, true},
		{[]string{"--", plain}, 126, true},
		{[]string{"--", d.Path}, 126, true},
		{[]string{"--user", "no-such-user", "--", "true"}, 80, true},
		{[]string{"--user", "4294967290", "--", "true"}, 80, true},
		{[]string{"--user", "0:no-such-group", "--", "true"}, 80, true},
		{[]string{"--keep-cap", "no_such_capability", "--", "true"}, 80, true},
		{[]string{"--shared-mount", "--require", "private", "--", "true"}, 80, true},
		{[]string{"--"}, 80, true},
		{[]string{"--", script}, 127, false}, // only the kernel knows
	} {
		r := rig.Exec(t, runCommand(d, c.args...))
		if r.Code != c.code || !strings.Contains(r.Err, "oncefs: error: ") {
			t.Errorf("%q: %+v", c.args, r)
		}
		if _, err := os.Stat(d.Pass); (err == nil) != c.keep {
			t.Errorf("%q: the passphrase file: %v", c.args, err)
		}
		nothingLeft(t, d)
	}
}

func TestRun_NotReadyNoCommand(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	d.Write("pw", []byte("wrong\n"))
	r := rig.Exec(t, runCommand(d, "--", "echo", "it ran"))
	if r.Code != 31 || r.Out != "" || strings.Count(r.Err, "oncefs: error: ") != 1 {
		t.Errorf("%+v", r)
	}
	nothingLeft(t, d)
}

// privileges is what a process may.
const privileges = `id -u; id -g; id -G; grep -E "^(Cap|NoNewPrivs)" /proc/self/status; echo "$HOME"`

func TestRun_GivesUpEveryPrivilege(t *testing.T) {
	none := ""
	for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
		none += set + ":\t0000000000000000\n"
	}
	none += "NoNewPrivs:\t1\n"
	d := rig.NewDir(t, []byte(content))
	r := rig.Exec(t, runCommand(d, "--keep-passphrase", "--", "sh", "-c", privileges))
	if !strings.Contains(r.Out, none) || !strings.HasPrefix(r.Out, fmt.Sprintf("%d\n%d\n", os.Getuid(), os.Getgid())) {
		t.Errorf("as the caller: %+v", r)
	}
	if os.Geteuid() != 0 {
		// No privilege to become somebody else, and it says so.
		if r := rig.Exec(t, runCommand(d, "--user", "0:0", "--", "id")); r.Code != 80 || r.Out != "" {
			t.Errorf("another user: %+v", r)
		}
		return
	}
	d.Write("pw", []byte(rig.Passphrase))
	r = rig.Exec(t, runCommand(d, "--user", "daemon", "--keep-passphrase", "--", "sh", "-c", privileges+"; cat "+d.Secret()))
	if r.Out != "1\n1\n1\n"+none+"/usr/sbin\n"+content {
		t.Errorf("as daemon: %+v", r)
	}
	r = rig.Exec(t, runCommand(d, "--user", "4711:4712", "--keep-passphrase", "--", "sh", "-c", privileges+"; cat "+d.Secret()))
	if !strings.HasPrefix(r.Out, "4711\n4712\n4712\n"+none) || !strings.HasSuffix(r.Out, content) {
		t.Errorf("as a number: %+v", r)
	}
	// A capability that is kept is the only one.
	r = rig.Exec(t, runCommand(d, "--user", "daemon", "--keep-cap", "net_bind_service", "--keep-passphrase", "--", "sh", "-c", privileges))
	if want := strings.ReplaceAll(none, "0000000000000000", "0000000000000400"); !strings.Contains(r.Out, want) {
		t.Errorf("with one capability: %+v", r)
	}
}

// The serving process is not within the command's reach.
func TestRun_CommandCannotReachTheServer(t *testing.T) {
	rig.Root(t)
	d := rig.NewDir(t, []byte(content))
	cmd := runCommand(d, "--user", "daemon", "--", "sh", "-c", `
		while read -r p; do
			kill -9 $p || echo no kill
			cat /proc/$p/maps >/dev/null || echo no maps
			ls /proc/$p/fd >/dev/null || echo no descriptors
		done; cat "$0"`, d.Secret())
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	m := rig.Start(t, cmd, d.Conf)
	m.WaitEvent("command-started", 1)
	supervisor := child(t, cmd.Process.Pid, "--role=supervisor")
	for _, pid := range []int{cmd.Process.Pid, supervisor, child(t, supervisor, "--role=server")} {
		fmt.Fprintln(in, pid)
	}
	in.Close()
	if r := m.Wait(); r.Out != strings.Repeat("no kill\nno maps\nno descriptors\n", 3)+content {
		t.Errorf("%+v", r)
	}
}

func TestRun_SignalsArePassedOn(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGQUIT} {
		d := rig.NewDir(t, []byte(content))
		trap := fmt.Sprintf("trap 'exit 3' %d; echo up; sleep 1000 & wait", s)
		cmd := runCommand(d, "--log", filepath.Join(d.Path, "log"), "--", "sh", "-c", trap)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if line, _ := bufio.NewReader(out).ReadString('\n'); line != "up\n" {
			t.Errorf("%q", line)
		}
		cmd.Process.Signal(s)
		if cmd.Wait(); cmd.ProcessState.ExitCode() != 3 {
			t.Errorf("%v: %v", s, cmd.ProcessState)
		}
		nothingLeft(t, d)
	}
}

func TestRun_KilledCommandGives128AndTheSignal(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	if r := rig.Exec(t, runCommand(d, "--", "sh", "-c", "kill -9 $$")); r.Code != 128+9 {
		t.Errorf("%+v", r)
	}
	nothingLeft(t, d)
}

// Stopped before the command runs, it is as if nothing had been.
func TestRun_StoppedBeforeReady(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	os.Remove(d.Enc)
	m := rig.Start(t, runCommand(d, "--wait", "--", "echo", "it ran"), d.Conf)
	m.WaitEvent("waiting", 1)
	if r := m.Stop(); r.Code != 60 || r.Out != "" {
		t.Errorf("%+v", r)
	}
	if _, err := os.Stat(d.Pass); err != nil {
		t.Errorf("the passphrase file: %v", err)
	}
	nothingLeft(t, d)
}

// What the command leaves behind, in whatever session, ends with it.
func TestRun_LeftoversEnd(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	file := filepath.Join(d.Path, "pid")
	m := rig.Start(t, runCommand(d, "--", "sh", "-c", "setsid sh -c 'echo $$ >$0; trap \"\" HUP; sleep 1000' $0 & while ! [ -s $0 ]; do :; done", file), d.Conf)
	if r := m.Wait(); r.Code != 0 {
		t.Errorf("%+v", r)
	}
	b, _ := os.ReadFile(file)
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || syscall.Kill(pid, 0) != syscall.ESRCH {
		t.Errorf("process %q is still there", b)
	}
	m.WaitEvent("leftovers-ended", 1)
	nothingLeft(t, d)
}

// Killed by force, whichever it is, nothing is left running or mounted.
func TestRun_KilledByForce(t *testing.T) {
	for _, role := range []string{"front", "supervisor", "server"} {
		t.Run(role, func(t *testing.T) {
			d := rig.NewDir(t, []byte(content))
			inside, _ := insideReader(t, d)
			inside.Want("secrets.yaml", "list", d.Conf)
			front := inside.Cmd.Process.Pid
			supervisor := child(t, front, "--role=supervisor")
			switch role {
			case "front":
				inside.Kill()
			case "supervisor":
				syscall.Kill(supervisor, syscall.SIGKILL)
				if inside.Cmd.Wait(); inside.Cmd.ProcessState.ExitCode() != 128+9 {
					t.Errorf("%v", inside.Cmd.ProcessState)
				}
			case "server":
				syscall.Kill(child(t, supervisor, "--role=server"), syscall.SIGKILL)
				rig.WaitFor(t, "the dead mount", func() bool { return inside.Do("stat", d.Secret()) == "ENOTCONN" })
				inside.End() // the command may have had what it needs, and goes on
				if code := inside.Cmd.ProcessState.ExitCode(); code != 0 {
					t.Errorf("status %d", code)
				}
			}
			nothingLeft(t, d)
		})
	}
}

// The command has the caller's descriptors, environment, standard input and
// working directory; of ours it has nothing.
func TestRun_CommandGetsWhatTheCallerHad(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	pr, pw, _ := os.Pipe()
	io.WriteString(pw, rig.Passphrase+"\nsecond line\n")
	pw.Close()
	extra, _, _ := os.Pipe()
	notify, w, _ := os.Pipe()
	large := strings.Repeat("x", 100_000)
	cmd := exec.Command(rig.Binary(t), "run", ".", "--enc", d.Enc, "--passphrase-file", "/dev/fd/3", "--notify-fd", "5", "--log", filepath.Join(d.Path, "log"),
		"--", "sh", "-c", `ls /proc/self/fd | grep "^[0-9]$" | tr "\n" " "; env | grep -c "^[A-Z]"; echo "${#LARGE} $PWD"; cat; cat secrets.yaml`)
	cmd.ExtraFiles = []*os.File{pr, extra, w}
	cmd.Dir = d.Conf
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LARGE=" + large, "PWD=" + d.Conf}
	cmd.Stdin = strings.NewReader("from standard input\n")
	r := rig.Exec(t, cmd)
	w.Close()
	// 3 is the directory that ls reads; what go test leaves open is above 9.
	if want := "0 1 2 3 4 3\n100000 " + d.Conf + "\nfrom standard input\n" + content; r.Out != want {
		t.Errorf("got %q, want %q; %s", r.Out, want, r.Err)
	}
	if line, err := bufio.NewReader(notify).ReadString('\n'); line != "\n" {
		t.Errorf("s6 was told %q, %v", line, err)
	}
	nothingLeft(t, d)
}

func TestRun_SystemdIsTold(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	socket := filepath.Join(d.Path, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	told := func() string {
		buf := make([]byte, 100)
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
	cmd := runCommand(d, "--", "sh", "-c", `test -z "$NOTIFY_SOCKET" && cat "$0" >/dev/null && exec sleep 1000`, d.Secret())
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+socket)
	m := rig.Start(t, cmd, d.Conf)
	if s := told(); s != "READY=1" {
		t.Errorf("systemd was told %q", s)
	}
	m.WaitEvent("delivery", 1)
	m.Signal(syscall.SIGTERM)
	if s := told(); s != "STOPPING=1" {
		t.Errorf("systemd was told %q", s)
	}
	if r := m.Wait(); r.Code != 128+15 {
		t.Errorf("%+v", r)
	}
}

// What each start of the command gets: all of it once, and then nothing.
const startsThree = `cat "$0" >>"$1"; cat "$0" 2>>"$1.second"; echo x >>"$1.starts"; [ "$(wc -l <"$1.starts")" -ge 3 ]`

func TestRestart_ServesOncePerStart(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	got := filepath.Join(d.Path, "got")
	m := rig.Start(t, runCommand(d, "--restart", "on-failure", "--restart-delay", "1ms", "--", "sh", "-c", startsThree, d.Secret(), got), d.Conf)
	if r := m.Wait(); r.Code != 0 {
		t.Errorf("%+v", r)
	}
	if b, _ := os.ReadFile(got); string(b) != strings.Repeat(content, 3) {
		t.Errorf("the starts got %q", b)
	}
	if b, _ := os.ReadFile(got + ".second"); strings.Count(string(b), "No such file") != 3 {
		t.Errorf("second reads: %s", b)
	}
	for name, n := range map[string]int{"command-started": 3, "delivery": 3, "rearmed": 2, "restart": 2} {
		if told := len(m.Events(name)); told != n {
			t.Errorf("%d events %s, want %d", told, name, n)
		}
	}
	if _, err := os.Lstat(d.Pass); !os.IsNotExist(err) {
		t.Errorf("the passphrase file: %v", err)
	}
	nothingLeft(t, d)
}

// Without --restart spent is spent, and run ends with the command.
func TestRestart_NoneByDefault(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	m := rig.Start(t, runCommand(d, "--", "sh", "-c", startsThree, d.Secret(), filepath.Join(d.Path, "got")), d.Conf)
	if r := m.Wait(); r.Code != 1 || len(m.Events("restart")) > 0 || len(m.Events("command-started")) != 1 {
		t.Errorf("%+v", r)
	}
}

func TestRestart_AlwaysAlsoAfterSuccessUntilStopped(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	m := rig.Start(t, runCommand(d, "--restart", "always", "--restart-delay", "1ms", "--", "sh", "-c", `cat "$0"; echo x >>"$1"; [ "$(wc -l <"$1")" -lt 3 ] || exec sleep 1000`, d.Secret(), filepath.Join(d.Path, "starts")), d.Conf)
	m.WaitEvent("delivery", 3)
	// A command that is stopped is not started again.
	if r := m.Stop(); r.Code != 0 && r.Code != 128+15 || r.Out != strings.Repeat(content, 3) {
		t.Errorf("%+v", r)
	}
	if n := len(m.Events("command-started")); n != 3 {
		t.Errorf("%d starts", n)
	}
	nothingLeft(t, d)
}

func TestRestart_StoppedInThePause(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	m := rig.Start(t, runCommand(d, "--restart", "on-failure", "--restart-delay", "1h", "--", "sh", "-c", "exit 5"), d.Conf)
	if e := m.WaitEvent("restart", 1); e["in"] != "1h0m0s" {
		t.Errorf("%v", e)
	}
	if r := m.Stop(); r.Code != 5 {
		t.Errorf("%+v", r)
	}
	nothingLeft(t, d)
}

// Nobody but the command's own processes may read, seen or not; and between two
// starts nobody at all.
func TestRestart_OthersGetNothing(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	inside, log := insideReader(t, d, "--shared-mount", "--restart", "on-failure", "--restart-delay", "1h")
	inside.Want("secrets.yaml", "list", d.Conf)
	outside := rig.NewReader(t, nil)
	outside.Want("EACCES", "open", d.Secret())
	rig.WaitFor(t, "the refusal in the log", func() bool {
		b, _ := os.ReadFile(log)
		return strings.Contains(string(b), `"refusal"`) && strings.Contains(string(b), "it is not a process of the command")
	})
	// It ends by a signal, unread.
	command := child(t, child(t, inside.Cmd.Process.Pid, "--role=supervisor"), "reader")
	syscall.Kill(command, syscall.SIGKILL)
	rig.WaitFor(t, "the pause", func() bool {
		b, _ := os.ReadFile(log)
		return strings.Contains(string(b), `"restart"`)
	})
	outside.Want("ENOENT", "open", d.Secret())
	outside.Want("", "list", d.Conf)
	inside.Cmd.Process.Signal(syscall.SIGTERM)
	inside.End()
	nothingLeft(t, d)
}

// What a start leaves running is gone before the next is served.
func TestRestart_LeftoversOfAStartGetNothing(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	script := `setsid sh -c 'echo up >"$1.up"; while :; do cat "$0" >>"$1.left" 2>/dev/null; done' "$0" "$1" </dev/null &
		while ! [ -s "$1.up" ]; do :; done; ` + startsThree
	got := filepath.Join(d.Path, "got")
	// The leftover may come first in a start; with it the start gets nothing. What
	// must not be is more than one copy a start.
	m := rig.Start(t, runCommand(d, "--restart", "on-failure", "--restart-delay", "1ms", "--", "sh", "-c", script, d.Secret(), got), d.Conf)
	m.Wait()
	a, _ := os.ReadFile(got)
	b, _ := os.ReadFile(got + ".left")
	if starts := len(m.Events("command-started")); starts != 3 || len(a)+len(b) != starts*len(content) {
		t.Errorf("%d starts got %d and %d bytes", starts, len(a), len(b))
	}
	for i, e := range m.Events("leftovers-ended") {
		if i > 0 && e["count"] == 0.0 {
			t.Errorf("%v", e)
		}
	}
	nothingLeft(t, d)
}

// After --expire there is nothing to start the command with.
func TestRestart_NotWithoutTheSecret(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	in, w, _ := os.Pipe()
	cmd := runCommand(d, "--restart", "always", "--restart-delay", "1ms", "--expire", "1s", "--", "cat")
	cmd.Stdin = in
	m := rig.Start(t, cmd, d.Conf)
	in.Close()
	m.WaitEvent("expiry", 1)
	w.Close()
	if r := m.Wait(); r.Code != 0 {
		t.Errorf("%+v", r)
	}
	m.WaitEvent("secret-lost", 1)
	if n := len(m.Events("command-started")); n != 1 {
		t.Errorf("%d starts", n)
	}
}

// Who was where nobody should be may be there still: no further start is served.
func TestRestart_NotAfterAnIntrusion(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	// It waits for its standard input, which stays open.
	cmd := runCommand(d, "--restart", "always", "--restart-delay", "1ms", "--on-intrusion", "exit", "--",
		"sh", "-c", `cat "$0"; head "$0"; exec cat`, d.Secret())
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	m := rig.Start(t, cmd, d.Conf)
	if r := m.Wait(); r.Code != 70 || r.Out != content {
		t.Errorf("%+v", r)
	}
	for name, n := range map[string]int{"command-started": 1, "restart": 0, "rearmed": 0} {
		if told := len(m.Events(name)); told != n {
			t.Errorf("%d events %s, want %d", told, name, n)
		}
	}
	nothingLeft(t, d)
}

func TestRestart_NeedsADirectory(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	r := rig.Exec(t, exec.Command(rig.Binary(t), "run", d.Secret(), "--enc", d.Enc, "--passphrase-file", d.Pass, "--restart", "always", "--", "true"))
	if r.Code != 80 || !strings.Contains(r.Err, "--restart needs a directory") {
		t.Errorf("%+v", r)
	}
}

// In a container run is process 1: what nobody waits for it reaps, and orphans
// of another's making too.
func TestRun_AsProcess1(t *testing.T) {
	rig.Root(t)
	d := rig.NewDir(t, []byte(content))
	cmd := runCommand(d, "--", "sh", "-c", `
		for i in 1 2 3 4 5; do (true & exec true); done
		while grep -q "^State:.Z" /proc/[0-9]*/status 2>/dev/null; do :; done
		tr "\0" "\n" </proc/1/cmdline | sed -n 2p; cat "$0"; kill -TERM 1; exec sleep 1000`, d.Secret())
	cmd.Args = append([]string{"unshare", "--pid", "--fork", "--mount-proc", "--kill-child"}, cmd.Args...)
	cmd.Path = rig.Need(t, "unshare", "util-linux")
	if r := rig.Exec(t, cmd); r.Out != "run\n"+content || r.Code != 128+15 {
		t.Errorf("%+v", r)
	}
	nothingLeft(t, d)
}

// Entering the namespaces of process 1, as kubectl exec and docker exec do,
// leads past the mount.
func TestRun_EnteringTheContainerFindsNothing(t *testing.T) {
	rig.Root(t)
	d := rig.NewDir(t, []byte(content))
	inside, _ := insideReader(t, d)
	inside.Want("secrets.yaml", "list", d.Conf)
	enter := exec.Command(rig.Need(t, "nsenter", "util-linux"), "--target", strconv.Itoa(inside.Cmd.Process.Pid), "--all", "ls", "-A", d.Conf)
	if r := rig.Exec(t, enter); r.Code != 0 || r.Out != "" {
		t.Errorf("%+v", r)
	}
	// Root can enter the command's namespace on purpose, and may not read there.
	supervisor := child(t, inside.Cmd.Process.Pid, "--role=supervisor")
	enter = exec.Command("nsenter", "--target", strconv.Itoa(supervisor), "--mount", "cat", d.Secret())
	if r := rig.Exec(t, enter); r.Code == 0 || r.Out != "" || !strings.Contains(r.Err, "Permission denied") {
		t.Errorf("%+v", r)
	}
	inside.Want("ok", "open", d.Secret())
}
