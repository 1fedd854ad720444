// Package wait waits for descriptors in the calling thread.
//
// The Go runtime's own way to wait takes another thread to watch, and hands over
// from it to the one that answers: more than a short answer takes. A call of our
// own has a snag. A thread that enters a system call in the instant in which the
// runtime begins to stop all of them (to collect garbage, or to have each of them
// make a call) is overlooked by Go 1.26, and the runtime then waits until the call
// returns or its monitor looks again, which is minutes (reentersyscall,
// stopTheWorldWithSema and sysmon in runtime/proc.go). So no wait here is long that
// begins while something is going on.
package wait

import (
	"time"

	"golang.org/x/sys/unix"
)

// Waits that nothing ends are this long at first, and each is longer than the one
// before by growth; past longest they have no end, so that what is idle is not woken.
const (
	shortest = 10 * time.Millisecond
	longest  = 4 * time.Second
	growth   = 4
)

// A Waiter waits. The zero value is ready for use, by one goroutine at a time.
type Waiter struct {
	quiet time.Duration // how long it waits at most: 0 is shortest, and less is without end
}

// Poll is poll(2), and may return when nothing happened: after limit, which is not
// there where it is negative, after a signal, or to wait again.
func (w *Waiter) Poll(fds []unix.PollFd, limit time.Duration) error {
	if w.quiet == 0 {
		w.quiet = shortest
	}
	timeout := w.quiet
	if limit >= 0 && (timeout < 0 || limit < timeout) {
		timeout = limit
	}
	n, err := unix.Poll(fds, milliseconds(timeout))
	switch {
	case err == unix.EINTR:
		return nil
	case n != 0:
		w.quiet = shortest
	case timeout == w.quiet:
		w.quiet = longer(timeout)
	}
	return err
}

// longer is the wait after one that nothing ended.
func longer(t time.Duration) time.Duration {
	if t *= growth; t > longest {
		return -1
	}
	return t
}

// milliseconds is never less than the time, and -1 where that has no end.
func milliseconds(t time.Duration) int {
	if t < 0 {
		return -1
	}
	return int((t + time.Millisecond - 1) / time.Millisecond)
}
