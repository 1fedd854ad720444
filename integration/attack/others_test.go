package attack

import (
	"bufio"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"oncefs/integration/rig"
)

// hold is the control: a process that does all that the product must not. It
// takes a needle from standard input and keeps it in its memory in every
// encoding, in an open file that has no name, and in a pipe, until its input
// ends. Environment and arguments are up to who starts it.
func hold(args []string) int {
	in := bufio.NewReader(os.Stdin)
	line, err := in.ReadString('\n')
	if err != nil {
		return 1
	}
	needle := make([]byte, len(line)/2)
	if _, err := fmt.Sscanf(line, "%x", &needle); err != nil {
		return 1
	}
	kept := encodings(needle)
	f, err := os.CreateTemp(args[0], "open")
	if err != nil {
		return 1
	}
	os.Remove(f.Name())
	f.Write(needle)
	r, w, err := os.Pipe()
	if err != nil {
		return 1
	}
	w.Write(needle[:min(len(needle), 4096)])
	fmt.Println("ready")
	io.Copy(io.Discard, in)
	runtime.KeepAlive(kept)
	runtime.KeepAlive(f)
	runtime.KeepAlive(r)
	return 0
}

// sip is a reader that does one thing at a time, as it is told on standard
// input:
//
//	open PATH    close    read N    cached    map
//
// It answers each with a line. cached is how many pages of the file are in the
// page cache, map reads all of it through a private mapping and tells how many
// of its pages mincore sees; close tells what was read, as a sum.
func sip([]string) int {
	fd, sum, total := -1, sha256.New(), 0
	answer := func(v any, err error) {
		if err != nil {
			fmt.Println("error", err)
			return
		}
		fmt.Println(v)
	}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		op, arg, _ := strings.Cut(lines.Text(), " ")
		switch op {
		case "open":
			var err error
			fd, err = unix.Open(arg, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			sum, total = sha256.New(), 0
			answer("ok", err)
		case "read":
			n, _ := strconv.Atoi(arg)
			b := make([]byte, n)
			n, err := unix.Read(fd, b)
			sum.Write(b[:max(0, n)])
			total += max(0, n)
			answer(n, err)
		case "cached":
			var c unix.Cachestat_t
			err := unix.Cachestat(uint(fd), &unix.CachestatRange{}, &c, 0)
			answer(c.Cache, err)
		case "map":
			var st unix.Stat_t
			if err := unix.Fstat(fd, &st); err != nil {
				answer(nil, err)
				continue
			}
			m, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ, unix.MAP_PRIVATE)
			if err != nil {
				answer(nil, err)
				continue
			}
			sum.Write(m)
			total += len(m)
			answer(resident(m))
			unix.Munmap(m)
		case "close":
			err := unix.Close(fd)
			answer(fmt.Sprintf("%d %x", total, sum.Sum(nil)), err)
		}
	}
	return 0
}

// resident is how many pages of a mapping mincore(2) sees.
func resident(m []byte) (n int, err error) {
	vec := make([]byte, (len(m)+os.Getpagesize()-1)/os.Getpagesize())
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), uintptr(unsafe.Pointer(&vec[0])))
	if errno != 0 {
		return 0, errno
	}
	for _, v := range vec {
		n += int(v & 1)
	}
	return n, nil
}

// A sipper is a running sip.
type sipper struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func newSipper(t testing.TB) *sipper {
	t.Helper()
	s := &sipper{t: t, cmd: self(t, "sip")}
	s.in, s.out = pipes(t, s.cmd)
	t.Cleanup(s.end)
	return s
}

// self is a process of this test binary.
func self(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, args...)
	cmd.Stderr = os.Stderr
	return cmd
}

func pipes(t testing.TB, cmd *exec.Cmd) (io.WriteCloser, *bufio.Reader) {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return in, bufio.NewReader(out)
}

func (s *sipper) do(op string) string {
	s.t.Helper()
	if _, err := io.WriteString(s.in, op+"\n"); err != nil {
		s.t.Fatalf("%s: %v", op, err)
	}
	line, err := s.out.ReadString('\n')
	if err != nil {
		s.t.Fatalf("%s: %v", op, err)
	}
	return strings.TrimSuffix(line, "\n")
}

func (s *sipper) want(want, op string) {
	s.t.Helper()
	if got := s.do(op); got != want {
		s.t.Errorf("%s: %s, want %s", op, got, want)
	}
}

func (s *sipper) end() { s.in.Close(); s.cmd.Wait() }

func sumOf(b []byte) string { return fmt.Sprintf("%d %x", len(b), sha256.Sum256(b)) }

