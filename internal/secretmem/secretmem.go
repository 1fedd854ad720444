// Package secretmem holds bytes that can be wiped and not be looked at.
//
// A [Buffer] lives in memory made by memfd_secret(2): its pages are taken out
// of the kernel's own map, so that neither /proc/PID/mem nor
// process_vm_readv(2) nor a debugger's core can read them, not even for root.
// Where the kernel has no memfd_secret, a [Store] that does not insist on it
// uses anonymous memory that is locked against swap and left out of cores, and
// says so in its [Kind].
//
// Bytes enter by read(2) from a descriptor and leave by write(2) into a pipe.
// No constructor takes a byte slice and no method gives one out, so there is no
// copy on the Go heap that a caller could forget. What wiping cannot reach:
// the kernel's own pages while a pipe holds them, and whatever the reader does.
package secretmem

import (
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Kind names the kernel facility that backs a store's buffers.
type Kind string

const (
	// Secret is memfd_secret(2), Linux 5.14 and later, unless it was switched
	// off with secretmem.enable=0.
	Secret Kind = "memfd_secret"
	// Locked is anonymous memory with mlock(2), MADV_DONTDUMP and
	// MADV_WIPEONFORK. Root can read it through /proc/PID/mem.
	Locked Kind = "mlock"
)

// ErrNoSecret says that the kernel offers no memfd_secret and that the caller
// would have nothing less.
var ErrNoSecret = errors.New("the kernel offers no memfd_secret")

// ErrTooLarge says that a buffer would have grown beyond the most it may hold.
var ErrTooLarge = errors.New("larger than the most that may be held")

// A LimitError says that memory could not be locked. The usual cause is
// RLIMIT_MEMLOCK, which counts secret memory too unless the process has
// CAP_IPC_LOCK.
type LimitError struct {
	Need  int64  // bytes that this buffer would hold locked
	Limit uint64 // RLIMIT_MEMLOCK in bytes; unix.RLIM_INFINITY if unlimited
	Err   error
}

func (e *LimitError) Error() string {
	limit := "unlimited"
	if e.Limit != unix.RLIM_INFINITY {
		limit = fmt.Sprintf("%d bytes", e.Limit)
	}
	return fmt.Sprintf("cannot lock %d bytes of memory (RLIMIT_MEMLOCK is %s): %v", e.Need, limit, e.Err)
}

func (e *LimitError) Unwrap() error { return e.Err }

// A Store makes buffers of one kind and counts those that are alive. It may be
// used by several goroutines.
type Store struct {
	kind Kind
	live atomic.Int64

	preparers chan struct{} // room for who makes memory ready
}

// Open finds out what the kernel offers. With requireSecret it returns
// ErrNoSecret rather than a store of a lesser kind.
func Open(requireSecret bool) (*Store, error) {
	fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
	if err == nil {
		unix.Close(fd)
		return newStore(Secret), nil
	}
	if requireSecret {
		return nil, fmt.Errorf("%w: %w", ErrNoSecret, err)
	}
	return newStore(Locked), nil
}

func newStore(k Kind) *Store { return &Store{kind: k, preparers: make(chan struct{}, preparers)} }

// Kind tells what backs the store's buffers.
func (s *Store) Kind() Kind { return s.kind }

// Live tells how many buffers were made and not yet wiped.
func (s *Store) Live() int64 { return s.live.Load() }

// NewBuffer makes an empty buffer that may grow to max bytes. It must be wiped.
func (s *Store) NewBuffer(max int64) *Buffer {
	s.live.Add(1)
	return &Buffer{store: s, max: max}
}

// mapSegment makes one segment. A memfd_secret file cannot be resized once it has a
// size, hence growth by segments; its descriptor is closed at once, because a
// descriptor could be passed on and mapped elsewhere.
func (s *Store) mapSegment(n int) ([]byte, error) {
	if s.kind == Secret {
		fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
		if err != nil {
			return nil, fmt.Errorf("memfd_secret: %w", err)
		}
		defer unix.Close(fd)
		if err := unix.Ftruncate(fd, int64(n)); err != nil {
			return nil, fmt.Errorf("memfd_secret: ftruncate: %w", err)
		}
		// MAP_POPULATE is left out: it cannot fault secret memory in.
		m, err := mmap(fd, n, unix.MAP_SHARED)
		if err != nil {
			return nil, fmt.Errorf("memfd_secret: mmap: %w", err)
		}
		// A child made by fork would share the pages; none needs them.
		if err := unix.Madvise(m, unix.MADV_DONTFORK); err != nil {
			munmap(m)
			return nil, fmt.Errorf("memfd_secret: madvise: %w", err)
		}
		return m, nil
	}
	m, err := mmap(-1, n, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	for _, advice := range []int{unix.MADV_DONTDUMP, unix.MADV_DONTFORK, unix.MADV_WIPEONFORK} {
		if err := unix.Madvise(m, advice); err != nil {
			munmap(m)
			return nil, fmt.Errorf("madvise: %w", err)
		}
	}
	if err := unix.Mlock(m); err != nil {
		munmap(m)
		return nil, fmt.Errorf("mlock: %w", err)
	}
	return m, nil
}

func mmap(fd, n, flags int) ([]byte, error) {
	p, err := unix.MmapPtr(fd, 0, nil, uintptr(n), unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return nil, err
	}
	return unsafe.Slice((*byte)(p), n), nil
}

// munmap gives back whole pages, which may be a part of a mapping.
func munmap(m []byte) error {
	return unix.MunmapPtr(unsafe.Pointer(unsafe.SliceData(m)), uintptr(len(m)))
}

// A Buffer is secret memory that grows as it is filled. Its methods may be
// called by several goroutines; the caller sees to it that filling has ended
// before the buffer is sent.
type Buffer struct {
	store *Store
	max   int64

	mu    sync.Mutex
	segs  [][]byte // of whole pages; each is full before the next is used
	size  int64
	room  int64 // bytes mapped
	wiped bool

	used  int64 // bytes that may hold something; more than size after a read that failed
	ready preparing
}

// ErrWiped is returned by every use of a buffer after Wipe.
var ErrWiped = errors.New("the secret was wiped")

// Size is the number of bytes held.
func (b *Buffer) Size() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.size
}

// Segments are multiples of the page and double, so that a small secret costs
// one page and a large one few mappings.
const maxSegment = 16 << 20

// grow maps more: as much as there is, if there is so much, or else less, so that all
// that may be locked can be used.
func (b *Buffer) grow() error {
	page := int64(unix.Getpagesize())
	n := page
	if len(b.segs) > 0 {
		n = min(b.room, maxSegment)
	}
	err := b.add(n)
	for err != nil && n > page {
		n = wholePages(n / 2)
		err = b.add(n)
	}
	if err == nil {
		return nil
	}
	var limit unix.Rlimit
	_ = unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit)
	// EAGAIN and ENOMEM are what mmap and mlock say beyond the limit; any
	// other failure means just as well that the bytes have no safe place.
	return &LimitError{Need: b.room + n, Limit: limit.Cur, Err: err}
}

