package secretmem

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMain also is the process that may lock only a little memory.
func TestMain(m *testing.M) {
	if os.Getenv("SECRETMEM_LIMIT") != "" {
		os.Exit(fillBeyondLimit())
	}
	os.Exit(m.Run())
}

// stores are one of each kind; that of the kernel's secret memory only where it
// has it.
func stores(t *testing.T) []*Store {
	t.Helper()
	all := []*Store{newStore(Locked)}
	s, err := Open(true)
	if err != nil {
		t.Logf("SKIPPED for memfd_secret: %v", err)
		return all
	}
	return append(all, s)
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n), 1}).Read(b)
	return b
}

// feed returns the reading end of a pipe from which content comes.
func feed(t *testing.T, content []byte) int {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	go func() { w.Write(content); w.Close() }()
	t.Cleanup(func() { r.Close() })
	return int(r.Fd())
}

func fill(t *testing.T, s *Store, content []byte) *Buffer {
	t.Helper()
	b := s.NewBuffer(int64(len(content)))
	t.Cleanup(func() { b.Wipe() })
	if err := b.Fill(feed(t, content), int64(len(content))); err != nil {
		t.Fatal(err)
	}
	return b
}

// sendAll sends the buffer through the pipe into another one and reads it there.
func sendAll(t *testing.T, b *Buffer, head string) []byte {
	t.Helper()
	p, err := NewPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, pipeSize); err != nil {
		t.Fatal(err)
	}
	var got []byte
	buf := make([]byte, MaxSend+len(head))
	for off := int64(0); off < b.Size(); off += MaxSend {
		n := min(MaxSend, b.Size()-off)
		if err := p.Send(int(w.Fd()), []byte(head), b, off, n); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(r, buf[:int(n)+len(head)]); err != nil {
			t.Fatal(err)
		}
		if string(buf[:len(head)]) != head {
			t.Fatalf("header %q", buf[:len(head)])
		}
		got = append(got, buf[len(head):int(n)+len(head)]...)
	}
	w.Close()
	return got
}

func TestM1_InAndOut(t *testing.T) {
	page := os.Getpagesize()
	for _, s := range stores(t) {
		for _, size := range []int{1, page - 1, page, page + 1, 2 * page, 128<<10 - 1, 128<<10 + 1, 1<<20 + 5} {
			t.Run(fmt.Sprint(s.Kind(), size), func(t *testing.T) {
				content := random(size)
				b := fill(t, s, content)
				if b.Size() != int64(size) {
					t.Fatal(b.Size())
				}
				if !bytes.Equal(sendAll(t, b, "0123456789abcdef"), content) {
					t.Fatal("other bytes came out")
				}
			})
		}
	}
}

func TestM1_SendAnyPart(t *testing.T) {
	content := random(100_000)
	for _, s := range stores(t) {
		b := fill(t, s, content)
		p, err := NewPipe()
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		r, w, _ := os.Pipe()
		defer r.Close()
		defer w.Close()
		for range 300 {
			off := rand.IntN(len(content))
			n := rand.IntN(min(len(content)-off, 40_000) + 1)
			if err := p.Send(int(w.Fd()), []byte("h"), b, int64(off), int64(n)); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, n+1)
			if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got[1:], content[off:off+n]) {
				t.Fatalf("%d bytes at %d: %v", n, off, err)
			}
		}
		for _, bad := range [][2]int64{{-1, 1}, {0, -1}, {int64(len(content)), 1}, {0, int64(len(content)) + 1}, {0, MaxSend + 1}} {
			if err := p.Send(int(w.Fd()), []byte("h"), b, bad[0], bad[1]); err == nil {
				t.Errorf("%d bytes at %d: no error", bad[1], bad[0])
			}
		}
	}
}

