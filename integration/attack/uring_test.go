package attack

import (
	"errors"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The parts of linux/io_uring.h that one request takes.
type uringParams struct {
	sqEntries, cqEntries, flags, threadCPU, threadIdle, features, wqFD uint32
	_                                                                  [3]uint32
	sq                                                                 struct {
		head, tail, mask, entries, flags, dropped, array, _ uint32
		_                                                   uint64
	}
	cq struct {
		head, tail, mask, entries, overflow, cqes, flags, _ uint32
		_                                                   uint64
	}
}

type uringEntry struct {
	opcode, flags uint8
	ioprio        uint16
	fd            int32
	off, addr     uint64
	len, opflags  uint32
	data          uint64
	_             [3]uint64
}

const (
	uringOpenat = 18
	uringReadOp = 22
	uringEnter  = 1 // IORING_ENTER_GETEVENTS
)

type uring struct {
	fd          int
	rings, sqes []byte
	p           uringParams
}

func newUring() (*uring, error) {
	u := &uring{}
	r, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 4, uintptr(unsafe.Pointer(&u.p)), 0)
	if errno != 0 {
		return nil, errno
	}
	u.fd = int(r)
	unix.CloseOnExec(u.fd)
	if u.p.features&1 == 0 { // IORING_FEAT_SINGLE_MMAP, Linux 5.4
		return nil, errors.New("an io_uring of long ago")
	}
	var err error
	size := max(int(u.p.sq.array+u.p.sqEntries*4), int(u.p.cq.cqes+u.p.cqEntries*16))
	if u.rings, err = unix.Mmap(u.fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return nil, err
	}
	u.sqes, err = unix.Mmap(u.fd, 0x10000000, int(u.p.sqEntries)*64, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	return u, err
}

func (u *uring) close() {
	unix.Munmap(u.rings)
	unix.Munmap(u.sqes)
	unix.Close(u.fd)
}

func (u *uring) word(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&u.rings[off])) }

// do has one request done and returns its result.
func (u *uring) do(e uringEntry) (int, error) {
	tail := atomic.LoadUint32(u.word(u.p.sq.tail))
	index := tail & *u.word(u.p.sq.mask)
	*(*uringEntry)(unsafe.Pointer(&u.sqes[index*64])) = e
	*u.word(u.p.sq.array + index*4) = index
	atomic.StoreUint32(u.word(u.p.sq.tail), tail+1)
	for {
		_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(u.fd), 1, 1, uringEnter, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return 0, errno
		}
		break
	}
	head := atomic.LoadUint32(u.word(u.p.cq.head))
	if head == atomic.LoadUint32(u.word(u.p.cq.tail)) {
		return 0, errors.New("io_uring: no completion")
	}
	at := u.p.cq.cqes + head&*u.word(u.p.cq.mask)*16
	result := int32(*u.word(at + 8))
	atomic.StoreUint32(u.word(u.p.cq.head), head+1)
	if result < 0 {
		return 0, unix.Errno(-result)
	}
	return int(result), nil
}

func (u *uring) read(fd, size int) ([]byte, error) {
	// Outside Go's memory: a late completion must not write into it.
	b, err := unix.Mmap(-1, 0, size+4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	all := 0
	for {
		n, err := u.do(uringEntry{opcode: uringReadOp, fd: int32(fd), off: uint64(all), addr: uint64(uintptr(unsafe.Pointer(&b[all]))), len: uint32(len(b) - all)})
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return b[:all], nil
		}
		all += n
	}
}

func uringRead(fd, size int) ([]byte, error) {
	u, err := newUring()
	if err != nil {
		return nil, err
	}
	defer u.close()
	return u.read(fd, size)
}

func uringOpenRead(path string, size int) ([]byte, error) {
	u, err := newUring()
	if err != nil {
		return nil, err
	}
	defer u.close()
	name, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	copy(name, path)
	fd, err := u.do(uringEntry{opcode: uringOpenat, fd: unix.AT_FDCWD, addr: uint64(uintptr(unsafe.Pointer(&name[0]))), opflags: unix.O_RDONLY | unix.O_CLOEXEC})
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	return u.read(fd, size)
}
