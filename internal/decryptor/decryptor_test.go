package decryptor

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"oncefs/crypto"
	"oncefs/internal/bundle"
	"oncefs/internal/sandbox"
	"oncefs/internal/secretmem"
)

// TestMain is also the child, as the real binary is, and a process that tries
// what the child must not be able to do.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case Command:
			makeThreads(16)
			os.Exit(Main(os.Args[2:]))
		case "forbidden":
			os.Exit(forbidden(os.Args[2]))
		}
	}
	os.Exit(m.Run())
}

// makeThreads makes threads that are used again. With the race detector, or with
// package net, this program is linked with C, and a thread that begins then makes
// calls that the sandbox does not allow; the real binary is not.
func makeThreads(n int) {
	var made, ended sync.WaitGroup
	made.Add(n)
	for range n {
		ended.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			made.Done()
			made.Wait()
		})
	}
	ended.Wait()
}

const pass = "open sesame"

func store(t testing.TB) *secretmem.Store {
	t.Helper()
	s, err := secretmem.Open(false)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// message encrypts content and returns it as an open file.
func message(t *testing.T, content []byte) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "x.enc")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := crypto.Encrypt(f, bytes.NewReader(content), []byte(pass), crypto.GPG); err != nil {
		t.Fatal(err)
	}
	return reopen(t, f)
}

func file(t *testing.T, content []byte) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return reopen(t, f)
}

