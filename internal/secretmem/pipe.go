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
}

// MaxSend is the most data that one Send carries, 128 KiB: the 32 pages that
// the kernel asks for in one FUSE read unless more was negotiated.
const MaxSend = 128 << 10

// pipeSize holds MaxSend and a header, each page in a slot of its own.
const pipeSize = 256 << 10

// NewPipe makes a pipe that takes a whole reply without a reader, so that
// filling it can never block.
func NewPipe() (*Pipe, error) {
	p := &Pipe{r: -1, w: -1}
	if err := p.open(); err != nil {
		return nil, err
	}
	return p, nil
}

func (p *Pipe) open() error {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return fmt.Errorf("pipe2: %w", err)
	}
	if _, err := unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return fmt.Errorf("cannot make a pipe of %d bytes (see /proc/sys/fs/pipe-max-size and pipe-user-pages-soft): %w", pipeSize, err)
	}
	p.r, p.w = fds[0], fds[1]
	return nil
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
		// What did not go out is still in the pipe: start over with an empty one.
		p.close()
		if again := p.open(); again != nil {
			return errors.Join(err, again)
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

// Scrub gives the pipe's pages back to the kernel: an idle pipe keeps a few to
// use again, and they hold the last bytes that went through.
func (p *Pipe) Scrub() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.r < 0 {
		return nil
	}
	p.close()
	return p.open()
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
	}
	p.r, p.w = -1, -1
}
