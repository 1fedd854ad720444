package integration

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"oncefs/integration/rig"
)

// mountWith is the command that mounts with another passphrase file.
func mountWith(t testing.TB, d *rig.Dir, pass string, args ...string) *exec.Cmd {
	t.Helper()
	return exec.Command(rig.Binary(t), append([]string{"mount", d.Conf, "--enc", d.Enc, "--passphrase-file", pass}, args...)...)
}

// says checks that a refusal names what it should.
func says(t testing.TB, r rig.Result, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(r.Err, w) {
			t.Errorf("it does not say %q:\n%s", w, r.Err)
		}
	}
}

// A passphrase file that could not be removed: told before anything is mounted,
// and with --keep-passphrase it serves all the same, and stays.
func cannotGo(t *testing.T, d *rig.Dir, pass string, words ...string) {
	t.Helper()
	r := refusedCommand(t, d, 32, mountWith(t, d, pass))
	says(t, r, append(words, "--keep-passphrase")...)
	whole(t, pass)
	m := rig.Start(t, mountWith(t, d, pass, "--keep-passphrase"), d.Conf)
	m.WaitReady()
	if got := rig.Cat(t, d.Secret()); got.Out != content {
		t.Errorf("with --keep-passphrase: %+v", got)
	}
	m.Stop()
	whole(t, pass)
}

func whole(t testing.TB, path string) {
	t.Helper()
	if b, err := os.ReadFile(path); err != nil || string(b) != rig.Passphrase+"\n" {
		t.Errorf("%s holds %d bytes, %v", path, len(b), err)
	}
}