func reopen(t *testing.T, f *os.File) *os.File {
	t.Helper()
	f.Close()
	f, err := os.Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func run(t *testing.T, ctx context.Context, files []*os.File, passphrase string, max int64, s *secretmem.Store) ([]*secretmem.Buffer, error) {
	t.Helper()
	var messages []Message
	for _, f := range files {
		messages = append(messages, Message{File: f})
	}
	all, err := Decrypt(ctx, "/proc/self/exe", messages, Passphrase{File: file(t, []byte(passphrase))}, max, s)
	var bufs []*secretmem.Buffer
	for _, c := range all {
		if len(c) != 1 || c[0].Entry != (bundle.Entry{}) {
			t.Errorf("contents of a plain message: %v", c)
		}
		bufs = append(bufs, c[0].Bytes)
	}
	return bufs, err
}

// contentOf sends a buffer out through a pipe, for comparison.
func contentOf(t *testing.T, b *secretmem.Buffer) []byte {
	t.Helper()
	p, err := secretmem.NewPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	r, w, _ := os.Pipe()
	defer r.Close()
	defer w.Close()
	var got []byte
	for off := int64(0); off < b.Size(); off += 4096 {
		n := min(4096, b.Size()-off)
		if err := p.Send(int(w.Fd()), []byte("h"), b, off, n); err != nil {
			t.Fatal(err)
		}
		chunk := make([]byte, 1+n)
		if _, err := io.ReadFull(r, chunk); err != nil {
			t.Fatal(err)
		}
		got = append(got, chunk[1:]...)
	}
	return got
}

func TestM2_DecryptsManyAtOnce(t *testing.T) {
	s := store(t)
	contents := [][]byte{[]byte("one"), {}, bytes.Repeat([]byte("three"), 100_000), []byte("four")}
	var files []*os.File
	for _, c := range contents {
		files = append(files, message(t, c))
	}
	bufs, err := run(t, t.Context(), files, pass+"\nsecond line\n", 1<<20, s)
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range bufs {
		if !bytes.Equal(contentOf(t, b), contents[i]) {
			t.Errorf("file %d: other content", i)
		}
		b.Wipe()
	}
	if s.Live() != 0 {
		t.Fatalf("%d buffers left", s.Live())
	}
}

// archive is a tar archive of files and, where a name ends in /, directories.
func archive(t *testing.T, members ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(members); i += 2 {
		h := &tar.Header{Name: members[i], Typeflag: tar.TypeReg, Mode: 0o640, Size: int64(len(members[i+1]))}
		if strings.HasSuffix(h.Name, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o750
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, members[i+1])
	}
	w.Close()
	return b.Bytes()
}

func TestM2_ABundleIsTakenApart(t *testing.T) {
	s := store(t)
	large := strings.Repeat("large", 500_000)
	messages := []Message{
		{File: message(t, archive(t, "top", "one", "d/", "", "d/e/large", large, "d/none", "")), Bundle: true},
		{File: message(t, archive(t, "as", "it is"))},
	}
	all, err := Decrypt(t.Context(), "/proc/self/exe", messages, Passphrase{File: file(t, []byte(pass))}, 4<<20, s)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range all[0] {
		what := "directory"
		if c.Bytes != nil {
			b := contentOf(t, c.Bytes)
			what = fmt.Sprintf("%d bytes", len(b))
			if c.Name == "d/e/large" && string(b) != large {
				t.Error("d/e/large: other content")
			}
		}
		got = append(got, fmt.Sprintf("%s %o %s", c.Name, c.Mode, what))
	}
	if want := "d 750 directory, d/e 755 directory, top 640 3 bytes, d/e/large 640 2500000 bytes, d/none 640 0 bytes"; strings.Join(got, ", ") != want {
		t.Errorf("got %s, want %s", strings.Join(got, ", "), want)
	}
	if plain := all[1]; len(plain) != 1 || plain[0].Bytes.Size() <= 512 || plain[0].Entry != (bundle.Entry{}) {
		t.Errorf("the archive that is no bundle: %v", plain)
	}
	for _, c := range slices.Concat(all...) {
		if c.Bytes != nil {
			c.Bytes.Wipe()
		}
	}
	if s.Live() != 0 {
		t.Fatalf("%d buffers left", s.Live())
	}
}

// What is no bundle is refused when the whole message was authenticated; before
// that it is damage.
func TestM2_FaultsOfABundleComeThrough(t *testing.T) {
	whole := archive(t, "a", "one", "../b", "two")
	f := message(t, whole)
	encrypted, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		file *os.File
		pass string
		max  int64
		want error
	}{
		"leads out":        {f, pass, 100, &bundle.Error{Entry: 2, Fault: bundle.ErrName}},
		"not an archive":   {message(t, []byte(strings.Repeat("user: app\n", 100))), pass, 100, &bundle.Error{Entry: 1, Fault: bundle.ErrFormat}},
		"nothing":          {message(t, nil), pass, 100, &bundle.Error{Fault: bundle.ErrNoEnd}},
		"too large in all": {message(t, archive(t, "a", "12345", "b", "12345")), pass, 9, &bundle.Error{Entry: 2, Fault: bundle.ErrTooLarge}},
		"cut message":      {file(t, encrypted[:len(encrypted)-60]), pass, 100, crypto.ErrDamaged},
		"wrong passphrase": {f, "nope", 100, crypto.ErrWrongPassphrase},
		"a bomb":           {message(t, append(whole, make([]byte, 8<<20)...)), pass, 100, crypto.ErrTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			c.file.Seek(0, io.SeekStart)
			s := store(t)
			all, err := Decrypt(t.Context(), "/proc/self/exe", []Message{{File: c.file, Bundle: true}}, Passphrase{File: file(t, []byte(c.pass))}, c.max, s)
			var bad *bundle.Error
			if want, ok := c.want.(*bundle.Error); all != nil || ok && (!errors.As(err, &bad) || *bad != *want) || !ok && !errors.Is(err, c.want) {
				t.Fatalf("%v, %v", all, err)
			}
			if s.Live() != 0 {
				t.Fatalf("%d buffers left", s.Live())
			}
		})
	}
}

func TestM2_FaultsComeThrough(t *testing.T) {
	good := message(t, []byte("good"))
	whole, err := os.ReadFile(good.Name())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		files []*os.File
		pass  string
		max   int64
		want  error
		file  int
	}{
		"wrong passphrase":  {[]*os.File{good}, "nope", 10, crypto.ErrWrongPassphrase, 0},
		"second is no file": {[]*os.File{good, file(t, []byte("plain text"))}, pass, 10, crypto.ErrNotOpenPGP, 1},
		"cut":               {[]*os.File{file(t, whole[:len(whole)/2])}, pass, 10, crypto.ErrDamaged, 0},
		"too large":         {[]*os.File{good}, pass, 3, crypto.ErrTooLarge, 0},
		"empty passphrase":  {[]*os.File{good}, "\nsecond", 10, ErrEmpty, -1},
		"long passphrase":   {[]*os.File{good}, strings.Repeat("x", 5000), 10, ErrTooLong, -1},
	} {
		t.Run(name, func(t *testing.T) {
			for _, f := range c.files {
				f.Seek(0, 0)
			}
			s := store(t)
			bufs, err := run(t, t.Context(), c.files, c.pass, c.max, s)
			if !errors.Is(err, c.want) || bufs != nil {
				t.Fatalf("%v, %v", bufs, err)
			}
			var fe *FileError
			if errors.As(err, &fe) != (c.file >= 0) || c.file >= 0 && fe.File != c.file {
				t.Fatalf("which file: %v", err)
			}
			if s.Live() != 0 {
				t.Fatalf("%d buffers left", s.Live())
			}
		})
	}
}

