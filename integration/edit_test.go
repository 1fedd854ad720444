package integration

import (
	"bufio"
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"oncefs/integration/rig"
)

// editing is a running `oncefs edit` whose editor has changed the content, and
// waits for its standard input to end.
type editing struct {
	*rig.Dir
	was    []byte
	cmd    *exec.Cmd
	stderr bytes.Buffer
	marker string
}

func startEditing(t *testing.T, args ...string) *editing {
	t.Helper()
	e := &editing{Dir: rig.NewDir(t, []byte("password: hunter2\n"))}
	e.was, _ = os.ReadFile(e.Enc)
	e.marker = e.Write("editor", []byte("#!/bin/sh\nsed -i s/hunter2/hunter3/ \"$1\"\necho changed\nread line\n"))
	os.Chmod(e.marker, 0o755)
	e.cmd = exec.Command(rig.Binary(t), append([]string{"edit", e.Enc, "--passphrase-file", e.Pass}, args...)...)
	e.cmd.Env = append(os.Environ(), "VISUAL=", "EDITOR="+e.marker)
	e.cmd.Stderr = &e.stderr
	// Without a terminal: nobody is to be asked.
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	in, err := e.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := e.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := e.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); e.cmd.Process.Kill(); e.cmd.Wait() })
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "changed\n" {
		t.Fatalf("the editor said %q, %v, %s", line, err, e.stderr.String())
	}
	return e
}

// editor is the process number of the editor.
func (e *editing) editor() int {
	child := rig.Child(e.cmd.Process.Pid, "internal-edit")
	return rig.Child(child, e.marker)
}

func (e *editing) wait(code int) {
	e.T.Helper()
	e.cmd.Wait()
	if got := e.cmd.ProcessState.ExitCode(); got != code {
		e.T.Errorf("ended with %d, not %d: %s", got, code, e.stderr.String())
	}
	if strings.Contains(e.stderr.String(), "hunter") {
		e.T.Errorf("content in a message: %s", e.stderr.String())
	}
}

// untouched checks that the file is as it was, and what is beside it.
func (e *editing) untouched(beside ...string) {
	e.T.Helper()
	if now, _ := os.ReadFile(e.Enc); !bytes.Equal(now, e.was) {
		e.T.Error("the encrypted file was changed")
	}
	entries, _ := os.ReadDir(e.Path)
	var got []string
	for _, f := range entries {
		got = append(got, f.Name())
	}
	want := append([]string{"config", "editor", "pw", "secrets.yaml.enc"}, beside...)
	if strings.Join(got, " ") != strings.Join(want, " ") {
		e.T.Errorf("the directory holds %v, not %v", got, want)
	}
}

// TestEdit_StoppedKeepsTheWork: whoever ends oncefs ends the editor, and what was
// edited so far is beside the file, encrypted.
func TestEdit_StoppedKeepsTheWork(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			e := startEditing(t)
			editor := e.editor()
			e.cmd.Process.Signal(sig)
			e.wait(64)
			if editor == 0 || syscall.Kill(editor, 0) == nil {
				t.Errorf("the editor (%d) is alive", editor)
			}
			e.untouched("secrets.yaml.enc.edited")
			if got := rig.Run(t, "decrypt", e.Enc+".edited", "--passphrase-file", e.Pass); got.Out != "password: hunter3\n" {
				t.Errorf("kept: %+v", got)
			}
		})
	}
}

// TestEdit_Killed: when a process is killed by force everything in the private
// place is gone, and the file is as it was.
func TestEdit_Killed(t *testing.T) {
	t.Run("oncefs", func(t *testing.T) {
		e := startEditing(t)
		editor := e.editor()
		e.cmd.Process.Kill()
		e.wait(-1)
		rig.WaitFor(t, "the editor's end", func() bool { return syscall.Kill(editor, 0) != nil })
		e.untouched()
	})
	t.Run("its child", func(t *testing.T) {
		e := startEditing(t)
		editor := e.editor()
		syscall.Kill(rig.Child(e.cmd.Process.Pid, "internal-edit"), syscall.SIGKILL)
		e.wait(64)
		rig.WaitFor(t, "the editor's end", func() bool { return syscall.Kill(editor, 0) != nil })
		e.untouched()
	})
	t.Run("the editor", func(t *testing.T) {
		e := startEditing(t)
		syscall.Kill(e.editor(), syscall.SIGKILL)
		e.wait(64)
		e.untouched("secrets.yaml.enc.edited")
	})
	t.Run("terminal signals are the editor's", func(t *testing.T) {
		e := startEditing(t)
		e.cmd.Process.Signal(syscall.SIGINT)
		e.cmd.Process.Signal(syscall.SIGQUIT)
		syscall.Kill(rig.Child(e.cmd.Process.Pid, "internal-edit"), syscall.SIGINT)
		syscall.Kill(e.editor(), syscall.SIGTERM)
		e.wait(64)
	})
}

