package fs

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"oncefs/internal/once"
	"oncefs/internal/secretmem"
)

// over runs a test over a directory and over a file. The secret's node and
// claims are the same questions in both.
func over(t *testing.T, f func(t *testing.T, k *fakeKernel, node uint64)) {
	for name, file := range map[string]bool{"directory": false, "file": true} {
		t.Run(name, func(t *testing.T) {
			k := newKernel(t, file, 300_000)
			node := uint64(2)
			if file {
				node = 1
			}
			f(t, k, node)
			if _, err := k.end(); err != nil {
				t.Error(err)
			}
			k.destroy()
		})
	}
}

func (k *fakeKernel) wantState(want once.State) {
	k.t.Helper()
	if got := k.server.files[0].Secret.State(); got != want {
		k.t.Errorf("state %v, want %v", got, want)
	}
}

// Reads with any offset and size get that part of the content and no more.
func TestC6_ReadsOfAnyOffset(t *testing.T) {
	over(t, func(t *testing.T, k *fakeKernel, node uint64) {
		h := k.ask(opOpen, node, openIn(0)...).handle()
		content := k.content[0]
		size := uint64(len(content))
		rng := rand.New(rand.NewPCG(1, 2))
		offsets := []uint64{0, 1, 4095, 4096, size - 1, size, size + 1, math.MaxInt64, math.MaxInt64 - 1, 1 << 63, math.MaxUint64}
		sizes := []uint32{0, 1, 4096, secretmem.MaxSend, secretmem.MaxSend + 1, math.MaxInt32, math.MaxUint32}
		for range 200 {
			offsets = append(offsets, rng.Uint64N(size))
			sizes = append(sizes, rng.Uint32N(secretmem.MaxSend))
		}
		for i, off := range offsets {
			n := sizes[i%len(sizes)]
			var want []byte
			if off < size {
				want = content[off:min(size, off+uint64(min(n, secretmem.MaxSend)))]
			}
			a := k.ask(opRead, node, readIn(h, off, n)...)
			if a.errno != 0 || !bytes.Equal(a.body, want) {
				t.Fatalf("%d bytes at %d: %v, %d bytes, want %d", n, off, a.errno, len(a.body), len(want))
			}
		}
		k.wantState(once.Claimed)
		k.ask(opRelease, node, releaseIn(h)...)
		k.wantState(once.Spent)
	})
}

// A handle is good until its release, and no other ever is.
func TestC5_OnlyTheHandleOfTheClaimReads(t *testing.T) {
	over(t, func(t *testing.T, k *fakeKernel, node uint64) {
		read := func(handle uint64, want unix.Errno) {
			t.Helper()
			if a := k.ask(opRead, node, readIn(handle, 0, 100)...); a.errno != want || want != 0 && len(a.body) > 0 {
				t.Errorf("handle %d: %v and %d bytes, want %v", handle, a.errno, len(a.body), want)
			}
		}
		read(0, unix.EBADF)
		read(1, unix.EBADF)
		h := k.ask(opOpen, node, openIn(0)...).handle()
		read(h+1, unix.EBADF)
		read(math.MaxUint64, unix.EBADF)
		if a := k.ask(opOpen, node, openIn(0)...); a.errno != unix.ENOENT {
			t.Errorf("a second open: %v", a.errno)
		}
		k.wantState(once.Claimed)
		// Closed without a byte: given back, and the handle is worth nothing.
		k.ask(opRelease, node, releaseIn(h)...)
		k.wantState(once.Sealed)
		read(h, unix.EBADF)
		k.ask(opRelease, node, releaseIn(h)...)
		k.wantState(once.Sealed)
		h = k.ask(opOpen, node, openIn(0)...).handle()
		read(h, 0)
		k.ask(opRelease, node, releaseIn(h)...)
		k.wantState(once.Spent)
		read(h, unix.EBADF)
		if a := k.ask(opOpen, node, openIn(0)...); a.errno != unix.ENOENT {
			t.Errorf("an open after the spend: %v", a.errno)
		}
	})
}