// add maps n bytes more, of whole pages.
func (b *Buffer) add(n int64) error {
	seg, err := b.store.mapSegment(int(n))
	if err != nil {
		return err
	}
	b.segs = append(b.segs, seg)
	b.room += n
	return nil
}

// Fill reads exactly n bytes from the descriptor straight into the buffer's
// memory, once that is ready. It returns io.ErrUnexpectedEOF if fewer came,
// ErrTooLarge if the buffer may not hold them, a *LimitError if memory cannot be
// locked.
func (b *Buffer) Fill(fd int, n int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.wiped {
		return ErrWiped
	}
	if n < 0 || n > b.max-b.size {
		return ErrTooLarge
	}
	b.ready.wait()
	for n > 0 {
		if b.size == b.room {
			if err := b.grow(); err != nil {
				return err
			}
		}
		free := b.at(b.size)
		free = free[:min(n, int64(len(free)))]
		b.used = b.size + int64(len(free))
		got, err := ignoringEINTR(func() (int, error) { return unix.Read(fd, free) })
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		if got == 0 {
			return io.ErrUnexpectedEOF
		}
		b.size += int64(got)
		n -= int64(got)
	}
	return nil
}

// at is the memory from an offset on, as far as it is in one piece.
func (b *Buffer) at(off int64) []byte {
	for _, seg := range b.segs {
		if off < int64(len(seg)) {
			return seg[off:]
		}
		off -= int64(len(seg))
	}
	return nil
}