// TestM2_KilledChild kills the child while it waits for its passphrase.
func TestM2_KilledChild(t *testing.T) {
	s := store(t)
	r, w, _ := os.Pipe()
	defer w.Close()
	got := make(chan error)
	go func() {
		_, err := Decrypt(t.Context(), "/proc/self/exe", []Message{{File: message(t, []byte("x"))}}, Passphrase{File: r}, 10, s)
		got <- err
	}()
	child := waitForChild(t)
	syscall.Kill(child, syscall.SIGKILL)
	if err := <-got; !errors.Is(err, ErrDied) {
		t.Fatal(err)
	}
	if s.Live() != 0 {
		t.Fatalf("%d buffers left", s.Live())
	}
}

// waitForChild waits until the child has put its sandbox on, which is seen by
// its seccomp mode.
func waitForChild(t *testing.T) int {
	t.Helper()
	for t.Context().Err() == nil {
		tasks, _ := filepath.Glob("/proc/self/task/*/children")
		for _, path := range tasks {
			b, _ := os.ReadFile(path)
			for _, pid := range strings.Fields(string(b)) {
				status, _ := os.ReadFile("/proc/" + pid + "/status")
				if strings.Contains(string(status), "Seccomp:\t2") {
					var n int
					fmt.Sscan(pid, &n)
					return n
				}
			}
		}
		runtime.Gosched()
	}
	t.Fatal("no child")
	return 0
}

func TestM2_CancelKillsTheChild(t *testing.T) {
	s := store(t)
	r, w, _ := os.Pipe()
	defer w.Close()
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan error)
	go func() {
		_, err := Decrypt(ctx, "/proc/self/exe", []Message{{File: message(t, []byte("x"))}}, Passphrase{File: r}, 10, s)
		got <- err
	}()
	child := waitForChild(t)
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) || s.Live() != 0 {
		t.Fatal(err)
	}
	if syscall.Kill(child, 0) == nil {
		t.Fatal("the child is alive")
	}
}

func TestM2_Inspect(t *testing.T) {
	r, err := Inspect(t.Context(), "/proc/self/exe", message(t, []byte("x")))
	if err != nil || !r.Armored || len(r.Passphrases) != 1 || r.Passphrases[0].Count != crypto.MaxS2KCount || r.Integrity != crypto.MDC {
		t.Fatalf("%+v, %v", r, err)
	}
	if _, err := Inspect(t.Context(), "/proc/self/exe", file(t, []byte("user: app\n"))); !errors.Is(err, crypto.ErrNotOpenPGP) {
		t.Fatal(err)
	}
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if _, err := Inspect(t.Context(), "/proc/self/exe", dir); !errors.Is(err, crypto.ErrRead) {
		t.Fatal(err)
	}
	if _, err := Inspect(t.Context(), "/bin/true", message(t, []byte("x"))); !errors.Is(err, ErrDied) {
		t.Fatal(err)
	}
	if _, err := Inspect(t.Context(), "/bin/echo", message(t, []byte("x"))); err == nil {
		t.Fatal("a child that says something else was believed")
	}
}

// forbidden puts the sandbox on and tries one act.
func forbidden(act string) int {
	if err := sandbox.Decryptor(false); err != nil {
		fmt.Println(err)
		return 1
	}
	switch act {
	case "nothing":
		fmt.Println("alive")
		return 0
	case "open":
		os.Open("/etc/passwd")
	case "open for writing":
		unix.Open("/tmp/x", unix.O_CREAT|unix.O_WRONLY, 0o600)
	case "socket":
		net.Dial("tcp", "127.0.0.1:1")
	case "unix socket":
		unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	case "exec":
		syscall.Exec("/bin/true", []string{"true"}, nil)
	case "fork":
		syscall.RawSyscall(syscall.SYS_FORK, 0, 0, 0)
	case "clone a process":
		syscall.RawSyscall(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0)
	case "ptrace":
		unix.PtraceAttach(os.Getppid())
	case "read others' memory":
		var b [1]byte
		unix.ProcessVMReadv(os.Getppid(), []unix.Iovec{{Base: &b[0], Len: 1}}, []unix.RemoteIovec{{Base: 0x1000, Len: 1}}, 0)
	case "kill":
		syscall.Kill(os.Getppid(), 0)
	case "mount":
		unix.Mount("none", "/mnt", "tmpfs", 0, "")
	case "bpf":
		unix.Syscall(unix.SYS_BPF, 0, 0, 0)
	case "io_uring":
		unix.Syscall(unix.SYS_IO_URING_SETUP, 1, 0, 0)
	}
	fmt.Println("survived", act)
	return 0
}