// filesystem mounts one for the test, as root.
func filesystem(t *testing.T, d *rig.Dir, args ...string) (dir string) {
	t.Helper()
	rig.Root(t)
	dir = filepath.Join(d.Path, "volume")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", append(args, dir)...).CombinedOutput(); err != nil {
		t.Fatalf("mount %v: %v\n%s", args, err, out)
	}
	t.Cleanup(func() { syscall.Unmount(dir, 2 /* MNT_DETACH */) })
	if err := os.WriteFile(filepath.Join(dir, "pw"), []byte(rig.Passphrase+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestC14_ReadOnlyFilesystem(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	dir := filesystem(t, d, "-t", "tmpfs", "none")
	if out, err := exec.Command("mount", "-o", "remount,ro", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	r := refusedCommand(t, d, 32, mountWith(t, d, filepath.Join(dir, "pw")))
	says(t, r, "memory emptyDir", "--keep-passphrase")
	whole(t, filepath.Join(dir, "pw"))
}

func TestC14_Immutable(t *testing.T) {
	rig.Root(t)
	rig.Need(t, "chattr", "e2fsprogs")
	d := rig.NewDir(t, []byte(content))
	// tmpfs and overlays may have no such attribute; ext4 has.
	image := d.Write("image", nil)
	if err := os.Truncate(image, 4<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	pass := immutable(t, d, image)
	r := refusedCommand(t, d, 32, mountWith(t, d, pass))
	says(t, r, "chattr -i")
	whole(t, pass)
}

// immutable makes an immutable passphrase file: on an ext4 of its own, or, where
// there are no loop devices, on the filesystem of the tests.
func immutable(t *testing.T, d *rig.Dir, image string) string {
	t.Helper()
	dir := filepath.Join(d.Path, "volume")
	os.Mkdir(dir, 0o755)
	if out, err := exec.Command("mount", "-o", "loop", image, dir).CombinedOutput(); err != nil {
		t.Logf("no loop device (%v: %s); trying without", err, out)
	} else {
		t.Cleanup(func() { syscall.Unmount(dir, 0) })
	}
	pass := filepath.Join(dir, "pw")
	if err := os.WriteFile(pass, []byte(rig.Passphrase+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("chattr", "+i", pass).CombinedOutput(); err != nil {
		t.Fatalf("chattr: %v\n%s", err, out)
	}
	t.Cleanup(func() { exec.Command("chattr", "-i", pass).Run() })
	return pass
}

func TestC14_DirectoryNotWritable(t *testing.T) {
	if os.Geteuid() == 0 {
		// Root writes everywhere; without CAP_DAC_OVERRIDE it does not.
		d := rig.NewDir(t, []byte(content))
		pass := inClosedDirectory(t, d)
		os.Chown(filepath.Dir(pass), 65534, 65534)
		cmd := mountWith(t, d, pass)
		cmd = exec.Command("setpriv", append([]string{"--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-dac_override,-dac_read_search"}, cmd.Args...)...)
		says(t, refusedCommand(t, d, 32, cmd), "permission denied", "make its directory writable")
		whole(t, pass)
		return
	}
	d := rig.NewDir(t, []byte(content))
	cannotGo(t, d, inClosedDirectory(t, d), "permission denied", "make its directory writable")
}

func inClosedDirectory(t testing.TB, d *rig.Dir) (pass string) {
	t.Helper()
	dir := filepath.Join(d.Path, "closed")
	os.Mkdir(dir, 0o755)
	pass = d.Write("closed/pw", []byte(rig.Passphrase+"\n"))
	os.Chmod(dir, 0o555)
	t.Cleanup(func() { os.Chmod(dir, 0o755) })
	return pass
}

func TestC14_SymbolicLink(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	link := filepath.Join(d.Path, "link")
	os.Symlink("pw", link)
	cannotGo(t, d, link, "symbolic link", "name the file itself")
	whole(t, d.Pass)
}

func TestC14_HardLink(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	os.Link(d.Pass, d.Pass+".other")
	cannotGo(t, d, d.Pass, "another name", "remove the other name")
	whole(t, d.Pass+".other")
}

// Between the start, which opens the passphrase file, and the end of the
// decryption, after which it is removed, the test has its turn: the second half
// of the message comes when it is done.
func changedMeanwhile(t *testing.T, code int, change func(d *rig.Dir), words ...string) *rig.Dir {
	t.Helper()
	d := rig.NewDir(t, []byte(content))
	message, err := os.ReadFile(d.Enc)
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(d.Enc)
	if err := syscall.Mkfifo(d.Enc, 0o600); err != nil {
		t.Fatal(err)
	}
	m := d.Start()
	fifo, err := os.OpenFile(d.Enc, os.O_WRONLY, 0) // waits for its reader
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fifo.Write(message[:len(message)/2]); err != nil {
		t.Fatal(err)
	}
	rig.WaitFor(t, "the decrypting child", func() bool {
		return rig.Child(m.Cmd.Process.Pid, "internal-decryptor") != 0
	})
	change(d)
	if _, err := fifo.Write(message[len(message)/2:]); err != nil {
		t.Fatal(err)
	}
	fifo.Close()
	end := m.Wait()
	if end.Code != code || strings.Contains(end.Out, "ready") {
		t.Fatalf("end: %+v", end)
	}
	says(t, end, append(words, "hint: ")...)
	if rig.Mounted(t, d.Conf) {
		t.Error("mounted")
	}
	if strings.Contains(end.Err, rig.Passphrase) {
		t.Error("it says the passphrase")
	}
	return d
}

func TestC14_ReplacedMeanwhile(t *testing.T) {
	d := changedMeanwhile(t, 32, func(d *rig.Dir) {
		os.Rename(d.Pass, d.Pass+".aside")
		d.Write("pw", []byte("somebody else's\n"))
	}, "replaced by another file")
	if b, _ := os.ReadFile(d.Pass); string(b) != "somebody else's\n" {
		t.Errorf("the new file holds %d bytes", len(b))
	}
	whole(t, d.Pass+".aside")
}

func TestC14_LinkedMeanwhile(t *testing.T) {
	d := changedMeanwhile(t, 32, func(d *rig.Dir) { os.Link(d.Pass, d.Pass+".other") }, "another name")
	whole(t, d.Pass)
	whole(t, d.Pass+".other")
}

// Somebody else took it away: nobody can say that it is gone for good.
func TestC14_TakenAwayMeanwhile(t *testing.T) {
	d := changedMeanwhile(t, 32, func(d *rig.Dir) { os.Rename(d.Pass, d.Pass+".aside") }, "no such file")
	whole(t, d.Pass+".aside")
}

// The daemon may remove what it may not read as another user, and the reverse.
func TestC14_OfAnotherUser(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	if os.Geteuid() == 0 {
		os.Chown(d.Pass, 65534, 65534)
		m := d.MountOver()
		if _, err := os.Lstat(d.Pass); !os.IsNotExist(err) {
			t.Error("the passphrase file is there", err)
		}
		m.Stop()
		return
	}
	says(t, refusedCommand(t, d, 30, mountWith(t, d, "/etc/shadow")), "permission denied", "owner and mode")
}

func TestC14_ExposedIsTold(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	os.Chmod(d.Pass, 0o644)
	m := d.MountOver()
	if e := m.WaitEvent("passphrase-file-exposed", 1); e["path"] != d.Pass || e["level"] != "WARN" {
		t.Errorf("%v", e)
	}
	m.Stop()
	d.WritePass()
	m = d.MountOver()
	if len(m.Events("passphrase-file-exposed")) != 0 {
		t.Error("told of a file that is not exposed")
	}
}

// A FIFO and a descriptor have nothing to remove, and nothing is.
func TestC14_PipesAreLeft(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	fifo := filepath.Join(d.Path, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	m := rig.Start(t, mountWith(t, d, fifo), d.Conf)
	w, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(w, "%s\n", rig.Passphrase)
	w.Close()
	m.WaitReady()
	if info, err := os.Lstat(fifo); err != nil || info.Mode()&os.ModeNamedPipe == 0 {
		t.Error("the FIFO:", err)
	}
	m.Stop()

	cmd := mountWith(t, d, "/dev/fd/3")
	f, err := os.Open(d.Pass)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd.ExtraFiles = []*os.File{f}
	m = rig.Start(t, cmd, d.Conf)
	m.WaitReady()
	if got := rig.Cat(t, d.Secret()); got.Out != content {
		t.Errorf("%+v", got)
	}
	m.Stop()
	whole(t, d.Pass)
	refusedCommand(t, d, 30, mountWith(t, d, "/dev/fd/77"))
}

// What is a passphrase's line is what gpg takes for one.
func TestC14_AsGpgReadsIt(t *testing.T) {
	for name, c := range map[string]struct {
		file string
		code int
	}{
		"no newline":             {rig.Passphrase, 0},
		"more lines":             {rig.Passphrase + "\nanother\n", 0},
		"a carriage return":      {rig.Passphrase + "\r\n", 31}, // a part of it, as for gpg
		"a space at the end":     {rig.Passphrase + " \n", 31},
		"empty":                  {"", 30},
		"an empty line":          {"\n", 30},
		"an empty line first":    {"\n" + rig.Passphrase + "\n", 30},
		"long and wrong":         {strings.Repeat("a", 4096) + "\n", 31},
		"longer than gpg's line": {strings.Repeat("a", 5000) + "\n", 30},
	} {
		t.Run(name, func(t *testing.T) {
			d := rig.NewDir(t, []byte(content))
			d.Write("pw", []byte(c.file))
			if c.code != 0 {
				refused(t, d, c.code)
				return
			}
			d.MountOver()
			if _, err := os.Lstat(d.Pass); !os.IsNotExist(err) {
				t.Error("the passphrase file is there", err)
			}
		})
	}
	// With the carriage return gpg encrypted, with it it is opened.
	d := rig.NewDir(t, []byte(content))
	d.Write("secrets.yaml.enc", rig.GPG(t, []byte(content), rig.Passphrase+"\r", "--symmetric", "--s2k-count", "65536"))
	refused(t, d, 31)
	d.Write("pw", []byte(rig.Passphrase+"\r\n"))
	d.MountOver()
	if got := rig.Cat(t, d.Secret()); got.Out != content {
		t.Errorf("%+v", got)
	}
}

// The removed file's bytes are overwritten: whoever had it open finds nothing.
func TestC14_OverwrittenBeforeReady(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	open, err := os.Open(d.Pass)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	d.MountOver()
	if b, err := io.ReadAll(open); err != nil || len(b) != 0 {
		t.Errorf("%d bytes are left, %v", len(b), err)
	}
}