// writeTo writes the n bytes at off to the descriptor.
func (b *Buffer) writeTo(fd int, off, n int64) error {
	return b.write(off, n, func(p []byte) (int, error) { return unix.Write(fd, p) })
}

// write gives the n bytes at off to write, part by part.
func (b *Buffer) write(off, n int64, write func([]byte) (int, error)) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.wiped {
		return ErrWiped
	}
	if off < 0 || n < 0 || off > b.size || n > b.size-off {
		return fmt.Errorf("%d bytes at %d of a buffer of %d", n, off, b.size)
	}
	for n > 0 {
		part := b.at(off)
		part = part[:min(n, int64(len(part)))]
		wrote, err := ignoringEINTR(func() (int, error) { return write(part) })
		if err != nil {
			return err
		}
		off += int64(wrote)
		n -= int64(wrote)
	}
	return nil
}

// Copy writes all of the buffer to a descriptor of any kind, also one that is
// non-blocking. What went out is out of our hands. A Wipe meanwhile waits.
func (b *Buffer) Copy(fd int) error {
	return b.write(0, b.Size(), func(p []byte) (int, error) {
		n, err := unix.Write(fd, p)
		if err == unix.EAGAIN {
			_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, -1)
			n = 0
		}
		return n, err
	})
}

// Equal compares what two buffers hold, in a time that depends on their sizes
// alone. A wiped buffer equals none. Two goroutines must not compare the same two
// the other way round at once.
func (b *Buffer) Equal(other *Buffer) bool {
	if b == other {
		return true
	}
	same := b.Size() == other.Size()
	var off int64
	err := b.write(0, b.Size(), func(p []byte) (int, error) {
		if !same {
			return len(p), nil
		}
		at := 0
		err := other.write(off, int64(len(p)), func(q []byte) (int, error) {
			if subtle.ConstantTimeCompare(p[at:at+len(q)], q) != 1 {
				same = false
			}
			at += len(q)
			return len(q), nil
		})
		off += int64(len(p))
		return len(p), err
	})
	return same && err == nil
}

// Wipe overwrites the memory with zeros, looks that they are there, and unmaps
// it. It may be called again, to no effect. An error means that the memory
// could not be unmapped; it holds zeros all the same.
func (b *Buffer) Wipe() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.wiped {
		return nil
	}
	b.wiped = true
	b.store.live.Add(-1)
	b.ready.end()
	var errs []error
	for _, seg := range b.segs {
		// Where nothing was read to there need not even be a page.
		used := seg[:wholePages(min(b.used, int64(len(seg))))]
		b.used = max(0, b.used-int64(len(used)))
		clear(used)
		// Looking also keeps the stores from being taken for dead.
		if !allZero(used) {
			errs = append(errs, errors.New("memory was not zeroed"))
		}
		if err := munmap(seg); err != nil {
			errs = append(errs, fmt.Errorf("munmap: %w", err))
		}
	}
	b.segs = nil
	return errors.Join(errs...)
}

// wholePages is the size of the pages that n bytes take.
func wholePages(n int64) int64 {
	page := int64(unix.Getpagesize())
	return (n + page - 1) / page * page
}

//go:noinline
func allZero(seg []byte) bool {
	words := unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(seg))), len(seg)/8)
	var or uint64
	for _, w := range words {
		or |= w
	}
	return or == 0
}

func ignoringEINTR(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if err != unix.EINTR {
			return n, err
		}
	}
}