func TestM2_ChildCanDoNothingElse(t *testing.T) {
	for _, act := range []string{"nothing", "open", "open for writing", "socket", "unix socket", "exec", "fork", "clone a process", "ptrace", "read others' memory", "kill", "mount", "bpf", "io_uring"} {
		t.Run(act, func(t *testing.T) {
			cmd := exec.Command("/proc/self/exe", "forbidden", act)
			out, err := cmd.Output()
			if act == "nothing" {
				if err != nil || string(out) != "alive\n" {
					t.Fatalf("%q, %v", out, err)
				}
				return
			}
			ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
			if !ok || !ws.Signaled() || ws.Signal() != syscall.SIGSYS {
				t.Fatalf("not killed: %q, %v", out, cmd.ProcessState)
			}
		})
	}
}

func TestC14_FirstLineAsGPG(t *testing.T) {
	for in, want := range map[string]string{
		"secret\n": "secret", "secret": "secret", "secret\nother\n": "secret", " a b \n": " a b ", "\tx": "\tx",
		"crlf\r\n": "crlf\r", "nul\x00x\n": "nul\x00x", strings.Repeat("x", maxPassphrase) + "\n": strings.Repeat("x", maxPassphrase),
	} {
		got, err := FirstLine(strings.NewReader(in))
		if err != nil || string(got) != want {
			t.Errorf("%.20q: %.20q, %v", in, got, err)
		}
	}
	for in, want := range map[string]error{"": ErrEmpty, "\n": ErrEmpty, "\nx": ErrEmpty, strings.Repeat("x", maxPassphrase+1): ErrTooLong} {
		if got, err := FirstLine(strings.NewReader(in)); err != want || got != nil {
			t.Errorf("%.20q: %.20q, %v", in, got, err)
		}
	}
}

func TestC14_NothingIsReadBeyondTheLine(t *testing.T) {
	r, w, _ := os.Pipe()
	io.WriteString(w, "first\nsecond\n")
	w.Close()
	if got, err := FirstLine(r); err != nil || string(got) != "first" {
		t.Fatal(got, err)
	}
	if rest, _ := io.ReadAll(r); string(rest) != "second\n" {
		t.Fatalf("left: %q", rest)
	}
}

// What is expected need not come, nor be all that comes.
func TestProtocolExpects(t *testing.T) {
	put := func(h header) string { b := h.put(); return string(b[:]) }
	const max = 1 << 20
	for _, n := range []uint64{0, 1, max, max + 1, math.MaxInt64} {
		s := store(t)
		r, w, _ := os.Pipe()
		io.WriteString(w, put(header{kind: expect, n: n})+put(header{kind: data, n: 5})+"hello"+put(header{kind: done, n: 5}))
		w.Close()
		m := newArriving(false, max, 0, s)
		if err := receive(int(r.Fd()), []*arriving{m}); err != nil {
			t.Fatalf("%d: %v", n, err)
		}
		if got := contentOf(t, m.content[0].Bytes); string(got) != "hello" {
			t.Errorf("%d: %q", n, got)
		}
		if err := m.wipe(); err != nil || s.Live() != 0 {
			t.Errorf("%d: %v, %d buffers left", n, err, s.Live())
		}
		r.Close()
	}
}

