package integration

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"oncefs/integration/rig"
)

// bundle encrypts an archive with gpg to certs.tar.enc, which is what the
// directory serves from here on.
func bundle(d *rig.Dir, archive []byte) {
	d.T.Helper()
	d.Enc = d.Write("certs.tar.enc", rig.GPG(d.T, archive, rig.Passphrase, "--symmetric", "--s2k-count", "65536"))
}

// packed is what the real tar makes of files, given as names and contents. Names
// that end in / are directories.
func packed(t testing.TB, files ...string) []byte {
	t.Helper()
	rig.Need(t, "tar", "tar")
	dir := t.TempDir()
	for i := 0; i < len(files); i += 2 {
		path := filepath.Join(dir, files[i])
		if strings.HasSuffix(files[i], "/") {
			os.MkdirAll(path, 0o750)
			continue
		}
		os.MkdirAll(filepath.Dir(path), 0o755)
		if err := os.WriteFile(path, []byte(files[i+1]), 0o640); err != nil {
			t.Fatal(err)
		}
		os.Chmod(path, 0o640)
	}
	out, err := exec.Command("tar", "-C", dir, "-c", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// entries is an archive as a hostile hand would make it.
func entries(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		h.Mode = 0o600
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		w.Write(bytes.Repeat([]byte("x"), int(h.Size)))
	}
	w.Close()
	return b.Bytes()
}

// Each file of a bundle is claimed, read and gone on its own; the directories stay.
func TestC3_EachFileOfABundleOnce(t *testing.T) {
	d := rig.NewDir(t, nil)
	bundle(d, packed(t, "top.yaml", content, "tls/key.pem", "the key", "tls/deep/er/cert.pem", "the cert", "empty/", ""))
	m := d.MountOver()
	top, key, cert := filepath.Join(d.Conf, "top.yaml"), filepath.Join(d.Conf, "tls/key.pem"), filepath.Join(d.Conf, "tls/deep/er/cert.pem")
	r := rig.NewReader(t, nil)
	r.Want("empty tls top.yaml", "list", d.Conf)
	r.Want("deep key.pem", "list", filepath.Join(d.Conf, "tls"))
	r.Want("100440 7", "stat", key)
	r.Want("40555 0", "stat", filepath.Join(d.Conf, "tls"))
	r.Want("40550 0", "stat", filepath.Join(d.Conf, "empty"))
	if got := rig.Cat(t, key); got.Out != "the key" {
		t.Fatalf("key: %+v", got)
	}
	r.Want("ENOENT", "stat", key)
	r.Want("ENOENT", "open", key)
	r.Want("deep", "list", filepath.Join(d.Conf, "tls"))
	if e := m.WaitEvent("delivery", 1); e["path"] != key || e["whole"] != true {
		t.Errorf("delivery: %v", e)
	}
	if e := m.WaitEvent("late", 1); e["path"] != key {
		t.Errorf("late: %v", e)
	}
	r.Want(fmt.Sprintf("100440 %d", len(content)), "stat", top)
	r.Want("100440 8", "stat", cert)
	if got := rig.Run(t, "status", d.Conf); got.Code != 0 || !strings.Contains(got.Out, "tls/deep/er/cert.pem") {
		t.Errorf("status: %+v", got)
	}
	for path, want := range map[string]string{top: content, cert: "the cert"} {
		if got := rig.Cat(t, path); got.Out != want {
			t.Errorf("%s: %+v", path, got)
		}
		r.Want("ENOENT", "open", path)
	}
	r.Want("empty tls", "list", d.Conf)
	r.Want("", "list", filepath.Join(d.Conf, "tls/deep/er"))
	if got := rig.Run(t, "status", d.Conf); got.Code != 91 {
		t.Errorf("status in the end: %+v", got)
	}
	if r := m.Stop(); r.Code != 0 {
		t.Errorf("exit: %+v", r)
	}
	if left, _ := os.ReadDir(d.Conf); len(left) != 0 {
		t.Errorf("left on the disk: %v", left)
	}
}

// A file in a directory of a bundle is held to the same rows as any.
func TestC1_C8_AFileInADirectory(t *testing.T) {
	for name, under := range map[string]bool{"own directory": false, "a directory that is there": true} {
		t.Run(name, func(t *testing.T) {
			d := rig.NewDir(t, nil)
			b := bytesOf(300_001)
			bundle(d, packed(t, "a/b/secret", string(b), "a/b/second", "two"))
			dir := filepath.Join(d.Conf, "a/b")
			if under {
				os.MkdirAll(dir, 0o755)
				os.WriteFile(filepath.Join(dir, "other.txt"), []byte("other"), 0o644)
			}
			m := d.MountOver()
			secret := filepath.Join(dir, "secret")
			x, y := rig.NewReader(t, nil), rig.NewReader(t, nil)
			for range 2 { // C1
				x.Want("100440 300001", "stat", secret)
				x.Want("ok", "access", secret)
				x.Want("ok", "opath", secret)
				x.Want("ENODATA", "getxattr", secret, "user.x")
			}
			for _, how := range []string{"write", "read-write", "truncate-open", "append", "truncate", "chmod", "chown", "utimes", "unlink",
				"rename", "link", "symlink", "create", "tmpfile", "mkdir", "mknod", "setxattr", "removexattr"} { // C7
				if got := x.Do("change", how, secret); got != "EROFS" && !(how == "tmpfile" && got == "EOPNOTSUPP") {
					t.Errorf("C7 %s: %s", how, got)
				}
			}
			x.Want("ok", "open", secret) // C2
			y.Want("ENOENT", "open", secret)
			y.Want("ENOENT", "stat", secret)
			if got := y.Do("list", dir); strings.Contains(got, "secret") || !strings.Contains(got, "second") {
				t.Errorf("C2: %s", got)
			}
			x.Want("ok", "close") // C4
			m.WaitEvent("give-back", 1)
			y.Want("ok", "open", secret)
			y.Want("0 cached", "cached") // C9
			y.Want(sum(b), "read-all")   // C6
			y.Want("299999", "seek", "-2", "2")
			y.Want(strconv.Quote(string(b[299_999:])), "read", "100")
			y.Want(sum(b), "mmap", "300001")
			y.Want("ENOENT", "reopen") // C8
			y.Want("ok", "close")      // C5
			x.Want("ENOENT", "open", secret)
			x.Want("100440 3", "stat", filepath.Join(dir, "second"))
			if under {
				x.Want("100644 5", "stat", filepath.Join(dir, "other.txt"))
			}
		})
	}
}

// What is on the disk stays visible: in directories that the bundle has too, with
// their owner and mode. What the bundle has stands before it. Nothing leads out.
func TestC13_ABundleOverFiles(t *testing.T) {
	d := rig.NewDir(t, nil)
	outside := filepath.Join(d.Path, "outside")
	os.MkdirAll(filepath.Join(outside, "sub"), 0o755)
	d.Write("outside/elsewhere", []byte("outside"))
	for _, dir := range []string{"tls/sub", "plain", "blocked-by-file"} {
		os.MkdirAll(filepath.Join(d.Conf, dir), 0o755)
	}
	for name, text := range map[string]string{"tls/key.pem": "old key", "tls/ca.pem": "the ca", "tls/sub/x": "x", "plain/file": "plain", "was-file": "old", "blocked-by-file/in": "in"} {
		os.WriteFile(filepath.Join(d.Conf, name), []byte(text), 0o644)
	}
	os.Chmod(filepath.Join(d.Conf, "tls"), 0o711)
	os.Symlink(outside, filepath.Join(d.Conf, "link"))
	os.Symlink("tls/key.pem", filepath.Join(d.Conf, "alias"))
	bundle(d, packed(t, "tls/key.pem", "new key", "tls/new/y", "y", "link/elsewhere", "inside", "link/sub/z", "z", "was-file/f", "f", "blocked-by-file", "b"))
	m := d.MountOver()
	r := rig.NewReader(t, nil)
	at := func(name string) string { return filepath.Join(d.Conf, name) }
	r.Want("alias blocked-by-file link plain tls was-file", "list", d.Conf)
	r.Want("ca.pem key.pem new sub", "list", at("tls"))
	r.Want("elsewhere sub", "list", at("link"))
	r.Want("40711 "+size(t, filepath.Join(d.Conf, "tls"), r), "stat", at("tls"))
	r.Want("100440 1", "lstat", at("blocked-by-file"))
	r.Want("ENOTDIR", "stat", at("blocked-by-file/in"))
	for name, want := range map[string]string{"tls/ca.pem": "the ca", "tls/sub/x": "x", "plain/file": "plain", "tls/new/y": "y", "link/elsewhere": "inside", "link/sub/z": "z", "was-file/f": "f", "alias": "new key"} {
		if got := rig.Cat(t, at(name)); got.Out != want {
			t.Errorf("%s: %q, want %q", name, got.Out, want)
		}
	}
	for name, want := range map[string]string{"tls/ca.pem": "the ca", "tls/key.pem": "", "link/elsewhere": "", "was-file/f": ""} {
		if got := rig.Cat(t, at(name)); got.Out != want {
			t.Errorf("%s a second time: %q, want %q", name, got.Out, want)
		}
	}
	m.WaitEvent("plaintext-underneath", 1)
	if warned := m.Events("plaintext-underneath"); !slices.ContainsFunc(warned, func(e rig.Event) bool { return e["path"] == at("tls/key.pem") }) {
		t.Errorf("the old key is on the disk, and nobody says so: %v", warned)
	}
	if r := m.Stop(); r.Code != 0 {
		t.Fatalf("%+v", r)
	}
	if got := rig.Cat(t, at("tls/key.pem")); got.Out != "old key" {
		t.Errorf("afterwards: %q", got.Out)
	}
}

// size is that of a directory, which is the disk's affair.
func size(t *testing.T, path string, r *rig.Reader) string {
	t.Helper()
	_, size, _ := strings.Cut(r.Do("stat", path), " ")
	return size
}

// A directory that others may not enter stays closed to them, whatever the bundle
// says about it.
func TestC13_ABundleOpensNoDirectory(t *testing.T) {
	rig.Root(t)
	d := rig.NewDir(t, nil)
	os.Mkdir(filepath.Join(d.Conf, "private"), 0o700)
	os.WriteFile(filepath.Join(d.Conf, "private", "mine"), []byte("mine"), 0o644)
	bundle(d, packed(t, "private/new", "new", "open/new", "new"))
	d.MountOver("--allow-other", "--mode", "0444")
	r := rig.NewReader(t, &syscall.Credential{Uid: 4321, Gid: 4321})
	r.Want("EACCES", "open", filepath.Join(d.Conf, "private", "mine"))
	r.Want("EACCES", "open", filepath.Join(d.Conf, "private", "new"))
	r.Want("40555 0", "stat", filepath.Join(d.Conf, "open"))
	r.Want("ok", "open", filepath.Join(d.Conf, "open", "new"))
	r.Want(`"new"`, "read", "10")
}

// --mode, --uid and --gid hold for all files, and directories let in who may read.
func TestC1_ABundleOfAnotherUser(t *testing.T) {
	rig.Root(t)
	d := rig.NewDir(t, nil)
	bundle(d, packed(t, "d/one", "one", "d/two", "two"))
	m := d.MountOver("--uid", "4321", "--gid", "4321")
	app := rig.NewReader(t, &syscall.Credential{Uid: 4321, Gid: 4321})
	app.Want("4321 4321", "owner", filepath.Join(d.Conf, "d"))
	app.Want("4321 4321", "owner", filepath.Join(d.Conf, "d/one"))
	app.Want("ok", "open", filepath.Join(d.Conf, "d/one"))
	other := rig.NewReader(t, &syscall.Credential{Uid: 4322, Gid: 4322})
	other.Want("EACCES", "open", filepath.Join(d.Conf, "d/two"))
	m.Stop()
	d.WritePass()
	d.MountOver("--uid", "4321", "--mode", "0400")
	app.Want("100400 3", "stat", filepath.Join(d.Conf, "d/two"))
	app.Want("40500 0", "stat", filepath.Join(d.Conf, "d"))
	other.Want("EACCES", "stat", filepath.Join(d.Conf, "d/two"))
}

// Reads, limits and policy are each file's own.
func TestC10_C12_OfEachFile(t *testing.T) {
	d := rig.NewDir(t, nil)
	bundle(d, packed(t, "d/one", "one", "d/two", "two"))
	one, two := filepath.Join(d.Conf, "d/one"), filepath.Join(d.Conf, "d/two")
	r := rig.NewReader(t, nil)
	start := func(args ...string) *rig.Mount {
		d.WritePass()
		return d.MountOver(args...)
	}
	m := start("--reads", "2")
	for range 2 {
		r.Want("ok", "open", one)
		r.Want(`"one"`, "read", "10")
		r.Want("ok", "close")
	}
	r.Want("ENOENT", "open", one)
	r.Want("ok", "open", two)
	r.Want("ok", "close")
	m.Stop()

	m = start("--hold", "100ms")
	r.Want("ok", "open", two)
	r.Want(`"two"`, "read", "10")
	if e := m.WaitEvent("expiry", 1); e["path"] != two || e["limit"] != "hold" {
		t.Errorf("expiry: %v", e)
	}
	r.Want("ESTALE", "pread", "10", "0")
	r.Want("ok", "close")
	r.Want("ENOENT", "open", two)
	r.Want("100440 3", "stat", one)
	m.Stop()

	m = start("--reader-exe", "/bin/cat")
	r.Want("EACCES", "open", two)
	if e := m.WaitEvent("refusal", 1); e["path"] != two {
		t.Errorf("refusal: %v", e)
	}
	if got := rig.Cat(t, two); got.Out != "two" {
		t.Errorf("the one who may: %+v", got)
	}
	m.Stop()

	m = start("--expire", "1s")
	m.WaitEvent("expiry", 2)
	r.Want("ENOENT", "stat", one)
	r.Want("ENOENT", "stat", two)
	r.Want("", "list", filepath.Join(d.Conf, "d"))
}

// Of many readers of many files each file has one.
func TestC3_RaceForABundle(t *testing.T) {
	d := rig.NewDir(t, nil)
	var files []string
	for i := range 4 {
		files = append(files, fmt.Sprintf("d%d/f%d", i%2, i), strings.Repeat(strconv.Itoa(i), 10_000))
	}
	bundle(d, packed(t, files...))
	d.MountOver()
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := map[string]int{}
	for i := 0; i < len(files); i += 2 {
		for range 8 {
			wg.Go(func() {
				out, err := exec.Command("cat", filepath.Join(d.Conf, files[i])).Output()
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil && string(out) == files[i+1]:
					won[files[i]]++
				case len(out) != 0:
					t.Errorf("%s: %d bytes", files[i], len(out))
				}
			})
		}
	}
	wg.Wait()
	for i := 0; i < len(files); i += 2 {
		if won[files[i]] != 1 {
			t.Errorf("%s was read %d times", files[i], won[files[i]])
		}
	}
}

