package integration

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"oncefs/integration/rig"
)

// TestEncryptStopped: a signal leaves nothing beside the output, which is as it
// was, also while who writes to it says nothing.
func TestEncryptStopped(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			d := rig.NewDir(t, []byte(content))
			var stderr bytes.Buffer
			cmd := exec.Command(rig.Binary(t), "encrypt", "-", "-o", d.Enc, "--passphrase-file", d.Pass)
			cmd.Stderr = &stderr
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			was := snapshot(t, d)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			rig.WaitFor(t, "the temporary file", func() bool {
				names, _ := filepath.Glob(filepath.Join(d.Path, ".secrets.yaml.enc*"))
				return len(names) > 0
			})
			in.Write([]byte(content))
			cmd.Process.Signal(sig)
			cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != 60 || !bytes.Contains(stderr.Bytes(), []byte("oncefs: error: encrypt - to ")) {
				t.Errorf("exit %d: %s", code, stderr.Bytes())
			}
			is := snapshot(t, d)
			for path := range is {
				if was[path] != is[path] {
					t.Errorf("%s was %q and is %q", path, was[path], is[path])
				}
			}
		})
	}
}
