package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"oncefs/integration/rig"
)

// What install makes is a whole program with its mount helper: it mounts with
// nothing else in PATH and nowhere to write to.
func TestInstall(t *testing.T) {
	rig.Root(t)
	d := rig.NewDir(t, []byte(content))
	dir := filepath.Join(d.Path, "bin")
	if r := rig.Run(t, "install", dir); r.Code == 0 {
		t.Errorf("into a directory that does not exist: %+v", r)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time over the first
		if r := rig.Run(t, "install", dir); r.Code != 0 {
			t.Fatalf("%+v", r)
		}
	}
	if to, err := os.Readlink(filepath.Join(dir, "fusermount3")); to != "oncefs" {
		t.Errorf("fusermount3 leads to %q, %v", to, err)
	}
	want := 2
	if _, err := os.Stat(filepath.Join(filepath.Dir(rig.Binary(t)), "oncefs-metrics")); err == nil {
		want++ // it lies beside oncefs here, and so it does there
	}
	if entries, _ := os.ReadDir(dir); len(entries) != want {
		t.Errorf("in the directory, which is to have %d: %v", want, entries)
	}
	cmd := exec.Command(filepath.Join(dir, "oncefs"), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass)
	cmd.Env = []string{"PATH=/nowhere", "TMPDIR=/nowhere"}
	m := rig.Start(t, cmd, d.Conf)
	m.WaitReady()
	if r := rig.Cat(t, d.Secret()); r.Out != content {
		t.Errorf("%+v", r)
	}
}

// A Secret is a link into a volume that cannot be written to; its copy is a file
// that can be removed.
func TestC14_CopyOfASecret(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	volume := filepath.Join(d.Path, "volume")
	if err := os.MkdirAll(filepath.Join(volume, "..data"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(d.Pass, filepath.Join(volume, "..data", "pw")); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(volume, "pw")
	if err := os.Symlink(filepath.Join("..data", "pw"), secret); err != nil {
		t.Fatal(err)
	}
	if r := rig.Run(t, "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", secret); r.Code != 32 || !strings.Contains(r.Err, "hint:") {
		t.Errorf("a link as passphrase file: %+v", r)
	}
	for range 2 {
		if r := rig.Run(t, "copy", secret, d.Pass); r.Code != 0 {
			t.Fatalf("%+v", r)
		}
	}
	info, err := os.Lstat(d.Pass)
	if err != nil || info.Mode() != 0o600 || info.Size() != int64(len(rig.Passphrase)+1) {
		t.Errorf("%v %v", info, err)
	}
	d.MountOver()
	if _, err := os.Lstat(d.Pass); !os.IsNotExist(err) {
		t.Errorf("the copy is there: %v", err)
	}
	if r := rig.Run(t, "copy", d.Conf, d.Pass); r.Code == 0 {
		t.Errorf("copied a directory: %+v", r)
	}
	if _, err := os.Lstat(d.Pass); !os.IsNotExist(err) {
		t.Errorf("something was left behind: %v", err)
	}
}

// What a container finds that is started again after a SIGKILL: a dead mount,
// and no passphrase. It takes the mount off, says what is lost, and ends.
func TestC16_StartedAgainWithoutPassphrase(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	if err := os.Remove(d.Conf); err != nil {
		t.Fatal(err)
	}
	m := d.MountOver("--mkdir")
	m.Signal(syscall.SIGKILL)
	m.Wait()
	if _, err := os.Stat(d.Conf); err == nil {
		t.Error("the mount of a killed process answers")
	}
	m = d.Start("--mkdir")
	if r := m.Wait(); r.Code != 30 || !strings.Contains(r.Err, "the secret is lost") || !strings.Contains(r.Err, "hint:") {
		t.Errorf("%+v", r)
	}
	m.WaitEvent("dead-mount-removed", 1)
	if entries, err := os.ReadDir(d.Conf); err != nil || len(entries) != 0 {
		t.Errorf("%v %v", entries, err)
	}
}
