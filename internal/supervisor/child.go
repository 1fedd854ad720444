package supervisor

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"oncefs/internal/process"
)

// A link is one end of a socket pair on which two of our processes say lines to
// each other. When a process is gone, however it ended, its links are.
type link struct {
	f *os.File
	// lines are what the other end says; closed when it is gone. nil takes part
	// in no select.
	lines <-chan string
	// broken is why nothing more can be read, though the other end may be there.
	// It is set before lines is closed.
	broken error
}

// newLink begins to listen on a descriptor that was inherited or made.
func newLink(fd int) (*link, error) {
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("control descriptor %d: fcntl: %w", fd, err)
	}
	f := os.NewFile(uintptr(fd), "control")
	// One that cannot be waited for would look like one whose other end is gone.
	if err := f.SetReadDeadline(time.Time{}); err != nil {
		f.Close()
		return nil, fmt.Errorf("control descriptor %d: epoll: %w", fd, err)
	}
	lines := make(chan string, 16)
	l := &link{f: f, lines: lines}
	go func() {
		defer close(lines)
		in := bufio.NewScanner(f)
		for in.Scan() {
			lines <- in.Text()
		}
		if err := in.Err(); err != nil && !errors.Is(err, os.ErrClosed) {
			l.broken = fmt.Errorf("read from the control descriptor: %w", err)
		}
	}()
	return l, nil
}

// say tells the other end. If that cannot be, it hangs up: who waits to be told
// must not wait for ever. That the other end is gone is no error, for it is seen by
// its lines.
func (l *link) say(line string) error {
	_, err := io.WriteString(l.f, line+"\n")
	if err == nil {
		return nil
	}
	if c, rawErr := l.f.SyscallConn(); rawErr == nil {
		c.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_WR) })
	}
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return nil
	}
	return fmt.Errorf("write to the control descriptor: %w", err)
}

func (l *link) close() { l.f.Close() }

// A child is a process that we started and speak to.
type child struct {
	*link
	pid    int
	ended  bool
	status unix.WaitStatus // once ended
	lost   error           // ended, and the kernel does not tell how
}

// start starts this binary in a role. Every descriptor that the caller of run
// left open goes along under its own number; so does the link's, which is the
// only one of ours that does.
func start(binary string, args func(control int) []string, env []string, attr *syscall.SysProcAttr) (*child, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := fds[0], fds[1]
	defer unix.Close(theirs)
	if _, err := unix.FcntlInt(uintptr(theirs), unix.F_SETFD, 0); err != nil {
		unix.Close(ours)
		return nil, fmt.Errorf("fcntl: %w", err)
	}
	pid, err := syscall.ForkExec(binary, append([]string{"oncefs"}, args(theirs)...), &syscall.ProcAttr{Env: env, Files: []uintptr{0, 1, 2}, Sys: attr})
	if err != nil {
		unix.Close(ours)
		return nil, fmt.Errorf("start %s: %w", binary, err)
	}
	l, err := newLink(ours)
	if err != nil {
		unix.Kill(pid, unix.SIGKILL)
		return nil, err
	}
	return &child{link: l, pid: pid}, nil
}

// code is how a shell tells the end of a process: its status, or 128 and the
// signal's number.
func code(ws unix.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// lostStatus is of a process that ended nobody knows how: exit status 1.
const lostStatus = unix.WaitStatus(1 << 8)

// A reaper waits for every child of this process, also for those that it never
// started: orphans come to it.
type reaper struct {
	wake chan os.Signal
}

func newReaper() (*reaper, error) {
	r := &reaper{wake: make(chan os.Signal, 1)}
	signal.Notify(r.wake, unix.SIGCHLD)
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("prctl PR_SET_CHILD_SUBREAPER: %w", err)
	}
	return r, nil
}

// reap collects who has ended and notes it in those of the given that did.
func (r *reaper) reap(known ...*child) {
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			// There are no children. One that was not seen to end never will be.
			for _, c := range known {
				if c != nil && !c.ended {
					c.ended, c.status, c.lost = true, lostStatus, fmt.Errorf("wait for process %d: wait4: %w", c.pid, err)
				}
			}
			return
		}
		if pid <= 0 {
			return
		}
		for _, c := range known {
			if c != nil && c.pid == pid && !c.ended {
				c.ended, c.status = true, ws
			}
		}
	}
}

// ownChildren lists the children of this process, zombies too, but for one.
// Nobody but the caller's goroutine reaps, so none of the numbers can be used
// again before it does.
func ownChildren(except int) []int {
	return slices.DeleteFunc(process.Children(os.Getpid()), func(pid int) bool { return pid == except })
}
