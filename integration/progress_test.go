package integration

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"oncefs/integration/rig"
)

// watched starts a command with its standard error on a terminal of 80 columns.
func watched(t *testing.T, cmd *exec.Cmd) *terminal {
	t.Helper()
	stdout := cmd.Stdout
	tt := &terminal{t: t, cmd: cmd}
	ours, theirs := openTerminal(t)
	defer theirs.Close()
	if err := unix.IoctlSetWinsize(int(ours.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80}); err != nil {
		t.Fatal(err)
	}
	tt.ours = ours
	cmd.Stdout, cmd.Stderr = stdout, theirs
	cmd.Env = append(os.Environ(), "TERM=xterm")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 2}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	go tt.collect()
	return tt
}

// erased tells whether what was shown last was taken off the terminal again: from
// the cursor's line on (CSI J) with nothing after it.
func (tt *terminal) erased() {
	tt.t.Helper()
	defer func() {
		if tt.t.Failed() {
			tt.t.Logf("on the terminal: %q", tt.text)
		}
	}()
	rig.WaitFor(tt.t, "an empty line", func() bool {
		tt.mu.Lock()
		defer tt.mu.Unlock()
		return strings.HasSuffix(tt.text, "\x1b[J")
	})
}

// Long work shows how far it is, on the terminal and nowhere else, and leaves
// nothing there.
func TestProgressOfEncrypt(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	for _, output := range []string{"new.enc", "-"} {
		var out bytes.Buffer
		cmd := exec.Command(rig.Binary(t), "encrypt", "-", "-o", output, "--passphrase-file", d.Pass)
		cmd.Dir, cmd.Stdout = d.Path, &out
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		tt := watched(t, cmd)
		plain := strings.Repeat("sixteen bytes..\n", 64)
		io.WriteString(in, plain)
		tt.expect("encrypting - ") // and it waits for more
		tt.expect("1KiB, 1s")      // no byte comes, and the line goes on
		in.Close()
		if code := tt.wait(); code != 0 {
			t.Errorf("%s: exit %d", output, code)
		}
		tt.erased()
		if tt.count("sixteen") != 0 {
			t.Errorf("%s: it shows content: %q", output, tt.text)
		}
		if output == "-" {
			d.Write("new.enc", out.Bytes())
		} else if out.Len() > 0 {
			t.Errorf("%s: on standard output: %q", output, out.Bytes())
		}
		if got := rig.Run(t, "decrypt", filepath.Join(d.Path, "new.enc"), "--passphrase-file", d.Pass); got.Out != plain {
			t.Errorf("%s: %+v", output, got)
		}
	}
}

func TestProgressOfDecrypt(t *testing.T) {
	rig.Root(t) // who may see how far the child has read, to stop it there
	plain := bytes.Repeat([]byte("sixteen bytes..\n"), 1<<20)
	d := rig.NewDir(t, plain)
	for name, args := range map[string][]string{
		"decrypt": {"decrypt", d.Enc},
		"check":   {"check", d.Enc},
		"rekey":   {"rekey", d.Enc, "--same-passphrase"},
		"mount":   {"mount", d.Conf, "--enc", d.Enc, "--keep-passphrase", "--log", filepath.Join(d.Path, "log")},
	} {
		t.Run(name, func(t *testing.T) {
			for stopped := false; !stopped; {
				var out bytes.Buffer
				cmd := exec.Command(rig.Binary(t), append(args, "--passphrase-file", d.Pass)...)
				cmd.Stdout = &out
				tt := watched(t, cmd)
				ended := make(chan struct{})
				go func() { cmd.Wait(); close(ended) }()
				// The child is stopped when it has read something, for as long as it
				// takes to be long work.
				child := 0
				rig.WaitFor(t, "a child that reads", func() bool {
					select {
					case <-ended:
						return true
					default:
					}
					// The one that reads its passphrase from a file, not the one that
					// only looks what the message is.
					if child = rig.Child(cmd.Process.Pid, "file"); child == 0 {
						return name == "mount" && rig.Mounted(t, d.Conf)
					}
					syscall.Kill(child, syscall.SIGSTOP)
					if pos(child) > 0 {
						return true
					}
					syscall.Kill(child, syscall.SIGCONT)
					return false
				})
				if child != 0 {
					stopped = true
					// rekey decrypts again, for comparison: it may be that child.
					tt.expect("ing secrets.yaml.enc [")
					tt.expect("% of ")
					syscall.Kill(child, syscall.SIGCONT)
				}
				if name == "mount" {
					rig.WaitFor(t, "the mount", func() bool { return rig.Run(t, "status", d.Conf).Code == 0 })
					cmd.Process.Signal(syscall.SIGTERM)
				}
				<-ended
				tt.erased()
				if tt.count("sixteen") != 0 || strings.ContainsAny(out.String(), "\x1b\r") || name == "decrypt" && !bytes.Equal(out.Bytes(), plain) {
					t.Errorf("terminal %q, %d bytes of output", tt.text, out.Len())
				}
			}
		})
	}
}

// pos is how far a process has read its first encrypted file.
func pos(pid int) int {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/fdinfo/5")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if value, found := strings.CutPrefix(line, "pos:"); found {
			n, _ := strconv.Atoi(strings.TrimSpace(value))
			return n
		}
	}
	return 0
}