// Whatever would change something is refused, whatever it looks like, and claims
// nothing.
func TestC7_EveryChangeIsRefused(t *testing.T) {
	over(t, func(t *testing.T, k *fakeKernel, node uint64) {
		names := []any{make([]byte, 128), "a", "b"}
		for name, opcode := range map[string]uint32{
			"setattr": 4, "symlink": 6, "mknod": 8, "mkdir": 9, "unlink": 10, "rmdir": 11, "rename": 12, "link": 13, "write": 16,
			"setxattr": 21, "removexattr": 24, "create": 35, "fallocate": 43, "rename2": 45, "tmpfile": 51,
		} {
			body := names
			switch name {
			case "unlink", "rmdir", "removexattr":
				body = []any{"a"}
			case "symlink":
				body = []any{"a", "b"}
			}
			if a := k.ask(opcode, node, body...); a.errno != unix.EROFS {
				t.Errorf("%s: %v", name, a.errno)
			}
		}
		for _, flags := range []uint32{unix.O_WRONLY, unix.O_RDWR, unix.O_TRUNC, unix.O_APPEND, unix.O_WRONLY | unix.O_RDWR} {
			if a := k.ask(opOpen, node, openIn(flags)...); a.errno != unix.EROFS {
				t.Errorf("open with %o: %v", flags, a.errno)
			}
		}
		k.wantState(once.Sealed)
	})
}

// A message that makes no sense cannot be answered, and who sent it would wait
// for ever: the connection ends.
func TestNonsenseEndsTheConnection(t *testing.T) {
	for name, m := range map[string][]byte{
		"short":               {1, 2, 3},
		"length is wrong":     append(message(opGetattr, 1, 1, 7, make([]byte, 16)), 0),
		"body is short":       message(opOpen, 1, 2, 7, []byte{1}),
		"name without end":    message(opLookup, 1, 1, 7, []byte("name")),
		"symlink, one string": message(6, 1, 1, 7, []byte("name\x00")),
		"rename, one string":  message(12, 1, 1, 7, append(make([]byte, 8), "name\x00"...)),
	} {
		t.Run(name, func(t *testing.T) {
			k := newKernel(t, false, 100)
			k.ask(opOpen, 2, openIn(0)...)
			k.send(m)
			answers, err := k.end()
			if err == nil || len(answers) != 1 {
				t.Errorf("%v and %d answers", err, len(answers))
			}
			k.destroy()
		})
	}
}

// What a read of a file under the mount may take does not depend on what is
// asked for.
func TestReadsUnderAreBounded(t *testing.T) {
	k := newKernel(t, false, 100)
	a := k.ask(opLookup, 1, "other")
	node := a.handle() // the node is the first field there
	h := k.ask(opOpen, node, openIn(0)...).handle()
	if a := k.ask(opRead, node, readIn(h, 0, math.MaxUint32)...); string(a.body) != "other content" {
		t.Errorf("%v %q", a.errno, a.body)
	}
	k.end()
	k.destroy()
}

// names takes a listing apart, as struct fuse_dirent of linux/fuse.h has it.
func (a answer) names() (all []string) {
	for b := a.body; len(b) >= 24; {
		n := int(binary.NativeEndian.Uint32(b[16:]))
		all = append(all, string(b[24:24+n]))
		b = b[min(len(b), (24+n+7)/8*8):]
	}
	return all
}

