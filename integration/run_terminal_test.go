package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"oncefs/integration/rig"
)

// A terminal is a pseudo-terminal with a program in a session of its own.
type terminal struct {
	t    *testing.T
	cmd  *exec.Cmd
	ours *os.File

	mu   sync.Mutex
	text string
	from int // what comes before was expected already
}

// openTerminal is a pseudo-terminal's two ends. Ours is closed with the test.
func openTerminal(t testing.TB) (ours, theirs *os.File) {
	t.Helper()
	ours, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close() })
	// pts(4)
	if err := unix.IoctlSetPointerInt(int(ours.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(ours.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return ours, theirs
}

func newTerminal(t *testing.T, cmd *exec.Cmd) *terminal {
	t.Helper()
	ours, theirs := openTerminal(t)
	defer theirs.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tt := &terminal{t: t, cmd: cmd, ours: ours}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	go tt.collect()
	return tt
}

// collect gathers what the terminal shows.
func (tt *terminal) collect() {
	buf := make([]byte, 4096)
	for {
		n, err := tt.ours.Read(buf)
		if err != nil {
			return
		}
		tt.mu.Lock()
		tt.text += string(buf[:n])
		tt.mu.Unlock()
	}
}

func (tt *terminal) write(text string) {
	if _, err := tt.ours.WriteString(text); err != nil {
		tt.t.Fatal(err)
	}
}

// expect waits for a text after the one that was expected last.
func (tt *terminal) expect(text string) {
	tt.t.Helper()
	defer func() {
		if tt.t.Failed() {
			tt.t.Logf("on the terminal: %q", tt.text)
		}
	}()
	rig.WaitFor(tt.t, fmt.Sprintf("%q on the terminal", text), func() bool {
		tt.mu.Lock()
		defer tt.mu.Unlock()
		i := strings.Index(tt.text[tt.from:], text)
		if i >= 0 {
			tt.from += i + len(text)
		}
		return i >= 0
	})
}

// number waits for a text and the number and full stop that follow it.
func (tt *terminal) number(before string) (n int) {
	tt.t.Helper()
	tt.expect(before)
	rig.WaitFor(tt.t, "the number after "+before, func() bool {
		tt.mu.Lock()
		defer tt.mu.Unlock()
		word, _, whole := strings.Cut(tt.text[tt.from:], ".")
		n, _ = strconv.Atoi(word)
		return whole
	})
	return n
}

// state is the letter for a process's state, proc_pid_stat(5); 0 if there is none.
func state(pid int) byte {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, after, ok := strings.Cut(string(text), ") ")
	if !ok || after == "" {
		return 0
	}
	return after[0]
}

func (tt *terminal) count(text string) int {
	tt.mu.Lock()
	defer tt.mu.Unlock()
	return strings.Count(tt.text, text)
}

func (tt *terminal) wait() int {
	tt.cmd.Wait()
	return tt.cmd.ProcessState.ExitCode()
}

// caught is a command that says that it runs and counts interrupts.
const caught = `trap 'n=$((n+1)); echo caught=$n' INT; n=0; echo up=$((6*7)); while read -r line; do echo "line=$line caught=$n"; [ "$line" != end ] || exit 5; done; echo read failed; exec sh -c "$0"`

// Ctrl-C reaches the command once, and does not end what is around it.
func TestRun_CtrlCReachesTheCommandOnce(t *testing.T) {
	bash := rig.Need(t, "bash", "bash")
	d := rig.NewDir(t, []byte(content))
	// In bash a trap does not end a read.
	tt := newTerminal(t, runCommand(d, "--log", filepath.Join(d.Path, "log"), "--", bash, "-c", caught))
	tt.expect("up=42")
	tt.write("\x03")
	tt.expect("caught=1")
	tt.write("end\n")
	tt.expect("line=end")
	if code := tt.wait(); code != 5 || tt.count("caught=2") > 0 {
		t.Errorf("status %d: %s", code, tt.text)
	}
	nothingLeft(t, d)
}

// The shell in which it runs can stop it and let it go on.
func TestRun_JobControlAroundIt(t *testing.T) {
	bash := rig.Need(t, "bash", "bash")
	d := rig.NewDir(t, []byte(content))
	cmd := exec.Command(bash, "--norc", "--noprofile", "-i")
	cmd.Env = append(os.Environ(), "PS1=at prompt: ", "HISTFILE=", "TERM=dumb")
	tt := newTerminal(t, cmd)
	command := runCommand(d, "--log", filepath.Join(d.Path, "log"), "--", bash, "-c", `echo u"p=$$."; read -r line; echo "line=$line"; cat "$0"; exit 5`, d.Secret())
	var words []string
	for _, w := range command.Args {
		words = append(words, "'"+strings.ReplaceAll(w, "'", `'\''`)+"'")
	}
	tt.expect("at prompt: ")
	tt.write(strings.Join(words, " ") + "\n")
	pid := tt.number("up=")
	tt.write("\x1a")
	tt.expect("Stopped")
	tt.expect("at prompt: ")
	// The shell has seen its own child stop. One that is woken from its read by
	// the signal, and has not stopped yet, would still get what is typed.
	rig.WaitFor(t, "the command to be stopped", func() bool { return state(pid) == 'T' })
	tt.write("fg\n")
	tt.expect(d.Secret())
	tt.write("more\n")
	tt.expect("line=more")
	tt.expect("hunter2")
	tt.expect("at prompt: ")
	tt.write("echo status=$?\n")
	tt.expect("status=5")
	tt.expect("at prompt: ")
	tt.write("exit\n")
	tt.wait()
	nothingLeft(t, d)
}

// A shell as the command has its own job control.
func TestRun_ShellAsTheCommand(t *testing.T) {
	bash := rig.Need(t, "bash", "bash")
	d := rig.NewDir(t, []byte(content))
	cmd := runCommand(d, "--log", filepath.Join(d.Path, "log"), "--", bash, "--norc", "--noprofile", "-i")
	cmd.Env = append(os.Environ(), "PS1=at prompt: ", "HISTFILE=", "TERM=dumb")
	tt := newTerminal(t, cmd)
	tt.expect("at prompt: ")
	tt.write("cat " + d.Secret() + "\n")
	tt.expect("hunter2")
	tt.expect("at prompt: ")
	tt.write("sh -c 'echo on=$((1+1)); exec sleep 1000'\n")
	tt.expect("on=2")
	tt.write("\x1a")
	tt.expect("Stopped")
	tt.expect("at prompt: ")
	tt.write("echo in=$((1+2)); cat\n")
	tt.expect("in=3")
	tt.write("echoed\n")
	tt.expect("echoed\r\nechoed")
	tt.write("\x03")
	tt.expect("at prompt: ")
	tt.write("exit 4\n")
	tt.expect("stopped jobs")
	tt.expect("at prompt: ")
	tt.write("exit 4\n") // and the stopped one does not stay behind
	if code := tt.wait(); code != 4 {
		t.Errorf("status %d: %s", code, tt.text)
	}
	nothingLeft(t, d)
}

// The passphrase is asked at the terminal, and the command has the terminal
// after that.
func TestRun_AsksAtTheTerminal(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	if _, err := os.Stat("/etc/init-secrets/secretfile_pw"); err == nil {
		t.Skip("SKIPPED: this machine has the default passphrase file")
	}
	tt := newTerminal(t, exec.Command(rig.Binary(t), "run", d.Conf, "--enc", d.Enc, "--log", filepath.Join(d.Path, "log"), "--",
		"sh", "-c", `echo up=$((6*7)); read -r line; echo "line=$line"; cat "$0"`, d.Secret()))
	tt.expect("assphrase")
	rig.WaitFor(t, "the end of the echo", func() bool {
		state, err := unix.IoctlGetTermios(int(tt.ours.Fd()), unix.TCGETS)
		return err == nil && state.Lflag&unix.ECHO == 0
	})
	tt.write(rig.Passphrase + "\n")
	tt.expect("up=42")
	tt.write("more\n")
	tt.expect("line=more")
	tt.expect("hunter2")
	if code := tt.wait(); code != 0 || tt.count(rig.Passphrase) > 0 {
		t.Errorf("status %d: %s", code, tt.text)
	}
	nothingLeft(t, d)
}