// The most files that there may be: all are served, and all are in the status.
func TestC20_ThousandFiles(t *testing.T) {
	d := rig.NewDir(t, nil)
	var files []string
	for i := range 1000 {
		files = append(files, fmt.Sprintf("d%02d/a-name-that-is-not-short-%04d", i%20, i), fmt.Sprint("content ", i))
	}
	bundle(d, packed(t, files...))
	m := d.MountOver()
	if got := rig.Cat(t, filepath.Join(d.Conf, files[2*777])); got.Out != "content 777" {
		t.Fatalf("%+v", got)
	}
	var st struct {
		Files []struct{ Name, State string }
	}
	got := rig.Run(t, "status", d.Conf, "--json")
	if err := json.Unmarshal([]byte(got.Out), &st); err != nil || len(st.Files) != 1000 || got.Code != 0 {
		t.Fatalf("status: %v, %d files, exit %d: %s", err, len(st.Files), got.Code, got.Err)
	}
	spent := map[string]bool{}
	for _, f := range st.Files {
		spent[f.Name] = f.State == "spent"
	}
	if len(spent) != 1000 || !spent[files[2*777]] || spent[files[0]] {
		t.Errorf("%d names", len(spent))
	}
	if r := m.Stop(); r.Code != 0 {
		t.Errorf("%+v", r)
	}
}

