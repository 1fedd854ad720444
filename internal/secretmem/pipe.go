package secretmem

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// A Pipe carries bytes of a buffer to a descriptor that would otherwise need
// them in ordinary memory: a FUSE device pins the pages of a plain write, and
// secret memory cannot be pinned (EFAULT). It may be used by several goroutines.
type Pipe struct {
	mu   sync.Mutex
	r, w int // -1 when closed
	null int // /dev/null, where bytes go without being looked at
}

// MaxSend is the most data that one Send carries, 128 KiB: the 32 pages that
// the kernel asks for in one FUSE read unless more was negotiated.
const MaxSend = 128 << 10

// pipeSize holds MaxSend and a header, each page in a slot of its own.
const pipeSize = 256 << 10

// NewPipe makes a pipe that takes a whole reply without a reader, so that
// filling it can never block.
func NewPipe() (*Pipe, error) {
	null, err := unix.Open("/dev/null", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/null: %w", err)
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		unix.Close(null)
		return nil, fmt.Errorf("pipe2: %w", err)
	}
	p := &Pipe{r: fds[0], w: fds[1], null: null}
	if _, err := unix.FcntlInt(uintptr(p.w), unix.F_SETPIPE_SZ, pipeSize); err != nil {
		p.Close()
		return nil, fmt.Errorf("cannot make a pipe of %d bytes (see /proc/sys/fs/pipe-max-size and pipe-user-pages-soft): %w", pipeSize, err)
	}
	return p, nil
}

// ErrClosed is returned by Send after Close.
var ErrClosed = errors.New("the pipe is closed")

// Send passes head and then n bytes of b at off to the descriptor dst as one
// message. The error of the last step is returned as the kernel gave it: for a
// FUSE device, unix.ENOENT means that the request was no longer waiting and
// that not a byte went out.
func (p *Pipe) Send(dst int, head []byte, b *Buffer, off, n int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.r < 0 {
		return ErrClosed
	}
	if n > MaxSend {
		return fmt.Errorf("%d bytes in one message; the most is %d", n, MaxSend)
	}
	err := p.send(dst, head, b, off, n)
	if err != nil {
		// What did not go out is still in the pipe.
		if left := p.drain(); left != nil {
			p.close() // better no reply than a wrong one
			return errors.Join(err, left)
		}
	}
	return err
}

func (p *Pipe) send(dst int, head []byte, b *Buffer, off, n int64) error {
	if _, err := ignoringEINTR(func() (int, error) { return unix.Write(p.w, head) }); err != nil {
		return fmt.Errorf("write to pipe: %w", err)
	}
	if err := b.writeTo(p.w, off, n); err != nil {
		return fmt.Errorf("write to pipe: %w", err)
	}
	total := len(head) + int(n)
	sent, err := ignoringEINTR(func() (int, error) {
		m, err := unix.Splice(p.r, nil, dst, nil, total, 0)
		return int(m), err
	})
	if err != nil {
		return err
	}
	if sent != total {
		return fmt.Errorf("%d of %d bytes went out", sent, total)
	}
	return nil
}

// drain throws away what is in the pipe; it never enters this process.
func (p *Pipe) drain() error {
	for {
		n, err := ignoringEINTR(func() (int, error) {
			m, err := unix.Splice(p.r, nil, p.null, nil, pipeSize, unix.SPLICE_F_NONBLOCK)
			return int(m), err
		})
		switch {
		case err == unix.EAGAIN || err == nil && n == 0:
			return nil
		case err != nil:
			return fmt.Errorf("drain the pipe: %w", err)
		}
	}
}

// Scrub overwrites the pages that an idle pipe keeps to use again: they hold
// the last bytes that went through. The kernel keeps two at most; zeros go
// through more.
func (p *Pipe) Scrub() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.r < 0 {
		return nil
	}
	zeros := make([]byte, 4*unix.Getpagesize())
	if _, err := ignoringEINTR(func() (int, error) { return unix.Write(p.w, zeros) }); err != nil {
		return fmt.Errorf("scrub the pipe: %w", err)
	}
	return p.drain()
}

// Close gives up the pipe.
func (p *Pipe) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.close()
}

func (p *Pipe) close() {
	if p.r >= 0 {
		unix.Close(p.r)
		unix.Close(p.w)
		unix.Close(p.null)
	}
	p.r, p.w, p.null = -1, -1, -1
}
