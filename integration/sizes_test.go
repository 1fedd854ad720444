package integration

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strconv"
	"testing"

	"oncefs/integration/rig"
)

// bytesOf makes content that no compression shortens and no mistake repeats.
func bytesOf(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)})
	r.Read(b)
	return b
}

const maxSize = 64 << 20

// sizes are at every boundary: the page's, the reply's, a segment's of secret
// memory, and the largest that is allowed.
var sizes = []int{0, 1, 4095, 4096, 4097, 128<<10 - 1, 128 << 10, 128<<10 + 1, 1 << 20, maxSize}

func TestC1_EverySizeIsServed(t *testing.T) {
	for _, n := range sizes {
		t.Run(strconv.Itoa(n), func(t *testing.T) {
			if n > 4<<20 {
				rig.Root(t) // locked memory of other users ends at 8 MiB
			}
			b := bytesOf(n)
			d := rig.NewDir(t, b)
			m := d.MountOver()
			r := rig.NewReader(t, nil)
			r.Want(fmt.Sprintf("100400 %d", n), "stat", d.Secret())
			r.Want("ok", "open", d.Secret())
			r.Want(fmt.Sprintf("100400 %d", n), "fstat")
			r.Want(sum(b), "read-all")
			r.Want("ok", "close")
			if e := m.WaitEvent("delivery", 1); e["whole"] != true || e["sent"] != float64(n) {
				t.Errorf("delivery: %v", e)
			}
			r.Want("ENOENT", "stat", d.Secret())
		})
	}
}

// One byte over the limit is refused, and nothing is different from before.
func TestC22_OverMaxSizeIsRefused(t *testing.T) {
	for _, n := range []int{1, 4096, 1 << 20} {
		d := rig.NewDir(t, bytesOf(n+1))
		refused(t, d, 43, "--max-size", strconv.Itoa(n))
		d.Write("secrets.yaml.enc", rig.GPG(t, bytesOf(n), rig.Passphrase, "--symmetric", "--s2k-count", "65536"))
		d.MountOver("--max-size", strconv.Itoa(n))
		if got := rig.Cat(t, d.Secret()); got.Out != string(bytesOf(n)) {
			t.Errorf("%d bytes at the limit: %d came", n, len(got.Out))
		}
	}
}

// A few kilobytes that would become gigabytes stop at the limit.
func TestC22_CompressionBomb(t *testing.T) {
	d := rig.NewDir(t, nil)
	bomb := rig.GPG(t, make([]byte, 200<<20), rig.Passphrase, "--symmetric", "--s2k-count", "65536", "--compress-algo", "zlib", "-z", "9")
	if len(bomb) > 1<<20 {
		t.Fatalf("the bomb has %d bytes", len(bomb))
	}
	d.Write("secrets.yaml.enc", bomb)
	refused(t, d, 43, "--max-size", "1MiB")
	rig.Root(t)
	refused(t, d, 43)
}

// Within its claim a reader may read in any way there is.
func TestC6_EveryWayToRead(t *testing.T) {
	for _, n := range []int{10, 4096, 300_001} {
		b := bytesOf(n)
		whole := sum(b)
		ways := map[string]func(r *rig.Reader){
			"seek": func(r *rig.Reader) {
				r.Want(strconv.Itoa(n-5), "seek", "-5", "2")
				r.Want(strconv.Quote(string(b[n-5:])), "read", "100")
				r.Want("0", "seek", "0", "0")
				r.Want(whole, "read-all")
			},
			"pread": func(r *rig.Reader) {
				r.Want(strconv.Quote(string(b[n-3:])), "pread", "100", strconv.Itoa(n-3))
				r.Want(strconv.Quote(string(b[:7])), "pread", "7", "0")
				r.Want(`""`, "pread", "100", strconv.Itoa(n))
				r.Want(`""`, "pread", "100", strconv.Itoa(n+1000))
			},
			"again": func(r *rig.Reader) {
				r.Want(whole, "read-all")
				r.Want("0", "seek", "0", "0")
				r.Want(whole, "read-all")
			},
			"dup": func(r *rig.Reader) {
				r.Want(strconv.Quote(string(b[:2])), "read", "2")
				r.Want("ok", "dup")
				r.Want("ok", "close")
				r.Want("0", "seek", "0", "0")
				r.Want(whole, "read-all")
			},
			"mmap":     func(r *rig.Reader) { r.Want(whole, "mmap", strconv.Itoa(n)) },
			"sendfile": func(r *rig.Reader) { r.Want(whole, "sendfile", strconv.Itoa(n)) },
			"splice":   func(r *rig.Reader) { r.Want(whole, "splice", strconv.Itoa(n)) },
			"copy_file_range": func(r *rig.Reader) {
				// Between filesystems the kernel says EXDEV by itself, as cp knows, which
				// then reads; nothing is lost by having tried.
				if got := r.Do("copy_file_range", strconv.Itoa(n)); got != whole && got != "EXDEV" {
					t.Errorf("copy_file_range: %s", got)
				}
				r.Want("0", "seek", "0", "0")
				r.Want(whole, "read-all")
			},
			"fadvise": func(r *rig.Reader) {
				r.Want("ok", "advise")
				r.Want(whole, "read-all")
			},
		}
		d := rig.NewDir(t, b)
		for name, read := range ways {
			t.Run(fmt.Sprint(name, n), func(t *testing.T) {
				d.T = t
				d.WritePass()
				m := d.MountOver()
				r := rig.NewReader(t, nil)
				r.Want("ok", "open", d.Secret())
				read(r)
				r.Want("ok", "close")
				r.Want("ENOENT", "open", d.Secret())
				m.WaitEvent("delivery", 1)
				m.Stop()
			})
		}
	}
}

