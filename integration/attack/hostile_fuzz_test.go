package attack

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A call is a system call and what its arguments are, a letter each:
//
//	d directory     p path          f descriptor    x name of an attribute
//	g flags         s small number  o offset        m mode
//	b buffer        n its length    h struct open_how
//	w pipe to write to              z nothing
type call struct {
	name   string
	number uintptr
	args   string
}

// calls take a path or a descriptor of a file. Those that would take the process
// or the machine elsewhere (chdir, mount, umount, chroot) are not here but among
// the acts.
var calls = []call{
	{"open", unix.SYS_OPEN, "pgm"}, {"openat", unix.SYS_OPENAT, "dpgm"}, {"openat2", unix.SYS_OPENAT2, "dphn"}, {"creat", unix.SYS_CREAT, "pm"},
	{"read", unix.SYS_READ, "fbn"}, {"pread64", unix.SYS_PREAD64, "fbno"}, {"readv", unix.SYS_READV, "fbs"}, {"preadv2", unix.SYS_PREADV2, "fbsozg"},
	{"write", unix.SYS_WRITE, "fbn"}, {"pwrite64", unix.SYS_PWRITE64, "fbno"}, {"getdents64", unix.SYS_GETDENTS64, "fbn"}, {"lseek", unix.SYS_LSEEK, "fos"},
	{"close", unix.SYS_CLOSE, "f"}, {"dup", unix.SYS_DUP, "f"}, {"ioctl", unix.SYS_IOCTL, "fgb"}, {"mmap", unix.SYS_MMAP, "znsgfo"},
	{"sendfile", unix.SYS_SENDFILE, "wfzn"}, {"splice", unix.SYS_SPLICE, "fzwzng"}, {"copy_file_range", unix.SYS_COPY_FILE_RANGE, "fzfznz"},
	{"stat", unix.SYS_STAT, "pb"}, {"lstat", unix.SYS_LSTAT, "pb"}, {"fstat", unix.SYS_FSTAT, "fb"}, {"newfstatat", unix.SYS_NEWFSTATAT, "dpbg"},
	{"statx", unix.SYS_STATX, "dpggb"}, {"statfs", unix.SYS_STATFS, "pb"}, {"fstatfs", unix.SYS_FSTATFS, "fb"},
	{"access", unix.SYS_ACCESS, "ps"}, {"faccessat", unix.SYS_FACCESSAT, "dps"}, {"faccessat2", unix.SYS_FACCESSAT2, "dpsg"},
	{"readlink", unix.SYS_READLINK, "pbn"}, {"readlinkat", unix.SYS_READLINKAT, "dpbn"},
	{"getxattr", unix.SYS_GETXATTR, "pxbn"}, {"lgetxattr", unix.SYS_LGETXATTR, "pxbn"}, {"fgetxattr", unix.SYS_FGETXATTR, "fxbn"},
	{"listxattr", unix.SYS_LISTXATTR, "pbn"}, {"llistxattr", unix.SYS_LLISTXATTR, "pbn"}, {"flistxattr", unix.SYS_FLISTXATTR, "fbn"},
	{"setxattr", unix.SYS_SETXATTR, "pxbns"}, {"fsetxattr", unix.SYS_FSETXATTR, "fxbns"}, {"removexattr", unix.SYS_REMOVEXATTR, "px"}, {"fremovexattr", unix.SYS_FREMOVEXATTR, "fx"},
	{"chmod", unix.SYS_CHMOD, "pm"}, {"fchmod", unix.SYS_FCHMOD, "fm"}, {"fchmodat2", unix.SYS_FCHMODAT2, "dpmg"},
	{"chown", unix.SYS_CHOWN, "pss"}, {"fchown", unix.SYS_FCHOWN, "fss"}, {"fchownat", unix.SYS_FCHOWNAT, "dpssg"}, {"utimensat", unix.SYS_UTIMENSAT, "dpzg"},
	{"truncate", unix.SYS_TRUNCATE, "po"}, {"ftruncate", unix.SYS_FTRUNCATE, "fo"}, {"fallocate", unix.SYS_FALLOCATE, "fsoo"}, {"fadvise64", unix.SYS_FADVISE64, "foos"},
	{"readahead", unix.SYS_READAHEAD, "fon"}, {"sync_file_range", unix.SYS_SYNC_FILE_RANGE, "foog"}, {"fsync", unix.SYS_FSYNC, "f"}, {"fdatasync", unix.SYS_FDATASYNC, "f"}, {"syncfs", unix.SYS_SYNCFS, "f"},
	{"unlink", unix.SYS_UNLINK, "p"}, {"unlinkat", unix.SYS_UNLINKAT, "dpg"}, {"rename", unix.SYS_RENAME, "pp"}, {"renameat2", unix.SYS_RENAMEAT2, "dpdpg"},
	{"link", unix.SYS_LINK, "pp"}, {"linkat", unix.SYS_LINKAT, "dpdpg"}, {"symlink", unix.SYS_SYMLINK, "pp"}, {"mkdir", unix.SYS_MKDIR, "pm"}, {"mknod", unix.SYS_MKNOD, "pmz"}, {"rmdir", unix.SYS_RMDIR, "p"},
	{"name_to_handle_at", unix.SYS_NAME_TO_HANDLE_AT, "dpbbg"}, {"open_by_handle_at", unix.SYS_OPEN_BY_HANDLE_AT, "fbg"},
	{"flock", unix.SYS_FLOCK, "fs"}, {"fcntl", unix.SYS_FCNTL, "fss"}, {"inotify_add_watch", unix.SYS_INOTIFY_ADD_WATCH, "fpg"}, {"fanotify_mark", unix.SYS_FANOTIFY_MARK, "fggdp"},
	{"execveat", unix.SYS_EXECVEAT, "dpzzg"}, {"swapon", unix.SYS_SWAPON, "ps"}, {"quotactl_fd", unix.SYS_QUOTACTL_FD, "fssb"}, {"cachestat", 451, "fbbz"},
	{"open_tree", unix.SYS_OPEN_TREE, "dpg"}, {"fspick", unix.SYS_FSPICK, "dpg"}, {"epoll_ctl", unix.SYS_EPOLL_CTL, "fsfb"},
	{"setxattrat", 463, "dpgxbn"}, {"getxattrat", 464, "dpgxbn"}, {"listxattrat", 465, "dpgbn"}, {"removexattrat", 466, "dpgx"}, {"file_getattr", 468, "dpbng"}, {"file_setattr", 469, "dpbng"},
}

