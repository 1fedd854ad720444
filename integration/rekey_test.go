package integration

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"oncefs/integration/rig"
)

// TestRekeyStopped: whatever ends it while it writes, the file is the old one or
// the new one, whole; and unless it was killed nothing is beside it.
func TestRekeyStopped(t *testing.T) {
	content := bytes.Repeat([]byte("sixteen bytes..\n"), 4<<16)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			d := rig.NewDir(t, content)
			old, err := os.ReadFile(d.Enc)
			if err != nil {
				t.Fatal(err)
			}
			fresh := d.Write("new", []byte("another passphrase\n"))
			for stopped := false; !stopped; {
				d.Write(filepath.Base(d.Enc), old)
				var stderr bytes.Buffer
				cmd := exec.Command(rig.Binary(t), "rekey", d.Enc, "--passphrase-file", d.Pass, "--new-passphrase-file", fresh)
				cmd.Stderr = &stderr
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				ended := make(chan struct{})
				go func() { cmd.Wait(); close(ended) }()
				beside := func() []string {
					names, _ := filepath.Glob(filepath.Join(d.Path, ".secrets.yaml.enc*"))
					return names
				}
				rig.WaitFor(t, "the temporary file", func() bool {
					select {
					case <-ended:
						return true
					default:
						return len(beside()) > 0
					}
				})
				cmd.Process.Signal(sig)
				<-ended
				now, err := os.ReadFile(d.Enc)
				if err != nil {
					t.Fatal(err)
				}
				if cmd.ProcessState.Success() { // it was faster: once more
					if got := rig.Run(t, "decrypt", d.Enc, "--passphrase-file", fresh); got.Out != string(content) {
						t.Fatalf("rekeyed, it does not open: %s", got.Err)
					}
					continue
				}
				stopped = true
				if !bytes.Equal(now, old) {
					if got := rig.Run(t, "decrypt", d.Enc, "--passphrase-file", fresh); sig != syscall.SIGKILL || got.Out != string(content) {
						t.Errorf("%v: the file is another: %s", cmd.ProcessState, got.Err)
					}
				}
				if sig == syscall.SIGKILL {
					if cmd.ProcessState.ExitCode() != -1 {
						t.Errorf("not killed: %v, %s", cmd.ProcessState, stderr.String())
					}
					continue
				}
				if code := cmd.ProcessState.ExitCode(); code != 60 {
					t.Errorf("ended with %d: %s", code, stderr.String())
				}
				if left := beside(); len(left) > 0 {
					t.Errorf("left %v", left)
				}
			}
		})
	}
}
