package attack

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A job is what a hostile process is told to do.
type job struct {
	Do     string // acts, mounts, fuzz, watch, storm, threads, holder, receiver, open
	Dir    string // the directory that the secret is in
	Secret string
	Size   int
	Claim  bool // open the secret first, and act as the one who has it
	Seed   uint64
	N      int
	Holder int // process that has the secret open
	Fd     int // as which descriptor
	Temp   string
}

// A verdict is what came of a job. Outcomes are counted by call and result.
type verdict struct {
	Outcomes map[string]map[string]int
	Seen     bool   // a piece of the content came into this process's hands
	Wrong    string // what came was not the content
	Slowest  time.Duration
}

func (v *verdict) add(name, outcome string) {
	if v.Outcomes == nil {
		v.Outcomes = map[string]map[string]int{}
	}
	if v.Outcomes[name] == nil {
		v.Outcomes[name] = map[string]int{}
	}
	v.Outcomes[name][outcome]++
}

func (v *verdict) err(name string, err error) {
	var errno unix.Errno
	switch e := err.(type) {
	case nil:
		v.add(name, "ok")
		return
	case unix.Errno:
		errno = e
	case *os.PathError:
		errno, _ = e.Err.(unix.Errno)
	case *os.SyscallError:
		errno, _ = e.Err.(unix.Errno)
	}
	if errno == 0 {
		v.add(name, err.Error())
		return
	}
	v.add(name, unix.ErrnoName(errno))
}

// hostileContent is lines that each carry the marker and their number.
func hostileContent(size int) []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < size; i++ {
		fmt.Fprintf(&b, "%s%09d\n", marker, i)
	}
	return b.Bytes()[:size]
}

// got judges bytes that were read from the secret's start.
func (v *verdict) got(name string, b []byte, err error, size int) {
	if err != nil {
		v.err(name, err)
		return
	}
	v.Seen = v.Seen || bytes.Contains(b, []byte(marker))
	switch content := hostileContent(size); {
	case bytes.Equal(b, content):
		v.add(name, "whole")
	case len(b) > 0 && bytes.HasPrefix(content, b):
		v.add(name, "part")
	case len(b) == 0:
		v.add(name, "nothing")
	default:
		v.add(name, "WRONG")
		v.Wrong = fmt.Sprintf("%s: %d bytes that are not the content's", name, len(b))
	}
}

// hostile is the process: one job as JSON, and a verdict as JSON on standard
// output.
func hostile(args []string) int {
	var j job
	if err := json.Unmarshal([]byte(args[0]), &j); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	v := &verdict{}
	claimed := -1
	if j.Claim {
		fd, err := unix.Open(j.Secret, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			fmt.Fprintln(os.Stderr, "claim:", err)
			return 1
		}
		claimed = fd
	}
	switch j.Do {
	case "acts":
		j.acts(v, claimed)
	case "mounts":
		j.mounts(v)
	case "fuzz":
		// Whatever is mounted, and by whomever, is for this process only.
		v.err("unshare", privateMounts())
		// Over a file the files beside it are native: none becomes as large as a
		// random number.
		signal.Ignore(unix.SIGXFSZ)
		v.err("setrlimit", unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 16 << 20, Max: 16 << 20}))
		f := newFuzz(j.Seed, j.Dir, j.Secret, claimed)
		if v.Outcomes == nil {
			v.Outcomes = map[string]map[string]int{}
		}
		v.Seen = f.run(j.N, v.Outcomes)
	case "watch":
		j.watch(v)
	case "storm":
		for range j.N {
			fd, err := unix.Open(j.Secret, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			v.err("open", err)
			if err == nil {
				unix.Close(fd)
			}
		}
	case "threads":
		j.threads(v, claimed)
	case "holder":
		return j.holder()
	case "receiver":
		return j.receiver()
	case "whole":
		b, err := os.ReadFile(j.Secret)
		v.got("read", b, err, j.Size)
	}
	json.NewEncoder(os.Stdout).Encode(v)
	return 0
}