// TestEdit_OthersSeeNothing: outside, the content is nowhere while it is edited.
func TestEdit_OthersSeeNothing(t *testing.T) {
	e := startEditing(t)
	if list, err := os.ReadDir("/proc/tty/ldisc"); err != nil || len(list) != 0 {
		t.Errorf("outside: %v, %v", list, err)
	}
	// In the editor's place nothing but its own directory can be written to.
	root := "/proc/" + strconv.Itoa(e.editor()) + "/root"
	mounts, err := os.ReadFile("/proc/" + strconv.Itoa(e.editor()) + "/mounts")
	if err != nil {
		t.Fatal(err)
	}
	private := 0
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		options := strings.Split(f[3], ",")
		if f[1] == "/proc/tty/ldisc" {
			private++
			if f[2] != "ramfs" || options[0] != "rw" {
				t.Errorf("the private place: %s", line)
			}
		} else if options[0] != "ro" {
			t.Errorf("can be written to: %s", line)
		}
	}
	if private != 1 {
		t.Errorf("%d private places", private)
	}
	if os.Geteuid() == 0 {
		if err := os.WriteFile(filepath.Join(root, e.Path, "x"), nil, 0o600); err == nil {
			t.Error("a file could be made")
		}
	}
}

func TestEdit_DiskFull(t *testing.T) {
	rig.Root(t)
	content := make([]byte, 60<<10)
	rand.NewChaCha8([32]byte{}).Read(content)
	d := rig.NewDir(t, content)
	if err := syscall.Mount("none", d.Conf, "tmpfs", 0, "size=100k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(d.Conf, 0) })
	was, _ := os.ReadFile(d.Enc)
	enc := filepath.Join(d.Conf, "data.enc")
	if err := os.WriteFile(enc, was, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(rig.Binary(t), "edit", enc, "--passphrase-file", d.Pass)
	cmd.Env = append(os.Environ(), "VISUAL=", `EDITOR=sh -c 'echo more >>"$1"' x`)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	got := rig.Exec(t, cmd)
	if got.Code != 1 || !strings.Contains(got.Err, "no space left on device") {
		t.Errorf("%+v", got)
	}
	if now, _ := os.ReadFile(enc); !bytes.Equal(now, was) {
		t.Error("the encrypted file was changed")
	}
	if list, _ := os.ReadDir(d.Conf); len(list) != 1 {
		t.Errorf("left behind: %v", list)
	}
}

// TestEdit_NoPrivatePlace: where no namespace can be had it says so before it asks
// for anything.
func TestEdit_NoPrivatePlace(t *testing.T) {
	if out, err := exec.Command("unshare", "-Ur", "sh", "-c", "echo 0 >/proc/sys/user/max_pid_namespaces").CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: no user namespace to be poor in: %v %s", err, out)
	}
	d := rig.NewDir(t, []byte("password: hunter2\n"))
	cmd := exec.Command("unshare", "-Ur", "sh", "-c", `echo 0 >/proc/sys/user/max_pid_namespaces && exec "$@"`, "sh",
		rig.Binary(t), "edit", d.Enc, "--passphrase-file", d.Pass)
	cmd.Env = append(os.Environ(), "VISUAL=", "EDITOR=true")
	if got := rig.Exec(t, cmd); got.Code != 53 || !strings.Contains(got.Err, "oncefs: error: there can be no private place") {
		t.Errorf("%+v", got)
	}
}
