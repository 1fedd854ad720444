package integration

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"oncefs/integration/rig"
)

// before is all that a start could change: the directory's files, with their
// content and modes.
func snapshot(t testing.TB, d *rig.Dir) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(d.Path, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		all[path] = info.Mode().String()
		if info.Mode().IsRegular() {
			b, err := os.ReadFile(path)
			if err != nil && os.Geteuid() == 0 {
				return err
			}
			all[path] += " " + sum(b)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// refused shows that a start fails with that status, says what to do, and leaves
// everything as it was: no mount, no process, every file whole.
func refused(t testing.TB, d *rig.Dir, code int, args ...string) rig.Result {
	t.Helper()
	return refusedCommand(t, d, code, exec.Command(rig.Binary(t), append([]string{"mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass}, args...)...))
}

func refusedCommand(t testing.TB, d *rig.Dir, code int, cmd *exec.Cmd) rig.Result {
	t.Helper()
	was, there := snapshot(t, d), rig.Leftovers()
	r := rig.Exec(t, cmd)
	if r.Code != code {
		t.Fatalf("%v: exit %d, want %d\n%s", cmd.Args[1:], r.Code, code, r.Err)
	}
	if !strings.Contains(r.Err, "oncefs: error: ") || code != 60 && !strings.Contains(r.Err, "oncefs: hint: ") {
		t.Errorf("no error or no hint:\n%s", r.Err)
	}
	for _, secret := range []string{rig.Passphrase, "hunter2"} {
		if strings.Contains(r.Err+r.Out, secret) {
			t.Errorf("a secret was said:\n%s", r.Err)
		}
	}
	if strings.Contains(r.Out, "ready") {
		t.Errorf("it said ready: %s", r.Out)
	}
	is := snapshot(t, d)
	for path, state := range was {
		if is[path] != state {
			t.Errorf("%s was %s and is %s", path, state, is[path])
		}
	}
	for path := range is {
		if _, ok := was[path]; !ok {
			t.Errorf("%s is new", path)
		}
	}
	for _, left := range rig.Leftovers() {
		if strings.Contains(left, d.Path) && !strings.HasPrefix(left, d.Path) && !slices.Contains(there, left) {
			t.Errorf("left behind: %s", left)
		}
	}
	return r
}

func TestC14_WrongPassphrase(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	d.Write("pw", []byte("something else\n"))
	refused(t, d, 31)
	d.Write("pw", []byte("\n"+rig.Passphrase+"\n"))
	refused(t, d, 30) // the first line counts, and it is empty
	d.Write("pw", nil)
	refused(t, d, 30)
	os.Remove(d.Pass)
	refused(t, d, 30)
}

// Cut short anywhere, the message is refused and nothing is different.
func TestC23_Truncated(t *testing.T) {
	for _, armor := range []string{"--no-armor", "--armor"} {
		whole := rig.GPG(t, bytesOf(3000), rig.Passphrase, "--symmetric", "--s2k-count", "65536", armor)
		d := rig.NewDir(t, nil)
		step := max(1, len(whole)/25)
		for cut := 0; cut < len(whole)-5; cut += step {
			d.Write("secrets.yaml.enc", whole[:cut])
			code := rig.Run(t, "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass).Code
			if code < 31 || code > 42 {
				t.Errorf("%s cut at %d of %d: exit %d", armor, cut, len(whole), code)
			}
		}
		d.Write("secrets.yaml.enc", whole[:len(whole)-40])
		refused(t, d, 40)
	}
}

// Every single byte of a small message, changed, is refused. (The same with
// every bit, without a process for each, is in package crypto.)
func TestC23_Flipped(t *testing.T) {
	d := rig.NewDir(t, []byte("s"))
	whole, err := os.ReadFile(d.Enc)
	if err != nil {
		t.Fatal(err)
	}
	was := snapshot(t, d)
	for i := range whole {
		changed := bytes.Clone(whole)
		changed[i] ^= 0x10
		d.Write("secrets.yaml.enc", changed)
		r := rig.Run(t, "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass)
		if r.Code < 31 || r.Code > 42 {
			t.Errorf("byte %d of %d changed: exit %d\n%s", i, len(whole), r.Code, r.Err)
		}
	}
	d.Write("secrets.yaml.enc", whole)
	for path, state := range snapshot(t, d) {
		if was[path] != state {
			t.Errorf("%s was %s and is %s", path, was[path], state)
		}
	}
	d.MountOver()
}

func TestC22_NotToBeRead(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	whole, err := os.ReadFile(d.Enc)
	if err != nil {
		t.Fatal(err)
	}
	put := func(b []byte) { d.Write("secrets.yaml.enc", b) }
	put([]byte("user: app\npassword: hunter2\n"))
	refused(t, d, 41)
	put(nil)
	refused(t, d, 41)
	put(bytesOf(1000))
	if code := rig.Run(t, "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass).Code; code < 40 || code > 42 {
		t.Errorf("noise: exit %d", code)
	}
	put(append(bytes.Clone(whole), "more"...))
	refused(t, d, 40)
	put(append(bytes.Clone(whole), whole...))
	refused(t, d, 40)
	put(rig.GPG(t, []byte(content), rig.Passphrase, "--symmetric", "--s2k-count", "65536", "--rfc2440", "--cipher-algo", "AES", "--disable-mdc"))
	if r := rig.Run(t, "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass); r.Code != 40 && r.Code != 0 {
		t.Errorf("--disable-mdc: exit %d", r.Code)
	}
	put(rig.GPG(t, []byte(content), rig.Passphrase, "--store"))
	refused(t, d, 41)
	put(forPublicKey(t))
	if r := refused(t, d, 42); !strings.Contains(r.Err, "public key") {
		t.Errorf("it does not say public key: %s", r.Err)
	}
}

// forPublicKey encrypts to a key that is made for it.
func forPublicKey(t testing.TB) []byte {
	t.Helper()
	home, err := os.MkdirTemp("", "gpg-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(home)
	gpg := func(args ...string) []byte {
		cmd := exec.Command("gpg", append([]string{"--homedir", home, "--batch", "--quiet", "--trust-model", "always"}, args...)...)
		cmd.Stdin = strings.NewReader(content)
		var errs bytes.Buffer
		cmd.Stderr = &errs
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("gpg %v: %v\n%s", args, err, errs.Bytes())
		}
		return out
	}
	defer exec.Command("gpgconf", "--homedir", home, "--kill", "all").Run()
	gpg("--passphrase", "", "--quick-generate-key", "somebody@example.org", "future-default", "default", "never")
	return gpg("--encrypt", "--recipient", "somebody@example.org")
}

func TestC15_NoEncryptedFile(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	os.Remove(d.Enc)
	if r := refused(t, d, 20); !strings.Contains(r.Err, "oncefs encrypt") {
		t.Errorf("it does not say how to make one: %s", r.Err)
	}
}

func TestC18_TwoOfTheSameName(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	cmd := func() *exec.Cmd {
		c := exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", "secrets.yaml.enc", "--passphrase-file", d.Pass)
		c.Dir = d.Path
		return c
	}
	d.Write("config/secrets.yaml.enc", []byte("another"))
	r := refusedCommand(t, d, 21, cmd())
	for _, path := range []string{d.Enc, filepath.Join(d.Conf, "secrets.yaml.enc")} {
		if !strings.Contains(r.Err, path) {
			t.Errorf("it does not name %s: %s", path, r.Err)
		}
	}
	// The same twice is no question.
	b, _ := os.ReadFile(d.Enc)
	d.Write("config/secrets.yaml.enc", b)
	rig.Start(t, cmd(), d.Conf).WaitReady()
}

func TestC18_NameIsLookedUpAndServed(t *testing.T) {
	for enc, served := range map[string]string{"a.yaml.enc": "a.yaml", "b.json.gpg": "b.json", "c.pgp": "c", "d.tar.gz.asc": "d.tar.gz"} {
		d := rig.NewDir(t, []byte(content))
		b, _ := os.ReadFile(d.Enc)
		d.Write("config/"+enc, b) // only in the directory mounted over
		c := exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", enc, "--passphrase-file", d.Pass)
		c.Dir = d.Path
		m := rig.Start(t, c, d.Conf)
		m.WaitReady()
		if got := rig.Cat(t, filepath.Join(d.Conf, served)); got.Out != content {
			t.Errorf("%s: %+v", enc, got)
		}
		m.Stop()
	}
	d := rig.NewDir(t, []byte(content))
	d.MountOver("--name", "other name.txt")
	if got := rig.Cat(t, filepath.Join(d.Conf, "other name.txt")); got.Out != content {
		t.Errorf("--name: %+v", got)
	}
	if r := rig.Run(t, "mount", d.Conf, "--enc", d.Pass); r.Code != 80 {
		t.Errorf("a name without a known end: %+v", r)
	}
}

func TestC13_TargetsThatCannotBe(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	on := func(target string, code int) {
		t.Helper()
		refusedCommand(t, d, code, exec.Command(rig.Binary(t), "mount", target, "--enc", d.Enc, "--passphrase-file", d.Pass))
	}
	on(filepath.Join(d.Path, "missing"), 10)
	on(filepath.Join(d.Path, "missing", "secrets.yaml"), 10)
	d.Write("config/secrets.yaml", []byte("an old plaintext"))
	on(filepath.Join(d.Conf, "secrets.yaml"), 10) // would be back after the read
	os.Remove(filepath.Join(d.Conf, "secrets.yaml"))
	os.Symlink(d.Pass, filepath.Join(d.Conf, "secrets.yaml"))
	on(filepath.Join(d.Conf, "secrets.yaml"), 10)
	os.Remove(filepath.Join(d.Conf, "secrets.yaml"))
	syscall.Mkfifo(filepath.Join(d.Conf, "secrets.yaml"), 0o600)
	on(filepath.Join(d.Conf, "secrets.yaml"), 10)
	os.Remove(filepath.Join(d.Conf, "secrets.yaml"))
	// Several files need a directory.
	d.Write("b.enc", []byte("x"))
	refusedCommand(t, d, 80, exec.Command(rig.Binary(t), "mount", d.Secret(), "--enc", d.Enc, "--enc", filepath.Join(d.Path, "b.enc"), "--passphrase-file", d.Pass))

	m := d.MountOver()
	d.WritePass()
	if r := rig.Run(t, "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass); r.Code != 11 {
		t.Errorf("mounted already: %+v", r)
	}
	if got := rig.Cat(t, d.Secret()); got.Out != content {
		t.Errorf("the first mount was touched: %+v", got)
	}
	m.Stop()
}

// A symbolic link to a directory is that directory, for mount, status and
// umount.
func TestC13_LinkToADirectory(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	link := filepath.Join(d.Path, "link")
	os.Symlink(d.Conf, link)
	m := rig.Start(t, exec.Command(rig.Binary(t), "mount", link, "--enc", d.Enc, "--passphrase-file", d.Pass), d.Conf)
	m.WaitReady()
	if r := rig.Run(t, "status", link); r.Code != 0 {
		t.Errorf("status: %+v", r)
	}
	if got := rig.Cat(t, filepath.Join(link, "secrets.yaml")); got.Out != content {
		t.Errorf("read: %+v", got)
	}
	if r := rig.Run(t, "umount", link); r.Code != 0 {
		t.Errorf("umount: %+v", r)
	}
	if r := m.Wait(); r.Code != 0 {
		t.Errorf("end: %+v", r)
	}
}

// Inside another FUSE mount, here one of our own.
func TestC13_InsideAFUSEMount(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	inner := filepath.Join(d.Conf, "inner")
	os.Mkdir(inner, 0o755)
	d.MountOver()
	d.WritePass()
	if os.Geteuid() != 0 {
		// fusermount3 is root's, whom a user's mount keeps out.
		on := exec.Command(rig.Binary(t), "mount", inner, "--enc", d.Enc, "--passphrase-file", d.Pass)
		if r := rig.Exec(t, on); r.Code != 10 || !strings.Contains(r.Err, "--allow-other") {
			t.Errorf("%+v", r)
		}
		if got := rig.Cat(t, d.Secret()); got.Out != content {
			t.Errorf("the outer one: %+v", got)
		}
		return
	}
	m := rig.Start(t, exec.Command(rig.Binary(t), "mount", inner, "--enc", d.Enc, "--passphrase-file", d.Pass), inner)
	m.WaitReady()
	for _, path := range []string{filepath.Join(inner, "secrets.yaml"), d.Secret()} {
		if got := rig.Cat(t, path); got.Out != content {
			t.Errorf("%s: %+v", path, got)
		}
	}
	m.Stop()
}

func TestC13_NoFUSE(t *testing.T) {
	rig.Root(t)
	d := rig.NewDir(t, []byte(content))
	in := func(script string, code int) {
		t.Helper()
		c := exec.Command("unshare", "--mount", "sh", "-ec", script+`; exec "$@"`, "sh", rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass)
		refusedCommand(t, d, code, c)
	}
	// No device at all: /dev is another one.
	in("mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/urandom c 1 9", 12)
	// A device without a driver.
	in("mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; mknod /dev/fuse c 10 254", 12)
}

func TestC13_NoHelper(t *testing.T) {
	if os.Geteuid() == 0 {
		// As root the binary mounts by itself.
		d := rig.NewDir(t, []byte(content))
		c := exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass)
		c.Env = []string{"PATH=" + d.Path}
		rig.Start(t, c, d.Conf).WaitReady()
		if got := rig.Cat(t, d.Secret()); got.Out != content {
			t.Errorf("%+v", got)
		}
		return
	}
	d := rig.NewDir(t, []byte(content))
	c := exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass)
	c.Env = []string{"PATH=" + d.Path}
	if r := refusedCommand(t, d, 12, c); !strings.Contains(r.Err, "apt-get install fuse3") {
		t.Errorf("it does not name the package: %s", r.Err)
	}
}

// memlocked is a mount that may lock no more than so many KiB, whoever runs it.
func memlocked(t *testing.T, d *rig.Dir, kib int) *exec.Cmd {
	args := []string{"sh", "-c", fmt.Sprintf(`ulimit -l %d; exec "$@"`, kib), "sh",
		rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass}
	if os.Geteuid() == 0 {
		args = append([]string{"setpriv", "--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock"}, args...)
	}
	return exec.Command(args[0], args[1:]...)
}

// Memory that cannot be locked: the error names the limit and the remedy.
func TestM1_MemlockTooSmall(t *testing.T) {
	d := rig.NewDir(t, bytesOf(200_000))
	r := refusedCommand(t, d, 50, memlocked(t, d, 64))
	for _, word := range []string{"RLIMIT_MEMLOCK is 65536 bytes", "ulimit -l"} {
		if !strings.Contains(r.Err, word) {
			t.Errorf("it does not say %q: %s", word, r.Err)
		}
	}
}

// A secret takes no more locked memory than its own pages, whatever was expected of
// it: all of the limit can be used.
func TestM1_MemlockJustEnough(t *testing.T) {
	for _, n := range []int{5 << 10, 700 << 10, 7 << 20} {
		kib := (n + 4095) / 4096 * 4
		for what, b := range map[string][]byte{"random": bytesOf(n), "zeros": make([]byte, n)} {
			d := rig.NewDir(t, b)
			m := rig.Start(t, memlocked(t, d, kib), d.Conf)
			m.WaitReady()
			if got := rig.Cat(t, d.Secret()); got.Out != string(b) {
				t.Errorf("%s: %d bytes came of %d", what, len(got.Out), n)
			}
			m.Stop()
		}
	}
}

// What does the mount fails: its words are passed on, and all is as it was.
func TestC21_MountFails(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	os.Mkdir(filepath.Join(d.Path, "bin"), 0o755)
	helper := d.Write("bin/fusermount3", []byte("#!/bin/sh\necho 'fusermount3: not today' >&2\nexit 1\n"))
	os.Chmod(helper, 0o755)
	c := exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass)
	c.Env = append(os.Environ(), "PATH="+filepath.Dir(helper)+":/usr/bin:/bin")
	if r := refusedCommand(t, d, 13, c); !strings.Contains(r.Err, "not today") {
		t.Errorf("it does not pass on why: %s", r.Err)
	}
	if os.Geteuid() != 0 {
		return
	}
	// Root that may not mount, without fusermount3.
	c = exec.Command("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass)
	setpriv, err := exec.LookPath("setpriv")
	if err != nil {
		t.Fatal(err)
	}
	c.Path, c.Env = setpriv, []string{"PATH=" + d.Path}
	if r := refusedCommand(t, d, 13, c); !strings.Contains(r.Err, "CAP_SYS_ADMIN") {
		t.Errorf("it does not name the capability: %s", r.Err)
	}
}

// On a kernel without secret memory, --require refuses.
func TestM1_RequireSecretmem(t *testing.T) {
	rig.Need(t, "strace", "strace")
	d := rig.NewDir(t, []byte(content))
	refusedCommand(t, d, 51, exec.Command("strace", "-f", "-o", "/dev/null", "-e", "inject=memfd_secret:error=ENOSYS",
		rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass, "--require", "secretmem"))
}
