package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"oncefs/integration/rig"
)

// Stopped while it writes plaintext, decrypt leaves none of it, under no name.
// strace holds each write up, so that the signal comes in time.
func TestC23_DecryptStopped(t *testing.T) {
	strace := rig.Need(t, "strace", "strace")
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			d := rig.NewDir(t, []byte(content))
			out := filepath.Join(d.Path, "out.yaml")
			cmd := exec.Command(strace, "-f", "-qq", "-o", filepath.Join(d.Path, "trace"), "-e", "trace=write", "-e", "inject=write:delay_enter=300000",
				rig.Binary(t), "decrypt", d.Enc, "-o", out, "--passphrase-file", d.Pass)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var program int
			rig.WaitFor(t, "the temporary file", func() bool {
				program = rig.Child(cmd.Process.Pid, "decrypt")
				names, _ := filepath.Glob(filepath.Join(d.Path, ".out.yaml*"))
				return len(names) > 0
			})
			syscall.Kill(program, sig)
			cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != 60 {
				t.Errorf("ended with %v", cmd.ProcessState)
			}
			names, _ := os.ReadDir(d.Path)
			for _, e := range names {
				switch e.Name() {
				case "pw", "secrets.yaml.enc", "config", "trace":
				default:
					t.Errorf("left %s", e.Name())
				}
			}
		})
	}
}
