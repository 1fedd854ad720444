package warden

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"oncefs/internal/process"
	"oncefs/internal/wait"
)

// Readers asks the warden who processes are, for the log. Every reader waits for
// that, so it has a socket of its own that keeps messages apart (SOCK_SEQPACKET),
// and no more system calls than it must. It is not for use after Warden.Close.
//
// A question is its number and the process's, u64 and u32; the answer is the
// same u64, the executable, a NUL, and the control group. Both processes are this
// binary, so numbers are as the machine has them.
type Readers struct {
	f   *os.File
	fd  int // f's, which f cannot be asked for without a change
	buf [answerMost]byte
}

const (
	questionSize = 8 + 4
	// answerMost is more than what process.Exe and process.Cgroup tell.
	answerMost = 8 + unix.PathMax + 1 + 16<<10
)

// newReaders makes both ends, ours non-blocking. Ours is wrapped before it becomes
// so: the Go runtime would wake up for every answer, to tell nobody.
func newReaders() (_ *Readers, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	r := &Readers{f: os.NewFile(uintptr(fds[0]), "warden"), fd: fds[0]}
	theirs = os.NewFile(uintptr(fds[1]), "warden's end")
	if err := unix.SetNonblock(r.fd, true); err != nil {
		r.f.Close()
		theirs.Close()
		return nil, nil, err
	}
	return r, theirs, nil
}

// FD is readable when there is an answer.
func (r *Readers) FD() int { return r.fd }

// Ask asks about a process and does not wait.
func (r *Readers) Ask(id uint64, pid uint32) error {
	var q [questionSize]byte
	binary.NativeEndian.PutUint64(q[:], id)
	binary.NativeEndian.PutUint32(q[8:], pid)
	_, err := r.f.Write(q[:])
	return err
}

// Answer is the next answer, in the order of the questions; an error that is
// unix.EAGAIN says that there is none yet. What cannot be known is "".
func (r *Readers) Answer() (id uint64, exe, cgroup string, err error) {
	n, err := r.f.Read(r.buf[:])
	if err != nil {
		return 0, "", "", err
	}
	if n < 8 {
		return 0, "", "", io.ErrUnexpectedEOF // or the warden is gone
	}
	e, c, _ := bytes.Cut(r.buf[8:n], []byte{0})
	return binary.NativeEndian.Uint64(r.buf[:]), string(e), string(c), nil
}

// answerReaders is the warden's end: one question after another, for none takes
// longer than a look into /proc.
func answerReaders() {
	f := os.NewFile(readersFD, "readers")
	var q [questionSize]byte
	a := make([]byte, 0, answerMost)
	due := []unix.PollFd{{Fd: readersFD, Events: unix.POLLIN}}
	for w := (wait.Waiter{}); ; {
		if err := w.Poll(due, -1); err != nil {
			return
		}
		if due[0].Revents == 0 {
			continue
		}
		if n, err := f.Read(q[:]); err != nil || n != len(q) {
			return // the serving process is gone
		}
		pid := binary.NativeEndian.Uint32(q[8:])
		a = append(a[:0], q[:8]...)
		a = append(append(a, process.Exe(pid)...), 0)
		a = append(a, process.Cgroup(pid)...)
		if _, err := f.Write(a); err != nil {
			return
		}
	}
}