func privateMounts() error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
}

// watch asks for another file under the mount until its input ends, and tells
// how long the slowest answer took.
func (j job) watch(v *verdict) {
	end := make(chan struct{})
	go func() { bufio.NewReader(os.Stdin).ReadString('\n'); close(end) }()
	other := filepath.Join(j.Dir, "other.txt")
	if _, err := os.Lstat(other); err != nil {
		other = j.Secret // over a file there is only this one to ask for
	}
	fmt.Println("watching")
	tick := time.NewTicker(10 * time.Millisecond)
	for {
		began := time.Now()
		var st unix.Stat_t
		err := unix.Lstat(other, &st)
		v.Slowest = max(v.Slowest, time.Since(began))
		v.err("stat", err)
		select {
		case <-end:
			return
		case <-tick.C:
		}
	}
}

// threads reads one descriptor from many threads at once.
func (j job) threads(v *verdict, fd int) {
	content := hostileContent(j.Size)
	var wg sync.WaitGroup
	var mu sync.Mutex
	for i := range 16 {
		wg.Go(func() {
			runtime.LockOSThread()
			rng := rand.New(rand.NewPCG(j.Seed, uint64(i)))
			buf := make([]byte, 200_000)
			for range j.N {
				off, size := rng.IntN(len(content)), 1+rng.IntN(len(buf))
				n, err := unix.Pread(fd, buf[:size], int64(off))
				mu.Lock()
				v.err("pread64", err)
				if err == nil && (n == 0 || !bytes.Equal(buf[:n], content[off:off+n])) {
					v.Wrong = fmt.Sprintf("%d bytes at %d are not the content's", n, off)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
}

// holder has the secret open and does what it is told, a line each.
func (j job) holder() int {
	signalsAreIgnored()
	fd := -1
	var copies []int
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		op, arg, _ := strings.Cut(lines.Text(), " ")
		var b [1]byte
		var err error
		switch op {
		case "open":
			fd, err = unix.Open(j.Secret, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		case "byte":
			_, err = unix.Read(fd, b[:])
		case "bytes": // one by one
			n, _ := strconv.Atoi(arg)
			for i := 0; i < n && err == nil; i++ {
				_, err = unix.Pread(fd, b[:], int64(i))
			}
		case "dup":
			n, _ := strconv.Atoi(arg)
			for i := 0; i < n && err == nil; i++ {
				var again int
				if again, err = unix.Dup(fd); err == nil {
					copies = append(copies, again)
				}
			}
		case "pass": // to whoever listens there
			err = pass(arg, fd, 100)
		case "close-all":
			for _, x := range append(copies, fd) {
				err = errors.Join(err, unix.Close(x))
			}
		case "fd":
			fmt.Println(fd)
			continue
		case "whole":
			v := &verdict{}
			all := make([]byte, j.Size+1)
			n, rest := 0, 0
			for {
				if rest, err = unix.Pread(fd, all[n:], int64(n)); err != nil || rest == 0 {
					break
				}
				n += rest
			}
			v.got("read", all[:n], err, j.Size)
			for outcome := range v.Outcomes["read"] {
				fmt.Println(outcome)
			}
			continue
		}
		if err != nil {
			fmt.Println(err)
		} else {
			fmt.Println("ok")
		}
	}
	return 0
}

func signalsAreIgnored() {
	// A handler that does nothing: reads are interrupted and go on.
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGUSR1)
}

// pass sends the descriptor n times over a socket.
func pass(socket string, fd, n int) error {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return err
	}
	defer conn.Close()
	for range n {
		if _, _, err := conn.WriteMsgUnix([]byte{0}, unix.UnixRights(fd), nil); err != nil {
			return err
		}
	}
	// Not before they have arrived.
	_, err = conn.Read(make([]byte, 1))
	return err
}

// receiver takes descriptors until n have come, reads through the last, and
// holds all of them until its input ends.
func (j job) receiver() int {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(j.Temp, "socket"), Net: "unix"})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("listening")
	conn, err := l.AcceptUnix()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	last := -1
	for i := 0; i < j.N; {
		oob := make([]byte, 4096)
		_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 1), oob)
		if err != nil {
			fmt.Println(err)
			return 1
		}
		messages, _ := unix.ParseSocketControlMessage(oob[:n])
		for _, m := range messages {
			fds, _ := unix.ParseUnixRights(&m)
			for _, fd := range fds {
				last = fd
				i++
			}
		}
	}
	conn.Write([]byte{0})
	in := bufio.NewReader(os.Stdin)
	fmt.Println("received")
	in.ReadString('\n')
	all := make([]byte, j.Size+1)
	n, rest := 0, 0
	for {
		if rest, err = unix.Pread(last, all[n:], int64(n)); err != nil || rest == 0 {
			break
		}
		n += rest
	}
	v := &verdict{}
	v.got("read", all[:n], err, j.Size)
	for outcome := range v.Outcomes["read"] {
		fmt.Println(outcome)
	}
	in.ReadString('\n')
	return 0
}