// Whatever is not a plain archive of files and directories is refused as a whole:
// nothing is mounted, and not a name of it is told.
func TestC23_HostileBundles(t *testing.T) {
	good := tar.Header{Name: "hunter2-good", Typeflag: tar.TypeReg, Size: 10}
	file := func(name string) []byte {
		return entries(t, good, tar.Header{Name: name, Typeflag: tar.TypeReg, Size: 3})
	}
	of := func(h tar.Header) []byte { return entries(t, good, h) }
	whole := entries(t, good)
	for name, c := range map[string]struct {
		archive []byte
		says    string
	}{
		"../x":            {file("../x"), "entry 2 has a name that leads elsewhere"},
		"inside and out":  {file("d/../../x"), "leads elsewhere"},
		"absolute":        {file("/tmp/x"), "leads elsewhere"},
		"control":         {file("x\x1b[31m"), "cannot be shown"},
		"long":            {file(strings.Repeat("x", 256)), "too long"},
		"symlink":         {of(tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/etc/shadow"}), "entry 2 is a symbolic link"},
		"hard link":       {of(tar.Header{Name: "l", Typeflag: tar.TypeLink, Linkname: "hunter2-good"}), "hard link"},
		"device":          {of(tar.Header{Name: "l", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 8}), "device"},
		"FIFO":            {of(tar.Header{Name: "l", Typeflag: tar.TypeFifo}), "FIFO"},
		"twice":           {file("./hunter2-good"), "name of another"},
		"below a file":    {file("hunter2-good/x"), "directory where there is a file"},
		"pax":             {of(tar.Header{Name: strings.Repeat("../", 60) + "x", Typeflag: tar.TypeReg, Format: tar.FormatPAX}), "leads elsewhere"},
		"cut":             {whole[:1024], "cut short"},
		"cut in a file":   {whole[:515], "cut short"},
		"behind the end":  {append(slices.Clone(whole), "hunter2"...), "goes on after its end"},
		"two in one":      {slices.Concat(whole, whole), "goes on after its end"},
		"no archive":      {[]byte(strings.Repeat(content, 50)), "not a tar header"},
		"nothing":         {nil, "cut short"},
		"no file":         {entries(t), "holds no file"},
		"100,000 entries": {many(t), "is one more than the 1024"},
	} {
		t.Run(name, func(t *testing.T) {
			d := rig.NewDir(t, nil)
			bundle(d, c.archive)
			if r := refused(t, d, 44); !strings.Contains(r.Err, c.says) {
				t.Errorf("it says %s, not %q", r.Err, c.says)
			}
		})
	}
	t.Run("sparse", func(t *testing.T) {
		d := rig.NewDir(t, nil)
		hole := t.TempDir()
		if err := os.WriteFile(filepath.Join(hole, "s"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		os.Truncate(filepath.Join(hole, "s"), 1<<20)
		for _, how := range []string{"--format=gnu", "--format=pax"} {
			out, err := exec.Command("tar", "-C", hole, "-c", "-S", how, "s").Output()
			if err != nil {
				t.Fatal(err)
			}
			bundle(d, out)
			if r := refused(t, d, 44); !strings.Contains(r.Err, "is sparse") {
				t.Errorf("%s: %s", how, r.Err)
			}
		}
	})
	t.Run("cut message", func(t *testing.T) {
		d := rig.NewDir(t, nil)
		message := rig.GPG(t, packed(t, "a", string(bytesOf(50_000))), rig.Passphrase, "--symmetric", "--s2k-count", "65536")
		for _, n := range []int{100, 10_000, len(message) - 30, len(message) - 1} {
			d.Enc = d.Write("certs.tar.enc", message[:n])
			refused(t, d, 40)
		}
	})
	t.Run("too large in all", func(t *testing.T) {
		d := rig.NewDir(t, nil)
		bundle(d, packed(t, "a", "12345", "b", "12345"))
		refused(t, d, 43, "--max-size", "9")
		d.MountOver("--max-size", "10")
	})
	t.Run("two of one name", func(t *testing.T) {
		d := rig.NewDir(t, nil)
		bundle(d, packed(t, "secrets.yaml", "x"))
		other := d.Write("secrets.yaml.enc", rig.GPG(t, []byte(content), rig.Passphrase, "--symmetric", "--s2k-count", "65536"))
		if r := refused(t, d, 80, "--enc", other); !strings.Contains(r.Err, "hold the same name") {
			t.Error(r.Err)
		}
	})
	t.Run("over a file", func(t *testing.T) {
		d := rig.NewDir(t, nil)
		bundle(d, packed(t, "a", "x"))
		d.Conf = filepath.Join(d.Path, "certs.tar")
		if r := refused(t, d, 80); !strings.Contains(r.Err, "needs a directory") {
			t.Error(r.Err)
		}
	})
}

// many is an archive of more files than there may be.
func many(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := range 100_000 {
		if err := w.WriteHeader(&tar.Header{Name: strconv.Itoa(i), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	return b.Bytes()
}

// An archive can be served as the one file that it is.
func TestC22_ATarAsOneFile(t *testing.T) {
	d := rig.NewDir(t, nil)
	archive := packed(t, "a", "x")
	bundle(d, archive)
	m := d.MountOver("--no-unpack")
	if got := rig.Cat(t, filepath.Join(d.Conf, "certs.tar")); got.Out != string(archive) {
		t.Errorf("%d bytes", len(got.Out))
	}
	m.Stop()
	d.WritePass()
	d.MountOver("--name", "archive")
	if got := rig.Cat(t, filepath.Join(d.Conf, "archive")); got.Out != string(archive) {
		t.Errorf("%d bytes", len(got.Out))
	}
}

// The program of run gets a bundle, and gets it again when it starts again.
func TestRun_ABundle(t *testing.T) {
	d := rig.NewDir(t, nil)
	bundle(d, packed(t, "d/a", "one", "b", "two"))
	script := fmt.Sprintf(`cat %[1]s/d/a %[1]s/b; [ ! -e %[1]s/b ] || exit 9; [ -e %[2]s ] && exit 0; touch %[2]s; exit 1`, d.Conf, filepath.Join(d.Path, "again"))
	cmd := exec.Command(rig.Binary(t), "run", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass, "--restart", "on-failure", "--restart-delay", "10ms", "--log", filepath.Join(d.Path, "log"), "--", "/bin/sh", "-c", script)
	if r := rig.Exec(t, cmd); r.Code != 0 || r.Out != "onetwoonetwo" {
		log, _ := os.Open(filepath.Join(d.Path, "log"))
		text, _ := io.ReadAll(log)
		t.Fatalf("%+v\n%s", r, text)
	}
}
