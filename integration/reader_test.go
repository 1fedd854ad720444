package integration

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"oncefs/integration/rig"
)

// reader does the operations that come on standard input, a line each, and
// answers a line each. Descriptors are numbered from 0 in the order of opening.
func reader(args []string) int {
	r := &ops{}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		fmt.Println(r.do(strings.Split(lines.Text(), "\t")))
	}
	return 0
}

func sum(b []byte) string { return fmt.Sprintf("%d bytes %x", len(b), sha256.Sum256(b)) }

func name(err error) string {
	for e := err; e != nil; {
		if errno, ok := e.(unix.Errno); ok {
			return unix.ErrnoName(errno)
		}
		u, ok := e.(interface{ Unwrap() error })
		if !ok {
			break
		}
		e = u.Unwrap()
	}
	return err.Error()
}

type ops struct {
	fds    []int
	mapped []byte
}

func (r *ops) opened(fd int, err error) string {
	if err != nil {
		return name(err)
	}
	r.fds = append(r.fds, fd)
	return "ok"
}

func ok(err error) string {
	if err != nil {
		return name(err)
	}
	return "ok"
}

func number(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		panic(err)
	}
	return n
}

func (r *ops) do(op []string) string {
	arg := func(i int) string {
		if i < len(op) {
			return op[i]
		}
		return ""
	}
	fd := func() int { return r.fds[len(r.fds)-1] }
	stat := func(st *unix.Stat_t, err error) string {
		if err != nil {
			return name(err)
		}
		return fmt.Sprintf("%o %d", st.Mode, st.Size)
	}
	var st unix.Stat_t
	switch op[0] {
	case "open":
		return r.opened(unix.Open(arg(1), unix.O_RDONLY|unix.O_CLOEXEC, 0))
	case "open-thread": // in a thread that is not the process's first
		type result struct {
			fd  int
			err error
		}
		opened := make(chan result)
		var try func()
		try = func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if unix.Gettid() == unix.Getpid() {
				done := make(chan struct{})
				go func() { defer close(done); try() }() // cannot be this thread, which is locked
				<-done
				return
			}
			fd, err := unix.Open(arg(1), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			opened <- result{fd, err}
		}
		go try()
		res := <-opened
		return r.opened(res.fd, res.err)
	case "open-with": // flags in octal
		flags, _ := strconv.ParseUint(arg(2), 8, 32)
		return r.opened(unix.Open(arg(1), int(flags), 0o600))
	case "use": // make the n-th descriptor the current one
		n := number(arg(1))
		r.fds = append(r.fds, r.fds[n])
		return "ok"
	case "dup":
		return r.opened(unix.Dup(fd()))
	case "reopen":
		return r.opened(unix.Open("/proc/self/fd/"+strconv.Itoa(fd()), unix.O_RDONLY, 0))
	case "reopen-dev":
		return r.opened(unix.Open("/dev/fd/"+strconv.Itoa(fd()), unix.O_RDONLY, 0))
	case "fd": // for another process to try
		return strconv.Itoa(fd())
	case "close":
		last := fd()
		r.fds = r.fds[:len(r.fds)-1]
		return ok(unix.Close(last))
	case "read":
		buf := make([]byte, number(arg(1)))
		n, err := unix.Read(fd(), buf)
		if err != nil {
			return name(err)
		}
		return strconv.Quote(string(buf[:n]))
	case "read-all":
		var all []byte
		buf := make([]byte, 100_000)
		for {
			n, err := unix.Read(fd(), buf)
			if err != nil {
				return name(err)
			}
			if n == 0 {
				return sum(all)
			}
			all = append(all, buf[:n]...)
		}
	case "pread":
		buf := make([]byte, number(arg(1)))
		n, err := unix.Pread(fd(), buf, int64(number(arg(2))))
		if err != nil {
			return name(err)
		}
		return strconv.Quote(string(buf[:n]))
	case "seek":
		n, err := unix.Seek(fd(), int64(number(arg(1))), number(arg(2)))
		if err != nil {
			return name(err)
		}
		return strconv.FormatInt(n, 10)
	case "fstat":
		err := unix.Fstat(fd(), &st)
		return stat(&st, err)
	case "stat":
		err := unix.Stat(arg(1), &st)
		return stat(&st, err)
	case "lstat":
		err := unix.Lstat(arg(1), &st)
		return stat(&st, err)
	case "ino":
		if err := unix.Stat(arg(1), &st); err != nil {
			return name(err)
		}
		return fmt.Sprint(st.Ino)
	case "owner":
		if err := unix.Stat(arg(1), &st); err != nil {
			return name(err)
		}
		return fmt.Sprint(st.Uid, " ", st.Gid)
	case "mtime":
		if err := unix.Stat(arg(1), &st); err != nil {
			return name(err)
		}
		return fmt.Sprint(st.Mtim.Sec)
	case "access":
		return ok(unix.Access(arg(1), unix.R_OK))
	case "access-write":
		return ok(unix.Access(arg(1), unix.W_OK))
	case "list":
		entries, err := os.ReadDir(arg(1))
		if err != nil {
			return name(err)
		}
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return strings.Join(names, " ")
	case "list-fd": // an open directory, from its start
		unix.Seek(fd(), 0, 0)
		buf := make([]byte, 1<<16)
		n, err := unix.Getdents(fd(), buf)
		if err != nil {
			return name(err)
		}
		_, _, names := unix.ParseDirent(buf[:n], -1, nil)
		return strings.Join(names, " ")
	case "getxattr":
		buf := make([]byte, 64<<10)
		_, err := unix.Getxattr(arg(1), arg(2), buf)
		return ok(err)
	case "listxattr":
		n, err := unix.Listxattr(arg(1), make([]byte, 100))
		if err != nil {
			return name(err)
		}
		return strconv.Itoa(n)
	case "opath":
		return r.opened(unix.Open(arg(1), unix.O_PATH, 0))
	case "mmap":
		size := number(arg(1))
		m, err := unix.Mmap(fd(), 0, size, unix.PROT_READ, unix.MAP_PRIVATE)
		if err != nil {
			return name(err)
		}
		s := sum(m)
		unix.Munmap(m)
		return s
	case "map": // and keep it
		var err error
		r.mapped, err = unix.Mmap(fd(), 0, number(arg(1)), unix.PROT_READ, unix.MAP_PRIVATE)
		return ok(err)
	case "touch": // a byte of what is mapped
		off := number(arg(1))
		pr, pw, err := os.Pipe()
		if err != nil {
			return name(err)
		}
		defer pr.Close()
		defer pw.Close()
		// The kernel touches it: what would kill us is EFAULT there.
		if _, err := unix.Write(int(pw.Fd()), r.mapped[off:off+1]); err != nil {
			return name(err)
		}
		var b [1]byte
		pr.Read(b[:])
		return strconv.Quote(string(b[:]))
	case "sendfile", "splice", "copy_file_range":
		return transfer(op[0], fd(), number(arg(1)))
	case "advise":
		return ok(unix.Fadvise(fd(), 0, 0, unix.FADV_SEQUENTIAL))
	case "cached": // pages of the open file in the page cache, by cachestat(2)
		return cached(fd())
	case "change":
		return change(arg(1), arg(2))
	}
	return "no such operation: " + op[0]
}