// acts does once each what takes more than one call.
func (j job) acts(v *verdict, claimed int) {
	open := func(name string, flags int, use func(fd int)) {
		fd, err := unix.Open(j.Secret, flags|unix.O_CLOEXEC, 0o600)
		if err != nil {
			v.err(name, err)
			return
		}
		use(fd)
		unix.Close(fd)
	}
	ok := func(name string) func(int) { return func(int) { v.add(name, "ok") } }
	for name, flags := range map[string]int{
		"open O_PATH": unix.O_PATH, "open O_RDWR": unix.O_RDWR, "open O_WRONLY": unix.O_WRONLY, "open O_TRUNC": unix.O_TRUNC, "open O_APPEND": unix.O_APPEND | unix.O_WRONLY,
		"open O_CREAT|O_EXCL": unix.O_CREAT | unix.O_EXCL | unix.O_RDWR, "open O_DIRECTORY": unix.O_DIRECTORY, "open O_TMPFILE": unix.O_TMPFILE | unix.O_RDWR,
		"open O_NOATIME": unix.O_NOATIME, "open O_NONBLOCK|O_ASYNC": unix.O_NONBLOCK | unix.O_ASYNC,
	} {
		open(name, flags, ok(name))
	}
	// What reads: through the claim of this process, or through one that it tries
	// to make.
	with := func(name string, use func(fd int)) {
		if claimed >= 0 {
			unix.Seek(claimed, 0, 0)
			use(claimed)
			return
		}
		open(name, unix.O_RDONLY, use)
	}
	readAll := func(fd int) ([]byte, error) {
		all := make([]byte, j.Size+4096)
		n := 0
		for {
			m, err := unix.Read(fd, all[n:])
			if err != nil || m == 0 {
				return all[:n], err
			}
			n += m
		}
	}
	with("read", func(fd int) { b, err := readAll(fd); v.got("read", b, err, j.Size) })
	open("read O_DIRECT", unix.O_DIRECT, func(fd int) { b, err := readAll(fd); v.got("read O_DIRECT", b, err, j.Size) })
	for name, how := range map[string][2]int{
		"mmap shared": {unix.PROT_READ, unix.MAP_SHARED}, "mmap private": {unix.PROT_READ | unix.PROT_WRITE, unix.MAP_PRIVATE},
		"mmap shared, to write": {unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED}, "mmap to execute": {unix.PROT_READ | unix.PROT_EXEC, unix.MAP_PRIVATE},
	} {
		with(name, func(fd int) {
			m, err := unix.Mmap(fd, 0, j.Size, how[0], how[1])
			if err != nil {
				v.err(name, err)
				return
			}
			v.got(name, m, nil, j.Size)
			unix.Munmap(m)
		})
	}
	for _, name := range []string{"sendfile", "splice", "copy_file_range"} {
		with(name, func(fd int) { b, err := j.transfer(name, fd); v.got(name, b, err, j.Size) })
	}
	with("io_uring read", func(fd int) { b, err := uringRead(fd, j.Size); v.got("io_uring read", b, err, j.Size) })
	b, err := uringOpenRead(j.Secret, j.Size)
	v.got("io_uring openat", b, err, j.Size)
	j.handles(v)
	with("fcntl F_SETLEASE", func(fd int) {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_RDLCK)
		v.err("fcntl F_SETLEASE", err)
	})
	with("flock", func(fd int) { v.err("flock", unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)) })
	with("fcntl F_SETLK", func(fd int) {
		v.err("fcntl F_SETLK", unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &unix.Flock_t{Type: unix.F_RDLCK}))
	})
	with("reopen /proc/self/fd", func(fd int) {
		again, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(again)
		}
		v.err("reopen /proc/self/fd", err)
	})
	if j.Holder != 0 {
		for name, path := range map[string]string{
			"open /proc/HOLDER/fd":   fmt.Sprintf("/proc/%d/fd/%d", j.Holder, j.Fd),
			"open /proc/HOLDER/root": fmt.Sprintf("/proc/%d/root%s", j.Holder, j.Secret),
			"open /proc/HOLDER/cwd":  fmt.Sprintf("/proc/%d/cwd%s", j.Holder, j.Secret),
		} {
			fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			v.err(name, err)
			if err == nil {
				unix.Close(fd)
			}
		}
	}
	for name, request := range map[string]uint{
		"ioctl FS_IOC_GETFLAGS": unix.FS_IOC_GETFLAGS, "ioctl FIONREAD": 0x541b, "ioctl FIBMAP": 1, "ioctl FIEMAP": 0xc020660b,
		"ioctl FUSE_DEV_IOC_CLONE": 0x8004e500, "ioctl FUSE_DEV_IOC_BACKING_OPEN": 0x4010e501, "ioctl FS_IOC_SETFLAGS": unix.FS_IOC_SETFLAGS,
	} {
		with(name, func(fd int) {
			var buf [256]byte
			_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(&buf)))
			if errno != 0 {
				v.err(name, errno)
			} else {
				v.add(name, "ok")
			}
		})
	}
	with("ioctl FICLONE", func(fd int) {
		to, err := os.CreateTemp(j.Temp, "clone")
		if err == nil {
			err = unix.IoctlFileClone(int(to.Fd()), fd)
			to.Close()
		}
		v.err("ioctl FICLONE", err)
	})
	beside := filepath.Join(j.Temp, "link")
	v.err("link", unix.Link(j.Secret, beside))
	open("linkat AT_EMPTY_PATH", unix.O_PATH, func(fd int) {
		v.err("linkat AT_EMPTY_PATH", unix.Linkat(fd, "", unix.AT_FDCWD, beside, unix.AT_EMPTY_PATH))
	})
	v.err("rename away", unix.Rename(j.Secret, beside))
	v.err("execve", exec.Command(j.Secret).Run())
	v.err("swapon", call0(unix.SYS_SWAPON, j.Secret))
	v.err("truncate", unix.Truncate(j.Secret, 0))
	v.err("setxattr", unix.Setxattr(j.Secret, "user.x", []byte("x"), 0))
	j.watchers(v)
	loop(v, with, j.Size)
}

