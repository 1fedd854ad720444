package fs

import (
	"bytes"
	"math"
	"math/rand/v2"
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