// FuzzReceive feeds the parent anything at all: an error leaves no buffer and no
// mapping behind, and only a whole protocol is taken for good.
func FuzzReceive(f *testing.F) {
	add := func(hs ...any) {
		var b []byte
		for _, h := range hs {
			switch h := h.(type) {
			case header:
				p := h.put()
				b = append(b, p[:]...)
			case string:
				b = append(b, h...)
			}
		}
		f.Add(b)
	}
	add(header{kind: data, n: 5}, "hello", header{kind: done, n: 5}, header{kind: done, file: 1})
	add(header{kind: data, file: 1, n: 2}, "ab", header{kind: data, n: 1}, "x", header{kind: done, n: 1}, header{kind: done, file: 1, n: 2})
	add(header{kind: done}, header{kind: done})
	add(header{kind: expect, n: 1 << 40}, header{kind: data, n: 1}, "x", header{kind: done, n: 1}, header{kind: done, file: 1})
	add(header{kind: done}, header{kind: done, file: 1}, "x")
	add(header{kind: data, n: 1 << 40})
	add(header{kind: failed, fault: byte(crypto.ErrDamaged), n: 4}, "text")
	add(header{kind: failed, fault: 200})
	add(header{kind: failed, file: 1 << 31, fault: 1})
	add(header{kind: refuse, fault: byte(ErrEmpty)})
	add(header{kind: refuse, fault: 99, n: 300})
	add(header{kind: 9})
	size := func(n byte) string { return strings.Repeat("\x00", 7) + string(n) }
	add(header{kind: done}, header{kind: entry, file: 1, fault: 1, mode: 0o700, n: 9}, size(0)+"d", header{kind: entry, file: 1, mode: 0o600, n: 11}, size(2)+"d/f",
		header{kind: data, file: 1, n: 2}, "ab", header{kind: done, file: 1, n: 2})
	add(header{kind: entry, file: 1, n: 10}, size(0)+"..")
	add(header{kind: unfit, file: 1, fault: byte(bundle.ErrSymlink), n: 3})
	f.Fuzz(func(t *testing.T, stream []byte) {
		if len(stream) > 60_000 {
			t.Skip()
		}
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		w.Write(stream)
		w.Close()
		s := store(t)
		messages := []*arriving{newArriving(false, 1<<14, 0, s), newArriving(true, 1<<14, 0, s)}
		err = receive(int(r.Fd()), messages)
		var held, told int64
		var tree bundle.Tree
		for i, m := range messages {
			for _, c := range m.content {
				if c.Bytes != nil {
					held += c.Bytes.Size()
				}
				if err != nil || i == 0 {
					continue
				}
				told += int64(8 + len(c.Name))
				if tree.Add(c.Entry) != nil || c.Dir != (c.Bytes == nil) || !c.Dir && c.Bytes.Size() != c.Size {
					t.Fatalf("taken for good: %+v", c.Entry)
				}
			}
			if err := m.wipe(); err != nil {
				t.Fatal(err)
			}
		}
		if s.Live() != 0 {
			t.Fatalf("%d buffers left", s.Live())
		}
		if held > 2<<14 {
			t.Fatalf("%d bytes in two messages of that size", held)
		}
		if err == nil {
			// It must have been said of both that they are whole, and what the second
			// holds.
			if n := int64(len(stream)) - held; n < 3*headerSize+told-int64(len(tree.Dirs())*(bundle.MaxName+8)) {
				t.Fatalf("%d bytes of protocol were taken for good", n)
			}
		}
	})
}