func call0(number uintptr, path string) error {
	p, err := unix.BytePtrFromString(path)
	if err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(number, uintptr(unsafe.Pointer(p)), 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// transfer moves the content by a call that does not give it to the process, and
// reads it where it arrived.
func (j job) transfer(how string, from int) ([]byte, error) {
	to, err := os.CreateTemp(j.Temp, "to")
	if err != nil {
		return nil, err
	}
	defer os.Remove(to.Name())
	defer to.Close()
	var p [2]int
	if err := unix.Pipe(p[:]); err != nil {
		return nil, err
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	for {
		var n int
		switch how {
		case "sendfile":
			n, err = unix.Sendfile(int(to.Fd()), from, nil, j.Size)
		case "copy_file_range":
			n, err = unix.CopyFileRange(from, nil, int(to.Fd()), nil, j.Size, 0)
		case "splice":
			var m int64
			if m, err = unix.Splice(from, nil, p[1], nil, 60_000, 0); err == nil && m > 0 {
				m, err = unix.Splice(p[0], nil, int(to.Fd()), nil, int(m), 0)
			}
			n = int(m)
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return os.ReadFile(to.Name())
		}
	}
}

// handles tries to have the file by its handle, without its name.
func (j job) handles(v *verdict) {
	h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, j.Secret, 0)
	v.err("name_to_handle_at", err)
	if err != nil {
		return
	}
	dir, err := unix.Open(j.Dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		v.err("open_by_handle_at", err)
		return
	}
	defer unix.Close(dir)
	fd, err := unix.OpenByHandleAt(dir, h, unix.O_RDONLY)
	v.err("open_by_handle_at", err)
	if err == nil {
		unix.Close(fd)
	}
}

// watchers sets watches on the file and opens it under their eyes. A fanotify
// event brings a descriptor of the file, which the kernel opens for it.
func (j job) watchers(v *verdict) {
	if fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK); err == nil {
		_, err := unix.InotifyAddWatch(fd, j.Secret, unix.IN_ALL_EVENTS)
		v.err("inotify_add_watch", err)
		unix.Close(fd)
	}
	fan, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK, unix.O_RDONLY)
	if err != nil {
		v.err("fanotify_init", err)
		return
	}
	defer unix.Close(fan)
	err = unix.FanotifyMark(fan, unix.FAN_MARK_ADD|unix.FAN_MARK_MOUNT, unix.FAN_OPEN|unix.FAN_ACCESS|unix.FAN_CLOSE, unix.AT_FDCWD, j.Dir)
	v.err("fanotify_mark", err)
	if err != nil {
		return
	}
	if fd, err := unix.Open(j.Secret, unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
		unix.Close(fd)
	}
	buf := make([]byte, 4096)
	n, err := unix.Read(fan, buf)
	v.err("fanotify read", err)
	for rest := buf[:max(0, n)]; len(rest) >= 24; {
		e := (*unix.FanotifyEventMetadata)(unsafe.Pointer(&rest[0]))
		if e.Fd >= 0 {
			unix.Close(int(e.Fd))
		}
		if e.Event_len < 24 {
			break
		}
		rest = rest[min(len(rest), int(e.Event_len)):]
	}
}