// TestM1_CopyWaitsForItsReader copies more than a pipe holds, also into one that
// is non-blocking.
func TestM1_CopyWaitsForItsReader(t *testing.T) {
	for _, flags := range []int{0, unix.O_NONBLOCK} {
		for _, s := range stores(t) {
			for _, size := range []int{0, 1, 4097, 300_000} {
				content := random(size)
				b := fill(t, s, content)
				var fds [2]int
				if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
					t.Fatal(err)
				}
				if err := unix.SetNonblock(fds[1], flags != 0); err != nil {
					t.Fatal(err)
				}
				copied := make(chan error, 1)
				go func() { copied <- errors.Join(b.Copy(fds[1]), unix.Close(fds[1])) }()
				r := os.NewFile(uintptr(fds[0]), "pipe")
				got, err := io.ReadAll(r)
				if err = errors.Join(err, <-copied, r.Close(), b.Wipe()); err != nil || !bytes.Equal(got, content) {
					t.Errorf("%s, %d bytes, flags %d: %d came, %v", s.Kind(), size, flags, len(got), err)
				}
				if err := b.Copy(0); !errors.Is(err, ErrWiped) {
					t.Errorf("after Wipe: %v", err)
				}
			}
		}
	}
}

// TestM1_FailedSendLeavesNothing: what could not go out must not go out before
// the next message.
func TestM1_FailedSendLeavesNothing(t *testing.T) {
	for _, s := range stores(t) {
		b := fill(t, s, []byte("secret"))
		p, err := NewPipe()
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		closed, w, _ := os.Pipe()
		closed.Close()
		for range 3 {
			if err := p.Send(int(w.Fd()), []byte("h"), b, 0, 6); !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.EINVAL) {
				t.Fatalf("to nobody: %v", err)
			}
		}
		if got := sendAllThrough(t, p, b); got != "hsecret" {
			t.Fatalf("%q", got)
		}
		if err := p.Scrub(); err != nil {
			t.Fatal(err)
		}
		if got := sendAllThrough(t, p, b); got != "hsecret" {
			t.Fatalf("after scrub: %q", got)
		}
	}
}

func sendAllThrough(t *testing.T, p *Pipe, b *Buffer) string {
	t.Helper()
	r, w, _ := os.Pipe()
	defer r.Close()
	if err := p.Send(int(w.Fd()), []byte("h"), b, 0, b.Size()); err != nil {
		t.Fatal(err)
	}
	w.Close()
	got, _ := io.ReadAll(r)
	return string(got)
}

func TestM1_NobodyCanLook(t *testing.T) {
	s, err := Open(true)
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skipf("SKIPPED: %v", err)
	}
	content := random(4096)
	b := fill(t, s, content)
	addr := addrOf(b)
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	got := make([]byte, 16)
	if n, err := mem.ReadAt(got, int64(addr)); !errors.Is(err, unix.EIO) {
		t.Fatalf("/proc/self/mem gave %d bytes, %v", n, err)
	}
	// The method itself works: it reads what is not secret.
	known := []byte("0123456789abcdef")
	if _, err := mem.ReadAt(got, int64(addrOfBytes(known))); err != nil || !bytes.Equal(got, known) {
		t.Fatalf("control: %q, %v", got, err)
	}
}

func TestM3_WipedAndUnmapped(t *testing.T) {
	for _, s := range stores(t) {
		b := fill(t, s, random(20_000))
		addr := addrOf(b)
		if !mapped(t, addr) || s.Live() != 1 {
			t.Fatalf("mapped %v, %d live", mapped(t, addr), s.Live())
		}
		if err := b.Wipe(); err != nil {
			t.Fatal(err)
		}
		if mapped(t, addr) || s.Live() != 0 {
			t.Fatalf("after wipe: mapped %v, %d live", mapped(t, addr), s.Live())
		}
		if err := b.Wipe(); err != nil || s.Live() != 0 {
			t.Fatal("wiped twice")
		}
		if err := b.Fill(feed(t, []byte("x")), 1); err != ErrWiped {
			t.Fatal(err)
		}
		p, _ := NewPipe()
		defer p.Close()
		if err := p.Send(1, []byte("h"), b, 0, 1); !errors.Is(err, ErrWiped) {
			t.Fatal(err)
		}
	}
}