// Every method finds what the control holds, in every encoding that it could
// be in there. Without this, a zero elsewhere would say nothing.
func TestScan_ControlIsFound(t *testing.T) {
	since := started()
	for _, size := range []int{32, 100_000} {
		needle := random(t, size)
		// Small enough for an argument.
		small := needle[:min(size, 4000)]
		dir, shm := tempDir(t, ""), tempDir(t, "/dev/shm")
		written := encodings(small)
		text := func(name string) string { return string(written[name]) }
		cmd := self(t, "hold", dir, "--password="+text("hex lower"), text("base64 std after 0"))
		cmd.Env = []string{"A=" + text("hex upper"), "B=" + text("base64 url after 1"), "C=" + text("base64 in lines")}
		in, out := pipes(t, cmd)
		defer func() { in.Close(); cmd.Wait() }()
		fmt.Fprintf(in, "%x\n", needle)
		if line, err := out.ReadString('\n'); err != nil || line != "ready\n" {
			t.Fatal(line, err)
		}
		ix := newIndex(part{"needle", needle})
		pid := cmd.Process.Pid
		check := func(l look, encodings ...string) {
			t.Helper()
			if l.failed != "" {
				t.Errorf("%s: %s", l.method, l.failed)
			}
			for _, e := range encodings {
				if l.found["needle"][e] == 0 {
					t.Errorf("%s of %d bytes: not found as %s: %v", l.method, size, e, l.found)
				}
			}
			t.Logf("control, %d bytes: %-18s %8.1f KiB read, found %v", size, l.method, float64(l.read)/1024, l.found["needle"])
		}
		all := []string{"raw", "utf16", "base64", "hex"}
		check(ix.procMem(pid), all...)
		check(ix.processVM(pid), all...)
		if !testing.Short() {
			check(ix.core(t, pid), all...)
		}
		words := ix.words(pid)
		check(words[0], "hex", "base64")
		check(words[1], "hex", "base64")
		check(ix.descriptors(t, pid), "raw")
		if l := ix.descriptors(t, pid); l.found["needle"]["raw"] < 2 {
			t.Errorf("one of the open file and the pipe was not found: %v", l.found)
		}
		for _, where := range []string{dir, shm} {
			for name, b := range encodings(needle) {
				if err := os.WriteFile(filepath.Join(where, name), slices.Concat(make([]byte, 12345), b), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			l := ix.files(t, "files below "+where, since, "", where)
			check(l, all...)
			sparse := newSparseIndex(window, part{"needle", needle}).files(t, "files, sparsely", since, "", where)
			check(sparse, all...)
		}
	}
}

// The methods that count pages in the page cache see those of an ordinary file.
func TestScan_ControlIsCached(t *testing.T) {
	path := filepath.Join(tempDir(t, ""), "file")
	if err := os.WriteFile(path, random(t, 100_000), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newSipper(t)
	s.want("ok", "open "+path)
	s.want("25", "cached")
	s.want("25", "map")
}

func tempDir(t testing.TB, in string) string {
	t.Helper()
	dir, err := os.MkdirTemp(in, rig.Prefix)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func random(t testing.TB, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	rand.Read(b) // never fails
	return b
}

// randomPassphrase is one that nobody could guess.
func randomPassphrase(t testing.TB) string {
	return base64.RawURLEncoding.EncodeToString(random(t, 33))
}

// started is the moment from which on a file could hold what is made now.
func started() time.Time { return time.Now().Add(-time.Second) }

// A crash writes no core, though the limits allow one and the runtime is told to
// make it: the control does.
func TestScan_NoCoreIsWritten(t *testing.T) {
	rig.Root(t)
	if testing.Short() {
		t.Skip("the long form has it: a crash of the Go runtime waits seconds for each thread")
	}
	crash := func(cmd *exec.Cmd, ready func() int) (dumped bool) {
		t.Helper()
		pid := ready()
		if err := syscall.Kill(pid, syscall.SIGABRT); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if !ws.Signaled() {
			t.Errorf("%v: it should have died of a signal: %v", cmd.Args[0], cmd.ProcessState)
		}
		return ws.CoreDump()
	}
	// No core pattern that names a file elsewhere, or a program, sees this one: the
	// kernel tells in the status whether it made a core.
	limitless := func(dir string, args ...string) *exec.Cmd {
		cmd := exec.Command("sh", append([]string{"-c", `ulimit -c unlimited && exec "$@"`, "sh"}, args...)...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "GOTRACEBACK=crash")
		return cmd
	}
	dir := tempDir(t, "")
	control := limitless(dir, "sleep", "600")
	if err := control.Start(); err != nil {
		t.Fatal(err)
	}
	if !crash(control, func() int {
		rig.WaitFor(t, "the control", func() bool { return strings.HasPrefix(cmdline(control.Process.Pid), "sleep") })
		return control.Process.Pid
	}) {
		t.Skip("SKIPPED: this machine makes no core of anything")
	}
	d := rig.NewDir(t, random(t, 5000))
	cmd := limitless(d.Path, rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(d.Conf, unix.MNT_DETACH) })
	if crash(cmd, func() int {
		if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			t.Fatal(line, err)
		}
		return cmd.Process.Pid
	}) {
		t.Error("a core was made")
	}
	if left, _ := filepath.Glob(filepath.Join(d.Path, "*core*")); len(left) > 0 {
		t.Errorf("a core is there: %v", left)
	}
}

func cmdline(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return string(b)
}
