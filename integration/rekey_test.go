package integration

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

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

// The file that takes the old one's place may be read by whom that one could be, and
// by nobody else.
func TestRekeyKeepsAttributes(t *testing.T) {
	// acl(5), as the kernel has it: version 2, then tag, permissions and id of each:
	// the owner, user 4242, the group, the mask, others.
	entry := func(tag, perm uint16, id uint32) []byte {
		b := binary.LittleEndian.AppendUint16(nil, tag)
		b = binary.LittleEndian.AppendUint16(b, perm)
		return binary.LittleEndian.AppendUint32(b, id)
	}
	acl := slices.Concat([]byte{2, 0, 0, 0}, entry(1, 6, math.MaxUint32), entry(2, 4, 4242), entry(4, 0, math.MaxUint32), entry(0x10, 4, math.MaxUint32), entry(0x20, 0, math.MaxUint32))
	const aclAttr, aclDefault = "system.posix_acl_access", "system.posix_acl_default"
	get := func(path, name string) string {
		value := make([]byte, 1000)
		n, err := unix.Getxattr(path, name, value)
		if err != nil {
			return err.Error()
		}
		return string(value[:n])
	}
	d := rig.NewDir(t, []byte(content))
	if err := errors.Join(unix.Setxattr(d.Enc, aclAttr, acl, 0), unix.Setxattr(d.Enc, "user.note", []byte("mine"), 0)); err != nil {
		t.Fatalf("the filesystem of %s: %v", d.Path, err)
	}
	rekey := []string{"rekey", d.Enc, "--passphrase-file", d.Pass, "--same-passphrase"}
	if r := rig.Run(t, rekey...); r.Code != 0 || r.Err != "" {
		t.Fatalf("%+v", r)
	}
	info, err := os.Stat(d.Enc)
	if err != nil || info.Mode() != 0o640 || get(d.Enc, aclAttr) != string(acl) || get(d.Enc, "user.note") != "mine" {
		t.Errorf("%v, %v, %q, %q", info.Mode(), err, get(d.Enc, aclAttr), get(d.Enc, "user.note"))
	}
	// What the directory gives to every new file is not the old one's.
	unix.Removexattr(d.Enc, aclAttr)
	os.Chmod(d.Enc, 0o600)
	if err := unix.Setxattr(d.Path, aclDefault, acl, 0); err != nil {
		t.Fatal(err)
	}
	if r := rig.Run(t, rekey...); r.Code != 0 || r.Err != "" {
		t.Fatalf("%+v", r)
	}
	if info, err := os.Stat(d.Enc); err != nil || info.Mode() != 0o600 || get(d.Enc, aclAttr) != unix.ENODATA.Error() {
		t.Errorf("%v, %v, %q", info.Mode(), err, get(d.Enc, aclAttr))
	}
}