// transfer moves size bytes by a system call that does not give them to the
// process, and returns the sum of what arrived.
func transfer(how string, from, size int) string {
	dir, err := os.MkdirTemp("", rig.Prefix)
	if err != nil {
		return err.Error()
	}
	defer os.RemoveAll(dir)
	to, err := os.Create(filepath.Join(dir, "to"))
	if err != nil {
		return err.Error()
	}
	defer to.Close()
	unix.Seek(from, 0, 0)
	for left := size; left > 0; {
		var n int
		switch how {
		case "sendfile":
			n, err = unix.Sendfile(int(to.Fd()), from, nil, left)
		case "copy_file_range":
			n, err = unix.CopyFileRange(from, nil, int(to.Fd()), nil, left, 0)
		case "splice":
			var p [2]int
			unix.Pipe(p[:])
			var m int64
			m, err = unix.Splice(from, nil, p[1], nil, min(left, 60_000), 0)
			if err == nil {
				m, err = unix.Splice(p[0], nil, int(to.Fd()), nil, int(m), 0)
			}
			n = int(m)
			unix.Close(p[0])
			unix.Close(p[1])
		}
		if err != nil {
			return name(err)
		}
		if n == 0 {
			break
		}
		left -= n
	}
	b, err := os.ReadFile(to.Name())
	if err != nil {
		return err.Error()
	}
	return sum(b)
}

// cached asks cachestat(2), Linux 6.5, number 451 on every architecture.
func cached(fd int) string {
	var rng [2]uint64
	var stat [5]uint64 // nr_cache, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted
	_, _, errno := unix.Syscall6(451, uintptr(fd), uintptr(unsafe.Pointer(&rng)), uintptr(unsafe.Pointer(&stat)), 0, 0, 0)
	if errno != 0 {
		return name(errno)
	}
	return fmt.Sprint(stat[0], " cached")
}

// change tries one way to change a file or its place.
func change(how, path string) string {
	var fd int
	var err error
	beside := filepath.Join(filepath.Dir(path), "new")
	switch how {
	case "write":
		fd, err = unix.Open(path, unix.O_WRONLY, 0)
	case "read-write":
		fd, err = unix.Open(path, unix.O_RDWR, 0)
	case "truncate-open":
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_TRUNC, 0)
	case "append":
		fd, err = unix.Open(path, unix.O_WRONLY|unix.O_APPEND, 0)
	case "truncate":
		err = unix.Truncate(path, 0)
	case "chmod":
		err = unix.Chmod(path, 0o777)
	case "chown":
		err = unix.Chown(path, os.Getuid(), os.Getgid())
	case "utimes":
		err = unix.Utimes(path, nil)
	case "unlink":
		err = unix.Unlink(path)
	case "rename":
		err = unix.Rename(path, beside)
	case "rename-over":
		err = unix.Rename(filepath.Join(filepath.Dir(path), "other.txt"), path)
	case "link":
		err = unix.Link(path, beside)
	case "symlink":
		err = unix.Symlink("x", beside)
	case "create":
		fd, err = unix.Open(beside, unix.O_CREAT|unix.O_WRONLY, 0o600)
	case "tmpfile":
		fd, err = unix.Open(filepath.Dir(path), unix.O_TMPFILE|unix.O_WRONLY, 0o600)
	case "mkdir":
		err = unix.Mkdir(beside, 0o700)
	case "mknod":
		err = unix.Mkfifo(beside, 0o600)
	case "setxattr":
		err = unix.Setxattr(path, "user.x", []byte("y"), 0)
	case "removexattr":
		err = unix.Removexattr(path, "user.x")
	default:
		return "no such change: " + how
	}
	if err == nil && fd > 0 {
		unix.Close(fd)
	}
	return ok(err)
}