// No page of the file is in the page cache: never by reading, and after the
// close also not by mapping. A plain file shows that the question is a good one.
func TestC9_NothingIsCached(t *testing.T) {
	b := bytesOf(40_000)
	d := rig.NewDir(t, b)
	r := rig.NewReader(t, nil)
	r.Want("ok", "open", d.Enc)
	r.Do("read-all")
	if got := r.Do("cached"); got == "0 cached" {
		t.Fatal("cachestat sees nothing of a file that was just read")
	} else if got == "ENOSYS" {
		t.Skip("SKIPPED: cachestat(2) came with Linux 6.5")
	}
	d.MountOver()
	r.Want("ok", "open", d.Secret())
	r.Want(sum(b), "read-all")
	r.Want("0 cached", "cached")
	r.Want("ok", "close")

	for _, how := range []string{"mmap", "sendfile"} {
		d := rig.NewDir(t, b)
		m := d.MountOver("--reads", "2")
		r.Want("ok", "open", d.Secret())
		r.Want(sum(b), how, strconv.Itoa(len(b)))
		r.Want("ok", "close")
		m.WaitEvent("delivery", 1)
		// The same inode, opened anew: what is cached of it now is from before.
		r.Want("ok", "open", d.Secret())
		r.Want("0 cached", "cached")
		r.Want("ok", "close")
	}
}

// Who saw it by stat a moment ago does not see it now: no name, no attribute is
// remembered.
func TestC9_StatIsNotRemembered(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	d.MountOver()
	a, b := rig.NewReader(t, nil), rig.NewReader(t, nil)
	for range 50 {
		b.Want(fmt.Sprintf("100400 %d", len(content)), "stat", d.Secret())
		a.Want("ok", "open", d.Secret())
		b.Want("ENOENT", "stat", d.Secret())
		b.Want("ENOENT", "access", d.Secret())
		a.Want("ok", "close")
		b.Want("ok", "access", d.Secret())
	}
}

func TestC10_ReadsOneAfterAnother(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	m := d.MountOver("--reads", "3")
	for left := 2; left >= 0; left-- {
		a, b := rig.NewReader(t, nil), rig.NewReader(t, nil)
		a.Want("ok", "open", d.Secret())
		b.Want("ENOENT", "open", d.Secret())
		a.Want(strconv.Quote(content), "read", "1000")
		a.Want("ok", "close")
		if e := m.WaitEvent("delivery", 3-left); e["left"] != float64(left) {
			t.Fatalf("delivery: %v", e)
		}
	}
	if got := rig.Cat(t, d.Secret()); got.Code == 0 {
		t.Fatalf("fourth read: %+v", got)
	}
}

// What encrypt writes, gpg reads; what gpg writes in every way, mount reads.
func TestC22_BothWays(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	plain := d.Write("plain", []byte(content))
	if r := rig.Run(t, "encrypt", plain, "--passphrase-file", d.Pass); r.Code != 0 {
		t.Fatalf("encrypt: %+v", r)
	}
	if got := rig.Exec(t, exec.Command("gpg", "--homedir", d.Path, "--batch", "--quiet", "--no-autostart", "--pinentry-mode", "loopback", "--passphrase-file", d.Pass, "-d", plain+".enc")); got.Out != content {
		t.Fatalf("gpg -d: %+v", got)
	}
	for _, args := range [][]string{
		{"--armor"}, {"--cipher-algo", "AES128"}, {"--cipher-algo", "AES192"}, {"--cipher-algo", "AES256"},
		{"--s2k-digest-algo", "SHA1"}, {"--s2k-digest-algo", "SHA256"}, {"--s2k-digest-algo", "SHA512"},
		{"--compress-algo", "none"}, {"--compress-algo", "zip"}, {"--compress-algo", "zlib"}, {"--compress-algo", "bzip2"}, {"--textmode"},
	} {
		d.WritePass()
		d.Write("secrets.yaml.enc", rig.GPG(t, []byte(content), rig.Passphrase, append([]string{"--symmetric", "--s2k-count", "65536"}, args...)...))
		m := d.MountOver()
		if got := rig.Cat(t, d.Secret()); got.Out != content {
			t.Errorf("%v: %+v", args, got)
		}
		m.Stop()
	}
	// Line ends of another system.
	d.WritePass()
	armored := rig.GPG(t, []byte(content), rig.Passphrase, "--symmetric", "--armor", "--s2k-count", "65536")
	d.Write("secrets.yaml.enc", bytes.ReplaceAll(armored, []byte("\n"), []byte("\r\n")))
	d.MountOver()
	if got := rig.Cat(t, d.Secret()); got.Out != content {
		t.Errorf("CRLF: %+v", got)
	}
}