// marker is in every line of the content, so that any piece of it worth the name
// shows.
const marker = "oncefs-hostile-"

// fuzz makes random calls on the mount, the same for the same seed.
type fuzz struct {
	rng     *rand.Rand
	paths   []uintptr
	dir     uintptr // of paths
	attrs   []uintptr
	dirs    []int
	fds     []int
	pipe    [2]int
	buf     []byte // 1 MiB, and struct open_how behind it
	strings []byte
	next    int
}

const fuzzBuffer = 1 << 20

func newFuzz(seed uint64, dir, secret string, claimed int) *fuzz {
	f := &fuzz{rng: rand.New(rand.NewPCG(seed, 0))}
	// Outside Go's memory: the kernel gets bare addresses.
	f.buf, _ = unix.Mmap(-1, 0, fuzzBuffer+64, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	f.strings, _ = unix.Mmap(-1, 0, 1<<16, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	for _, p := range []string{secret, secret, secret, filepath.Base(secret), dir, filepath.Join(dir, "other.txt"), filepath.Join(dir, "sub"), filepath.Join(dir, "sub/deep.txt"), filepath.Join(dir, "new"), filepath.Join(dir, "link"), "", "."} {
		f.paths = append(f.paths, f.cstring(p))
	}
	f.dir = f.paths[4]
	for _, x := range []string{"user.x", "system.oncefs.status", "security.capability", "system.posix_acl_access", "trusted.x", ""} {
		f.attrs = append(f.attrs, f.cstring(x))
	}
	for _, flags := range []int{unix.O_RDONLY | unix.O_DIRECTORY, unix.O_PATH} {
		if fd, err := unix.Open(dir, flags, 0); err == nil {
			f.dirs = append(f.dirs, fd)
		}
	}
	if claimed >= 0 {
		f.fds = append(f.fds, claimed)
	}
	unix.Pipe2(f.pipe[:], unix.O_NONBLOCK)
	return f
}

func (f *fuzz) cstring(s string) uintptr {
	at := uintptr(unsafe.Pointer(&f.strings[f.next]))
	f.next += copy(f.strings[f.next:], s) + 1
	return at
}

func (f *fuzz) number() uintptr {
	switch f.rng.IntN(4) {
	case 0:
		return uintptr(f.rng.IntN(4096))
	case 1:
		return 1 << f.rng.IntN(63)
	case 2:
		return uintptr(f.rng.Uint64())
	}
	return uintptr(f.rng.IntN(400_000))
}

func (f *fuzz) argument(kind byte) uintptr {
	switch kind {
	case 'd':
		return uintptr(f.dirs[f.rng.IntN(len(f.dirs))])
	case 'p':
		return f.paths[f.rng.IntN(len(f.paths))]
	case 'x':
		return f.attrs[f.rng.IntN(len(f.attrs))]
	case 'f':
		if len(f.fds) == 0 || f.rng.IntN(4) == 0 {
			return f.argument('d')
		}
		return uintptr(f.fds[f.rng.IntN(len(f.fds))])
	case 'g':
		// A few bits, and none that makes anybody wait.
		var g uintptr
		for range f.rng.IntN(4) {
			g |= 1 << f.rng.IntN(24)
		}
		return g
	case 's':
		return uintptr(f.rng.IntN(16))
	case 'm':
		return uintptr(f.rng.IntN(0o200000))
	case 'o':
		return f.number()
	case 'b':
		return uintptr(unsafe.Pointer(&f.buf[0]))
	case 'n':
		return uintptr(f.rng.IntN(fuzzBuffer))
	case 'h':
		how := (*unix.OpenHow)(unsafe.Pointer(&f.buf[fuzzBuffer]))
		*how = unix.OpenHow{Flags: uint64(f.argument('g')), Resolve: uint64(f.rng.IntN(64))}
		return uintptr(unsafe.Pointer(how))
	case 'w':
		return uintptr(f.pipe[1])
	}
	return 0
}

// harmless keeps a call from waiting for others or for ever, and from signals.
func (f *fuzz) harmless(name string, a *[6]uintptr) bool {
	switch name {
	case "flock":
		a[1] |= unix.LOCK_NB
	case "fcntl":
		switch a[1] {
		case unix.F_SETLKW, unix.F_SETOWN, unix.F_SETSIG, unix.F_SETFD:
			return false
		}
	case "openat2":
		a[3] = unix.SizeofOpenHow
	case "readv", "preadv2":
		// struct iovec, which names the buffer's second half.
		binary.NativeEndian.PutUint64(f.buf, uint64(a[1])+fuzzBuffer/2)
		binary.NativeEndian.PutUint64(f.buf[8:], fuzzBuffer/2)
		a[2] = 1
	case "mmap":
		a[2], a[3] = a[2]&3, 1+a[3]&1
	case "rename", "renameat2":
		// Over a file the directory is a native one, and whoever moves it away has
		// moved the mount.
		return a[0] != f.dir && a[1] != f.dir && a[3] != f.dir
	case "mknod":
		return a[1]&unix.S_IFMT != unix.S_IFIFO // who opens one waits for its other end
	}
	return true
}

// run makes n calls and counts what came of each. seen tells that a piece of
// the content was in the buffer.
func (f *fuzz) run(n int, outcomes map[string]map[string]int) (seen bool) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	drain := make([]byte, 1<<16)
	for range n {
		c := calls[f.rng.IntN(len(calls))]
		var a [6]uintptr
		for i := range c.args {
			a[i] = f.argument(c.args[i])
		}
		clear(f.buf[:64]) // what a call left there is another's input
		if !f.harmless(c.name, &a) {
			continue
		}
		r, _, errno := unix.Syscall6(c.number, a[0], a[1], a[2], a[3], a[4], a[5])
		outcome := "ok"
		if errno != 0 {
			outcome = unix.ErrnoName(errno)
		}
		if outcomes[c.name] == nil {
			outcomes[c.name] = map[string]int{}
		}
		outcomes[c.name][outcome]++
		if errno != 0 {
			continue
		}
		switch c.name {
		case "open", "openat", "openat2", "creat", "dup", "open_by_handle_at", "open_tree", "fspick":
			f.opened(int(r))
		case "fcntl":
			if a[1] == unix.F_DUPFD {
				f.opened(int(r))
			}
		case "close":
			f.closed(int(a[0]))
		case "mmap":
			if a[2]&unix.PROT_READ != 0 && a[1] > 0 {
				// Looked at by the kernel and not by us: what is beyond the file's end
				// is a failed call then, and not a signal.
				unix.Syscall(unix.SYS_WRITE, uintptr(f.pipe[1]), r, min(a[1], 4096))
			}
			unix.Syscall(unix.SYS_MUNMAP, r, a[1], 0)
		}
		switch c.name {
		case "read", "pread64", "readv", "preadv2":
			seen = seen || bytes.Contains(f.buf, []byte(marker))
			clear(f.buf[:fuzzBuffer])
		}
		for {
			n, err := unix.Read(f.pipe[0], drain)
			if err != nil || n == 0 {
				break
			}
			seen = seen || bytes.Contains(drain[:n], []byte(marker))
		}
	}
	return seen
}

func (f *fuzz) opened(fd int) {
	f.fds = append(f.fds, fd)
	if len(f.fds) > 32 {
		victim := f.rng.IntN(len(f.fds))
		unix.Close(f.fds[victim])
		f.fds = append(f.fds[:victim], f.fds[victim+1:]...)
	}
}

func (f *fuzz) closed(fd int) {
	for i, x := range f.fds {
		if x == fd {
			f.fds = append(f.fds[:i], f.fds[i+1:]...)
			return
		}
	}
	for i, x := range f.dirs {
		if x == fd && len(f.dirs) > 1 {
			f.dirs = append(f.dirs[:i], f.dirs[i+1:]...)
			return
		}
	}
}
