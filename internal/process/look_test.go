package process

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMain is also the process that is looked at.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "wait" {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// other starts a process that ends with the function returned.
func other(t *testing.T) (pid uint32, end func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "wait")
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	end = func() { in.Close(); cmd.Wait() }
	t.Cleanup(end)
	return uint32(cmd.Process.Pid), end
}

func TestC12_Look(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(exe, &st); err != nil {
		t.Fatal(err)
	}
	pid, end := other(t)
	f, err := Look(pid, What{Groups: true, File: true, Digest: true})
	if err != nil {
		t.Fatal(err)
	}
	groups, _ := os.Getgroups()
	for _, g := range groups {
		if !slices.Contains(f.Groups, uint32(g)) {
			t.Errorf("group %d is not among %v", g, f.Groups)
		}
	}
	if f.Exe != exe || f.Dev != uint64(st.Dev) || f.Ino != st.Ino || f.SHA256 != fmt.Sprintf("%x", sha256.Sum256(b)) {
		t.Errorf("%+v", f)
	}
	if f, err := Look(pid, What{}); err != nil || f.Ino != 0 || f.SHA256 != "" {
		t.Errorf("more than was asked for: %+v, %v", f, err)
	}
	end()
	if _, err := Look(pid, What{}); !errors.Is(err, ErrGone) {
		t.Errorf("of a process that ended: %v", err)
	}
	if _, err := Look(0, What{}); !errors.Is(err, ErrOutside) {
		t.Errorf("of no process: %v", err)
	}
}

// A thread is looked at by its own number, also where only processes can be
// held.
func TestC12_LookAtThread(t *testing.T) {
	tids := make(chan int)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			done := make(chan struct{})
			go func() { runtime.LockOSThread(); tids <- unix.Gettid(); <-stop; close(done) }()
			<-done
			return
		}
		tids <- unix.Gettid()
		<-stop
	}()
	tid := uint32(<-tids)
	for name, hold := range map[string]func(uint32) (*held, error){"thread": holdThread, "process": holdProcess} {
		h, err := hold(tid)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		defer h.close()
		if f, err := h.facts(What{File: true}); err != nil || f.Ino == 0 || h.gone() != nil {
			t.Errorf("%s: %+v, %v, %v", name, f, err, h.gone())
		}
	}
}

// One that ends while it is looked at is noticed, however it is held.
func TestC12_EndsWhileLookedAt(t *testing.T) {
	for name, hold := range map[string]func(uint32) (*held, error){"thread": holdThread, "process": holdProcess} {
		pid, end := other(t)
		h, err := hold(pid)
		if err != nil {
			t.Fatal(err)
		}
		defer h.close()
		if err := h.gone(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		end()
		if err := h.gone(); !errors.Is(err, ErrGone) {
			t.Errorf("%s: %v", name, err)
		}
		if f, err := h.facts(What{File: true}); err == nil {
			t.Errorf("%s: facts of a dead process: %+v", name, f)
		}
	}
}

func TestC12_TooLargeToHash(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	path := t.TempDir() + "/large"
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, maxDigest+1); err != nil { // sparse
		t.Fatal(err)
	}
	cmd := exec.Command(path, "wait")
	in, _ := cmd.StdinPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	if _, err := Look(uint32(cmd.Process.Pid), What{Digest: true}); !errors.Is(err, ErrLarge) {
		t.Errorf("%v", err)
	}
}
