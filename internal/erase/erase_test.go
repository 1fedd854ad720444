package erase

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

func write(t *testing.T, path string, mode fs.FileMode) string {
	t.Helper()
	if err := os.WriteFile(path, []byte("passphrase\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func root(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root")
	}
}

// unchanged checks that a refused file is as it was.
func unchanged(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil || string(b) != "passphrase\n" {
		t.Fatalf("%s: %q, %v", path, b, err)
	}
}

func TestC14_OverwrittenAndGone(t *testing.T) {
	for _, mode := range []fs.FileMode{0o600, 0o400, 0o444} {
		path := write(t, filepath.Join(t.TempDir(), "pw"), mode)
		other, err := os.Open(path) // sees the content, not the name
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		p, err := Open(path, true)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if p.Exposed != (mode&0o077 != 0) || p.Removable() != path {
			t.Errorf("%o: exposed %v, removes %q", mode, p.Exposed, p.Removable())
		}
		if info, _ := os.Stat(path); info.Mode() != mode {
			t.Errorf("mode %o became %o", mode, info.Mode())
		}
		unchanged(t, path)
		// What the overwriting leaves is seen before the cut to nothing.
		if err := p.unlink(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if err := p.overwrite(); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		n, _ := other.ReadAt(b, 0)
		if bytes.Contains(b[:n], []byte("pass")) {
			t.Fatalf("still there: %q", b[:n])
		}
	}
}

func TestC14_Refused(t *testing.T) {
	refused := func(t *testing.T, path string, want error) {
		t.Helper()
		p, err := Open(path, true)
		var re *RemoveError
		if !errors.Is(err, want) || !errors.As(err, &re) || re.Path != path {
			t.Fatalf("got %v, want %v", err, want)
		}
		if p != nil {
			t.Fatal("a file came with the error")
		}
		// Without removal it can be used.
		if p, err := Open(path, false); err != nil || p.Removable() != "" {
			t.Fatal(err)
		} else {
			p.Close()
		}
	}
	t.Run("symlink", func(t *testing.T) {
		dir := t.TempDir()
		path := write(t, filepath.Join(dir, "pw"), 0o600)
		link := filepath.Join(dir, "link")
		os.Symlink("pw", link)
		refused(t, link, ErrSymlink)
		unchanged(t, path)
	})
	t.Run("hard link", func(t *testing.T) {
		path := write(t, filepath.Join(t.TempDir(), "pw"), 0o600)
		os.Link(path, path+"2")
		refused(t, path, ErrHardLink)
		unchanged(t, path)
	})
	t.Run("immutable", func(t *testing.T) {
		root(t)
		path := write(t, filepath.Join(t.TempDir(), "pw"), 0o600)
		if out, err := exec.Command("chattr", "+i", path).CombinedOutput(); err != nil {
			t.Skipf("SKIPPED: this filesystem has no immutable files: %s", out)
		}
		defer exec.Command("chattr", "-i", path).Run()
		refused(t, path, unix.EPERM)
		unchanged(t, path)
	})
	t.Run("read-only filesystem", func(t *testing.T) {
		root(t)
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Skipf("SKIPPED: cannot mount: %v", err)
		}
		defer unix.Unmount(dir, unix.MNT_DETACH)
		path := write(t, filepath.Join(dir, "pw"), 0o600)
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		refused(t, path, unix.EROFS)
		unchanged(t, path)
	})
	t.Run("directory", func(t *testing.T) {
		if _, err := Open(t.TempDir(), true); !errors.Is(err, ErrNoRegular) {
			t.Fatal(err)
		}
	})
	t.Run("missing", func(t *testing.T) {
		if _, err := Open(filepath.Join(t.TempDir(), "no"), true); !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	})
}

func TestC14_ReplacedBeforeRemoval(t *testing.T) {
	path := write(t, filepath.Join(t.TempDir(), "pw"), 0o600)
	p, err := Open(path, true)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	os.Remove(path)
	if err := os.WriteFile(path, []byte("somebody else's\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.Remove(); !errors.Is(err, ErrReplaced) {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(path); string(b) != "somebody else's\n" {
		t.Fatalf("the new file is %q", b)
	}
}

func TestC14_LinkedBeforeRemoval(t *testing.T) {
	path := write(t, filepath.Join(t.TempDir(), "pw"), 0o600)
	p, err := Open(path, true)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	os.Link(path, path+"2")
	if err := p.Remove(); !errors.Is(err, ErrHardLink) {
		t.Fatal(err)
	}
	unchanged(t, path)
}

func TestC14_NothingToRemove(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	// Held open for writing, so that opening it does not wait for a writer.
	keep, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer keep.Close()
	path := write(t, filepath.Join(dir, "pw"), 0o600)
	fd, err := unix.Open(path, unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{fifo, "/dev/fd/" + strconv.Itoa(fd)} {
		p, err := Open(name, true)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Remove(); err != nil || p.Removable() != "" {
			t.Fatal(name, err)
		}
		p.Close()
	}
	unchanged(t, path)
	if _, err := os.Lstat(fifo); err != nil {
		t.Fatal(err)
	}
	if _, err := Open("/dev/fd/999999", true); !errors.Is(err, unix.EBADF) {
		t.Fatal(err)
	}
	if _, err := Open("/dev/fd/x", true); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
}
