package wait

import (
	"encoding/binary"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// eventfd is a descriptor that is readable once it was written to.
func eventfd(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func raise(t *testing.T, fd int) {
	if _, err := unix.Write(fd, binary.NativeEndian.AppendUint64(nil, 1)); err != nil {
		t.Error(err)
	}
}

func drain(fd int) {
	var count [8]byte
	unix.Read(fd, count[:])
}

// A wait that nothing ends returns all the same, and the next is longer; what
// happens makes them short again.
func TestPoll(t *testing.T) {
	fd := eventfd(t)
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	var w Waiter
	for _, want := range []time.Duration{4 * shortest, 16 * shortest} {
		if err := w.Poll(fds, -1); err != nil || fds[0].Revents != 0 || w.quiet != want {
			t.Fatalf("%v, %d, next %v", err, fds[0].Revents, w.quiet)
		}
	}
	if err := w.Poll(fds, 0); err != nil || fds[0].Revents != 0 || w.quiet != 16*shortest {
		t.Errorf("with a limit: %v, %d, next %v", err, fds[0].Revents, w.quiet)
	}
	raise(t, fd)
	if err := w.Poll(fds, -1); err != nil || fds[0].Revents != unix.POLLIN || w.quiet != shortest {
		t.Errorf("ready: %v, %d, next %v", err, fds[0].Revents, w.quiet)
	}
}

func TestLonger(t *testing.T) {
	n := 0
	for d := shortest; d > 0; d = longer(d) {
		n++
	}
	if n != 5 {
		t.Errorf("%d waits until there is one without end", n)
	}
}

// A wait that begins while the runtime stops all threads does not hold that up.
func TestPoll_StopTheWorld(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(2, runtime.NumCPU())))
	fd, over := eventfd(t), make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for w := (Waiter{}); ; {
			if err := w.Poll(fds, -1); err != nil {
				t.Error(err)
				return
			}
			drain(fd)
			select {
			case <-over:
				return
			default:
			}
		}
	}()
	var longestStop time.Duration
	for range 50_000 {
		raise(t, fd)
		begin := time.Now()
		var m runtime.MemStats
		runtime.ReadMemStats(&m) // stops all threads
		longestStop = max(longestStop, time.Since(begin))
	}
	close(over)
	raise(t, fd)
	<-done
	t.Logf("the longest stop took %v", longestStop)
	if longestStop > 20*time.Second {
		t.Errorf("a stop took %v", longestStop)
	}
}