// loop puts the file under a block device and reads that.
func loop(v *verdict, with func(string, func(int)), size int) {
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		v.err("loop device", err)
		return
	}
	defer unix.Close(control)
	n, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
	if err != nil {
		v.err("loop device", err)
		return
	}
	dev, err := unix.Open(fmt.Sprintf("/dev/loop%d", n), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		v.err("loop device", err)
		return
	}
	defer unix.Close(dev)
	with("loop device", func(fd int) {
		if err := unix.IoctlSetInt(dev, unix.LOOP_SET_FD, fd); err != nil {
			v.err("loop device", err)
			return
		}
		defer unix.IoctlSetInt(dev, unix.LOOP_CLR_FD, 0)
		b := make([]byte, size)
		n, err := unix.Read(dev, b)
		v.got("loop device", b[:max(0, n)], err, size)
	})
}

// mounts makes other mounts of the mount, in a namespace of its own, and opens
// the secret through each. Nothing of it outlives the process.
func (j job) mounts(v *verdict) {
	if err := privateMounts(); err != nil {
		v.err("unshare", err)
		return
	}
	try := func(name, path string) {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		v.err(name, err)
		if err == nil {
			unix.Close(fd)
		}
	}
	at := filepath.Join(j.Temp, "at")
	os.Mkdir(at, 0o700)
	base := filepath.Base(j.Secret)
	if err := unix.Mount(j.Dir, at, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		v.err("bind mount", err)
	} else {
		try("bind mount", filepath.Join(at, base))
		v.err("remount to write", unix.Mount("", at, "", unix.MS_REMOUNT|unix.MS_BIND, ""))
		v.err("write after remount", os.WriteFile(filepath.Join(at, base), nil, 0o600))
		unix.Unmount(at, unix.MNT_DETACH)
	}
	file := filepath.Join(j.Temp, "file")
	os.WriteFile(file, nil, 0o600)
	if err := unix.Mount(j.Secret, file, "", unix.MS_BIND, ""); err != nil {
		v.err("bind mount of the file", err)
	} else {
		try("bind mount of the file", file)
		unix.Unmount(file, unix.MNT_DETACH)
	}
	upper, work := filepath.Join(j.Temp, "upper"), filepath.Join(j.Temp, "work")
	os.Mkdir(upper, 0o700)
	os.Mkdir(work, 0o700)
	for name, options := range map[string]string{
		"overlay": "lowerdir=" + j.Dir + ":" + j.Temp, "overlay to write": "lowerdir=" + j.Dir + ",upperdir=" + upper + ",workdir=" + work,
	} {
		if err := unix.Mount("overlay", at, "overlay", 0, options); err != nil {
			v.err(name, err)
			continue
		}
		try(name, filepath.Join(at, base))
		v.err(name+": chmod", unix.Chmod(filepath.Join(at, base), 0o777)) // would copy the file up
		unix.Unmount(at, unix.MNT_DETACH)
	}
	if tree, err := unix.OpenTree(unix.AT_FDCWD, j.Dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE); err != nil {
		v.err("open_tree", err)
	} else {
		fd, err := unix.Openat(tree, base, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		v.err("open_tree", err)
		if err == nil {
			unix.Close(fd)
		}
		v.err("move_mount", unix.MoveMount(tree, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH))
		try("move_mount, open", filepath.Join(at, base))
		unix.Unmount(at, unix.MNT_DETACH)
		unix.Close(tree)
	}
	if fd, err := unix.Fsopen("fuse", unix.FSOPEN_CLOEXEC); err != nil {
		v.err("fsopen fuse", err)
	} else {
		v.err("fsconfig source", unix.FsconfigSetString(fd, "source", j.Secret))
		v.err("fsconfig create", unix.FsconfigCreate(fd))
		unix.Close(fd)
	}
	if pick, err := unix.Fspick(unix.AT_FDCWD, j.Dir, unix.FSPICK_CLOEXEC); err != nil {
		v.err("fspick", err)
	} else {
		v.err("fsconfig reconfigure", unix.FsconfigReconfigure(pick))
		unix.Close(pick)
	}
	if j.Holder != 0 {
		// setns wants a thread that shares nothing with others; unshare made this one
		// such.
		if ns, err := unix.Open(fmt.Sprintf("/proc/%d/ns/mnt", j.Holder), unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
			v.err("setns", unix.Setns(ns, unix.CLONE_NEWNS))
			try("setns, open", j.Secret)
			privateMounts()
		}
	}
	if st, err := os.Stat(filepath.Join(j.Dir, "sub")); err == nil && st.IsDir() {
		v.err("pivot_root", unix.PivotRoot(j.Dir, filepath.Join(j.Dir, "sub")))
		try("pivot_root, open", "/"+base)
	}
	v.err("chroot", unix.Chroot(j.Dir))
	try("chroot, open", "/"+base)
}