func TestM3_ZerosAreLookedFor(t *testing.T) {
	seg := make([]byte, 4096)
	if !allZero(seg) {
		t.Fatal("zeros are not zero")
	}
	for _, i := range []int{0, 7, 2048, 4095} {
		seg[i] = 1
		if allZero(seg) {
			t.Fatalf("byte %d was overlooked", i)
		}
		seg[i] = 0
	}
}

func TestFillErrors(t *testing.T) {
	for _, s := range stores(t) {
		b := s.NewBuffer(10)
		defer b.Wipe()
		if err := b.Fill(feed(t, []byte("abc")), 4); err != io.ErrUnexpectedEOF {
			t.Error(err)
		}
		if err := b.Fill(feed(t, random(20)), 8); err != ErrTooLarge {
			t.Error(err)
		}
		if err := b.Fill(-1, 1); !errors.Is(err, unix.EBADF) {
			t.Error(err)
		}
		if err := b.Fill(-1, 0); err != nil {
			t.Error(err)
		}
	}
}

// TestLimit: what cannot be locked is an error that names the limit. A process
// without CAP_IPC_LOCK is needed, so root becomes another user for it.
func TestLimit(t *testing.T) {
	for _, kind := range []Kind{Secret, Locked} {
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), "SECRETMEM_LIMIT="+string(kind))
		if os.Geteuid() == 0 {
			// The test binary's directory may be closed to others.
			copied := t.TempDir() + "/test"
			in, err := os.ReadFile(exe)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(copied, in, 0o755); err != nil {
				t.Fatal(err)
			}
			for dir := copied; dir != "/tmp" && len(dir) > 4; dir = dir[:strings.LastIndex(dir, "/")] {
				os.Chmod(dir, 0o755)
			}
			cmd.Path = copied
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		}
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "RLIMIT_MEMLOCK is 65536 bytes") {
			t.Errorf("%s: %v\n%s", kind, err, out)
		}
	}
}

func fillBeyondLimit() int {
	limit := unix.Rlimit{Cur: 65536, Max: 65536}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		fmt.Println(err)
		return 1
	}
	s := newStore(Kind(os.Getenv("SECRETMEM_LIMIT")))
	b := s.NewBuffer(1 << 20)
	b.Expect(1 << 20) // cannot be had, which is for Fill to tell
	r, w, _ := os.Pipe()
	go w.Write(make([]byte, 1<<20))
	err := b.Fill(int(r.Fd()), 1<<20)
	var limited *LimitError
	if !errors.As(err, &limited) {
		fmt.Println("no LimitError but", err)
		return 1
	}
	fmt.Println(err)
	if err := b.Wipe(); err != nil || s.Live() != 0 {
		fmt.Println("not wiped", err)
		return 1
	}
	return 0
}

func TestOpenTellsWhatThereIs(t *testing.T) {
	s, err := Open(false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(true); (err == nil) != (s.Kind() == Secret) {
		t.Fatalf("%s, but required: %v", s.Kind(), err)
	}
}

func TestEqual(t *testing.T) {
	for _, s := range stores(t) {
		long := random(70_000)
		other := bytes.Clone(long)
		other[65_000] ^= 1
		a, same, diff, short, empty := fill(t, s, long), fill(t, s, long), fill(t, s, other), fill(t, s, long[:69_999]), fill(t, s, nil)
		if !a.Equal(same) || !a.Equal(a) || !empty.Equal(fill(t, s, nil)) {
			t.Error("what is the same is not equal")
		}
		for i, b := range []*Buffer{diff, short, empty} {
			if a.Equal(b) || b.Equal(a) {
				t.Errorf("%d: what differs is equal", i)
			}
		}
		same.Wipe()
		if a.Equal(same) || same.Equal(a) {
			t.Error("a wiped buffer is equal to something")
		}
	}
}