func TestProtocolRefuses(t *testing.T) {
	put := func(h header) string { b := h.put(); return string(b[:]) }
	file := func(name string, size byte) string {
		return put(header{kind: entry, n: uint64(8 + len(name))}) + strings.Repeat("\x00", 7) + string(size) + name
	}
	dir := func(name string) string {
		return put(header{kind: entry, fault: 1, n: uint64(8 + len(name))}) + strings.Repeat("\x00", 8) + name
	}
	end := put(header{kind: done})
	byte1 := put(header{kind: data, n: 1}) + "x"
	refuses(t, false, map[string]string{
		"nothing":            "",
		"half a header":      "\x01\x00\x00",
		"no end":             put(header{kind: data, n: 1}) + "x",
		"short data":         put(header{kind: data, n: 5}) + "x",
		"wrong sum":          put(header{kind: data, n: 1}) + "x" + put(header{kind: done, n: 2}),
		"another file":       put(header{kind: done, file: 1}),
		"after the end":      put(header{kind: done}) + "x",
		"twice whole":        put(header{kind: done}) + put(header{kind: done}),
		"too much at once":   put(header{kind: data, n: maxData + 1}),
		"too much":           put(header{kind: data, n: 11}) + "01234567890" + put(header{kind: done, n: 11}),
		"long text":          put(header{kind: failed, fault: 1, n: maxText + 1}),
		"text not printable": put(header{kind: failed, fault: 1, n: 1}) + "\x1b",
		"unknown fault":      put(header{kind: failed, fault: 77}),
		"unknown refusal":    put(header{kind: refuse, fault: 77}),
		"bytes that are 0":   "\x01\x00\x01\x00" + strings.Repeat("\x00", 12),
		"an entry":           file("a", 0) + end,
		"no bundle":          put(header{kind: unfit, fault: byte(bundle.ErrEmpty)}),
		"less than nothing":  put(header{kind: expect, n: 1 << 63}) + end,
		"expected too late":  end + put(header{kind: expect, n: 1}),
		"unknown kind":       put(header{kind: expect + 1}) + end,
	})
	refuses(t, true, map[string]string{
		"nothing":                  "",
		"no entry":                 end,
		"data without an entry":    byte1 + end,
		"out":                      file("../a", 0) + end,
		"absolute":                 file("/a", 0) + end,
		"no name":                  file("", 0) + end,
		"a zero byte":              file("a\x00b", 0) + end,
		"too long":                 file(strings.Repeat("a", 256), 0) + end,
		"longer":                   file(strings.Repeat("a/", 600)+"a", 0) + end,
		"two of one name":          file("a", 0) + file("a", 0) + end,
		"a file and a directory":   file("a", 0) + dir("a") + end,
		"below a file":             file("a", 0) + file("a/b", 0) + end,
		"data in a directory":      dir("a") + byte1 + put(header{kind: done, n: 1}),
		"a directory with a size":  put(header{kind: entry, fault: 1, n: 9}) + strings.Repeat("\x00", 7) + "\x01a" + end,
		"neither":                  put(header{kind: entry, fault: 2, n: 9}) + strings.Repeat("\x00", 8) + "a" + end,
		"set user id":              put(header{kind: entry, mode: 0o4700, n: 9}) + strings.Repeat("\x00", 8) + "a" + end,
		"negative":                 put(header{kind: entry, n: 9}) + strings.Repeat("\xff", 8) + "a" + end,
		"less than it says":        file("a", 2) + byte1 + put(header{kind: done, n: 1}),
		"less, and another":        file("a", 2) + byte1 + file("b", 0) + put(header{kind: done, n: 1}),
		"more than it says":        file("a", 0) + byte1 + put(header{kind: done, n: 1}),
		"more than is allowed":     file("a", 11) + end,
		"more in all":              file("a", 6) + put(header{kind: data, n: 6}) + "012345" + file("b", 6) + end,
		"wrong sum":                file("a", 1) + byte1 + end,
		"half an entry":            put(header{kind: entry, n: 10}) + strings.Repeat("\x00", 8) + "a",
		"an unknown fault of it":   put(header{kind: unfit, fault: 77}),
		"no such entry":            put(header{kind: unfit, fault: byte(bundle.ErrName), n: 1 << 50}),
		"after it was whole":       file("a", 0) + end + file("b", 0),
		"expected":                 put(header{kind: expect, n: 1}) + file("a", 0) + end,
		"unfit after it was whole": file("a", 0) + end + put(header{kind: unfit, fault: byte(bundle.ErrName)}),
	})
	s := store(t)
	r, w, _ := os.Pipe()
	io.WriteString(w, file("a/b", 1)+byte1+put(header{kind: done, n: 1}))
	w.Close()
	m := newArriving(true, 1, 0, s)
	if err := receive(int(r.Fd()), []*arriving{m}); err != nil || len(m.content) != 2 || m.content[0].Name != "a" || m.content[1].Bytes.Size() != 1 {
		t.Errorf("a bundle that keeps to it: %v, %v", err, m.content)
	}
	m.wipe()
	r.Close()
}

// refuses says each stream of one message to the parent.
func refuses(t *testing.T, isBundle bool, streams map[string]string) {
	t.Helper()
	for name, stream := range streams {
		r, w, _ := os.Pipe()
		io.WriteString(w, stream)
		w.Close()
		s := store(t)
		m := newArriving(isBundle, 10, 0, s)
		if err := receive(int(r.Fd()), []*arriving{m}); err == nil {
			t.Errorf("%s: no error", name)
		}
		if m.wipe(); s.Live() != 0 {
			t.Errorf("%s: %d buffers left", name, s.Live())
		}
		r.Close()
	}
}