// Secrets in directories: one that is on the disk as well shows what is there, one
// that is not shows nothing else, and both stay when their secrets are gone.
func TestC13_SecretsInDirectories(t *testing.T) {
	k := newKernel(t, false, 100, 90, 80, 70)
	list := func(node uint64) string {
		h := k.ask(opOpendir, node, openIn(0)...).handle()
		names := k.ask(opReaddir, node, readIn(h, 0, 4096)...).names()
		k.ask(opReleasedir, node, releaseIn(h)...)
		slices.Sort(names)
		return strings.Join(names, " ")
	}
	lookup := func(node uint64, name string) answer { return k.ask(opLookup, node, name) }
	if got := list(1); got != ". .. link other own secreta secretb sub" {
		t.Errorf("root: %s", got)
	}
	sub, own := lookup(1, "sub").handle(), lookup(1, "own").handle()
	if got := list(sub); got != ". .. deep secretc" {
		t.Errorf("sub: %s", got)
	}
	if got := list(own); got != ". .. secretd" {
		t.Errorf("own: %s", got)
	}
	// struct fuse_entry_out has 40 bytes before its struct fuse_attr, that 60 before
	// the mode.
	mode := func(a answer) uint32 { return binary.NativeEndian.Uint32(a.body[40+60:]) }
	if a := lookup(1, "sub"); mode(a) != unix.S_IFDIR|0o700 {
		t.Errorf("sub: %o; the disk's is 700", mode(a))
	}
	if a := lookup(1, "own"); mode(a) != unix.S_IFDIR|0o500 {
		t.Errorf("own: %o", mode(a))
	}
	if a := lookup(own, "other"); a.errno != unix.ENOENT {
		t.Errorf("a name that is not there: %v", a.errno)
	}
	for _, name := range []string{".", "..", "secretd"} {
		if a := lookup(sub, name); a.errno != unix.ENOENT {
			t.Errorf("%s in sub: %v", name, a.errno)
		}
	}
	deep := lookup(sub, "deep").handle()
	h := k.ask(opOpen, deep, openIn(0)...).handle()
	if a := k.ask(opRead, deep, readIn(h, 0, 100)...); string(a.body) != "deep" {
		t.Errorf("sub/deep: %v %q", a.errno, a.body)
	}
	for i, in := range []uint64{sub, own} {
		name := []string{"secretc", "secretd"}[i]
		node := lookup(in, name).handle()
		before := list(in)
		h := k.ask(opOpen, node, openIn(0)...).handle()
		if got := list(in); got+" "+name != before {
			t.Errorf("while %s is claimed: %s, and before %s", name, got, before)
		}
		if a := lookup(in, name); a.errno != unix.ENOENT {
			t.Errorf("%s while it is claimed: %v", name, a.errno)
		}
		if a := k.ask(opRead, node, readIn(h, 0, 4096)...); !bytes.Equal(a.body, k.content[2+i]) {
			t.Errorf("%s: %v, %d bytes", name, a.errno, len(a.body))
		}
		k.ask(opRelease, node, releaseIn(h)...)
		if a := lookup(in, name); a.errno != unix.ENOENT {
			t.Errorf("%s when it is spent: %v", name, a.errno)
		}
		if a := k.ask(opGetattr, in, make([]byte, 16)); a.errno != 0 {
			t.Errorf("the directory of %s when it is spent: %v", name, a.errno)
		}
	}
	if got := list(1); got != ". .. link other own secreta secretb sub" {
		t.Errorf("root in the end: %s", got)
	}
	k.end()
	k.destroy()
}

// What the caller makes of names is looked at once more before anything is
// mounted.
func TestNamesThatCannotBe(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for name, o := range map[string]Options{
		"out":             {Files: []File{{Name: "../a"}}},
		"absolute":        {Files: []File{{Name: "/a"}}},
		"nothing":         {Files: []File{{Name: ""}}},
		"the root":        {Files: []File{{Name: "."}}},
		"not simple":      {Files: []File{{Name: "a//b"}}, Dirs: []Dir{{Name: "a"}}},
		"no directory":    {Files: []File{{Name: "a/b"}}},
		"below a file":    {Files: []File{{Name: "a"}, {Name: "a/b"}}},
		"twice":           {Files: []File{{Name: "a"}, {Name: "a"}}},
		"file and dir":    {Files: []File{{Name: "a"}}, Dirs: []Dir{{Name: "a"}}},
		"a dir twice":     {Dirs: []Dir{{Name: "a"}, {Name: "a"}}},
		"a dir leads out": {Dirs: []Dir{{Name: ".."}}},
	} {
		o.Under, o.Path = dir, "/nowhere"
		if _, err := newServer(o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestStatusInParts(t *testing.T) {
	for name, want := range map[string]int{StatusAttr: 0, StatusAttr + ".0": 0, StatusAttr + ".17": 17,
		StatusAttr + ".": -1, StatusAttr + ".x": -1, StatusAttr + ".-1": -1, StatusAttr + "x": -1, "user.x": -1, "": -1} {
		if from, ok := statusFrom(name); ok != (want >= 0) || ok && from != want {
			t.Errorf("%s: %d, %v", name, from, ok)
		}
	}
}
