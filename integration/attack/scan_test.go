package attack

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A look is what one method saw of one process or place.
type look struct {
	method string
	read   int64 // bytes that were searched
	unread int64 // bytes that are there and cannot be read
	secret int64 // of unread, those in mappings of secret memory
	found  hits
	failed string // why it saw nothing, "" if it did
}

// A process is a running program of the product.
type process struct {
	pid  int
	role string
}

// publisherName is the program that shows counters, in the same directory.
const publisherName = "oncefs-metrics"

// processes lists every process that runs the program at path, whatever it is
// called, what shows its counters, and the mount helpers that those started.
func processes(t testing.TB, path string) (all []process) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	ours := map[int]bool{}
	type rest struct{ pid, parent int }
	var others []rest
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		exe, err := os.Readlink(filepath.Join("/proc", e.Name(), "exe"))
		if err != nil {
			continue // a kernel thread, or gone
		}
		line, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		args := strings.Split(string(line), "\x00")
		if exe == filepath.Join(filepath.Dir(path), publisherName) {
			all = append(all, process{pid, "publisher"})
			continue
		}
		if exe != path {
			others = append(others, rest{pid, parent(pid)})
			continue
		}
		ours[pid] = true
		role := "daemon"
		switch {
		case len(args) > 1 && args[1] == "internal-decryptor":
			role = "decryptor"
		case len(args) > 1 && args[1] == "internal-warden":
			role = "warden"
		case filepath.Base(args[0]) == "fusermount3":
			role = "helper"
		case strings.Contains(string(line), "--background"):
			role = "launcher"
		}
		all = append(all, process{pid, role})
	}
	for _, o := range others {
		if ours[o.parent] {
			all = append(all, process{o.pid, "helper"})
		}
	}
	return all
}

func parent(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// pid (comm) state ppid; comm may hold anything.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	n, _ := strconv.Atoi(f[1])
	return n
}

// A mapping is one line of /proc/PID/maps.
type mapping struct {
	from, to uint64
	name     string
}

func (m mapping) secretMemory() bool { return strings.HasPrefix(m.name, "/secretmem") }

func mappings(pid int) (all []mapping, err error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// proc_pid_maps(5): from-to perms offset device inode name
		var m mapping
		f := strings.Fields(lines.Text())
		if _, err := fmt.Sscanf(f[0], "%x-%x", &m.from, &m.to); err != nil {
			return nil, err
		}
		if len(f) > 5 {
			m.name = strings.Join(f[5:], " ")
		}
		all = append(all, m)
	}
	return all, nil
}

// memory searches every page that a process has in memory, whatever its
// mapping's permissions. A page that it does not have holds nothing of its own.
// read reads memory of the process at an address.
func (ix *index) memory(method string, pid int, read func(b []byte, at uint64) (int, error)) look {
	l := look{method: method, found: hits{}}
	maps, err := mappings(pid)
	if err != nil {
		l.failed = err.Error()
		return l
	}
	pages, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		l.failed = err.Error()
		return l
	}
	defer pages.Close()
	size := uint64(os.Getpagesize())
	buf := make([]byte, overlap+1<<20)
	flags := make([]byte, 8*(1<<20/size))
	for _, m := range maps {
		if m.from >= 1<<63 {
			continue // vsyscall: the kernel's, the same for all
		}
		kept := 0
		for at := m.from; at < m.to; {
			n := min(m.to-at, 1<<20)
			if _, err := pages.ReadAt(flags[:8*n/size], int64(at/size*8)); err != nil {
				l.failed = "pagemap: " + err.Error()
				return l
			}
			for off := uint64(0); off < n; {
				// pagemap: bit 63 present, bit 62 swapped.
				present := func(o uint64) bool { return binary.NativeEndian.Uint64(flags[8*o/size:])>>62 != 0 }
				if !present(off) {
					off += size
					kept = 0
					continue
				}
				end := off + size
				for end < n && present(end) {
					end += size
				}
				for off < end {
					got, err := read(buf[kept:kept+int(end-off)], at+off)
					if err != nil || got <= 0 {
						l.unread += int64(size)
						if m.secretMemory() {
							l.secret += int64(size)
						}
						off += size
						kept = 0
						continue
					}
					l.read += int64(got)
					ix.search(buf[:kept+got], l.found)
					kept = copy(buf, buf[max(0, kept+got-overlap):kept+got])
					off += uint64(got)
				}
			}
			at += n
		}
	}
	return l
}

func (ix *index) procMem(pid int) look {
	const method = "/proc/PID/mem"
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return look{method: method, failed: err.Error(), found: hits{}}
	}
	defer f.Close()
	return ix.memory(method, pid, func(b []byte, at uint64) (int, error) { return unix.Pread(int(f.Fd()), b, int64(at)) })
}

func (ix *index) processVM(pid int) look {
	return ix.memory("process_vm_readv", pid, func(b []byte, at uint64) (int, error) {
		local := []unix.Iovec{{Base: &b[0], Len: uint64(len(b))}}
		// A page for each, so that one that cannot be read does not hide the others.
		var remote []unix.RemoteIovec
		size := os.Getpagesize()
		for off := 0; off < len(b); off += size {
			remote = append(remote, unix.RemoteIovec{Base: uintptr(at) + uintptr(off), Len: min(size, len(b)-off)})
		}
		return unix.ProcessVMReadv(pid, local, remote, 0)
	})
}

// core lets a debugger write a core of the process, of every mapping, also of
// those that ask to be left out, and searches it.
func (ix *index) core(t testing.TB, pid int) look {
	l := look{method: "debugger's core", found: hits{}}
	dir, err := os.MkdirTemp("/dev/shm", "oncefs-core-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	out, err := exec.Command("gdb", "-nx", "-batch", "-iex", "set auto-load off", "-iex", "set debuginfod enabled off", "-p", strconv.Itoa(pid),
		"-ex", "set use-coredump-filter off", "-ex", "set dump-excluded-mappings on", "-ex", "generate-core-file "+filepath.Join(dir, "core")).CombinedOutput()
	f, oerr := os.Open(filepath.Join(dir, "core"))
	if err != nil || oerr != nil {
		l.failed = fmt.Sprintf("gdb: %v %v\n%s", err, oerr, out)
		return l
	}
	defer f.Close()
	if l.read, err = ix.stream(f, l.found); err != nil {
		l.failed = err.Error()
	}
	return l
}

// words searches what a process was started with.
func (ix *index) words(pid int) []look {
	var all []look
	for _, name := range []string{"environ", "cmdline"} {
		l := look{method: name, found: hits{}}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil {
			l.failed = err.Error()
		}
		l.read = int64(len(b))
		ix.search(b, l.found)
		all = append(all, l)
	}
	return all
}

// descriptors searches where a process's descriptors lead: the names, the
// content of files, what waits in pipes. It takes nothing away from a pipe.
func (ix *index) descriptors(t testing.TB, pid int) look {
	l := look{method: "descriptors", found: hits{}}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		l.failed = err.Error()
		return l
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		name, err := os.Readlink(path)
		if err != nil {
			continue // closed meanwhile
		}
		ix.search([]byte(name), l.found)
		l.read += int64(len(name))
		var st unix.Stat_t
		if unix.Stat(path, &st) != nil {
			continue
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			f, err := os.Open(path)
			if err != nil {
				continue
			}
			n, _ := ix.stream(f, l.found)
			f.Close()
			l.read += n
		case unix.S_IFIFO:
			n, err := ix.peek(path, l.found)
			if err != nil {
				t.Errorf("look into a pipe: %v", err)
			}
			l.read += n
		}
	}
	return l
}

// peek searches a copy, made by tee(2), of what is in a pipe.
func (ix *index) peek(path string, found hits) (int64, error) {
	in, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, nil // gone
	}
	defer unix.Close(in)
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return 0, err
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	unix.FcntlInt(uintptr(p[1]), unix.F_SETPIPE_SZ, 1<<20)
	n, err := unix.Tee(in, p[1], 1<<20, unix.SPLICE_F_NONBLOCK)
	if err == unix.EAGAIN || n == 0 {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	b := make([]byte, n)
	got, err := unix.Read(p[0], b)
	ix.search(b[:max(0, got)], found)
	return int64(got), err
}

// files searches all regular files below some directories, on whatever
// filesystem of the machine they are; those that changed before since are left
// out, for nothing that was made later can be in them.
func (ix *index) files(t testing.TB, method string, since time.Time, except string, dirs ...string) look {
	t.Helper()
	l := look{method: method, found: hits{}}
	paths := make(chan string)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range runtime.NumCPU() {
		wg.Go(func() {
			for path := range paths {
				n, found, err := ix.file(path)
				mu.Lock()
				l.read += n
				l.found.merge(found)
				for name := range found {
					if name == aSecret || name == aPassphrase {
						t.Logf("%s: %s is in %s", method, name, path)
					}
				}
				if err != nil && !errors.Is(err, fs.ErrNotExist) && l.failed == "" {
					l.failed = err.Error()
				}
				mu.Unlock()
			}
		})
	}
	seen, foreign := map[[2]uint64]bool{}, map[uint64]bool{}
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			var st unix.Stat_t
			if err != nil || unix.Lstat(path, &st) != nil {
				if err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTCONN) || errors.Is(err, fs.ErrPermission) {
					return nil // gone, somebody's dead mount, or a FUSE mount that root may not see
				}
				return err
			}
			if _, known := foreign[st.Dev]; !known {
				foreign[st.Dev] = holdsNothing(path)
			}
			if foreign[st.Dev] {
				if e.IsDir() {
					return fs.SkipDir
				}
				return nil
			}
			id := [2]uint64{st.Dev, st.Ino}
			if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size == 0 || seen[id] || path == except || time.Unix(st.Ctim.Unix()).Before(since) {
				return nil
			}
			seen[id] = true
			paths <- path
			return nil
		})
		if err != nil {
			l.failed = err.Error()
		}
	}
	close(paths)
	wg.Wait()
	return l
}

func (ix *index) file(path string) (int64, hits, error) {
	found := hits{}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOATIME, 0)
	if err != nil {
		return 0, found, err
	}
	defer f.Close()
	var total int64
	// Holes hold nothing.
	for off := int64(0); ; {
		from, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return total, found, nil
		}
		if err != nil {
			return total, found, err
		}
		to, err := unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
		if err != nil {
			return total, found, err
		}
		n, err := ix.stream(io.NewSectionReader(f, from, to-from), found)
		total += n
		if err != nil {
			return total, found, err
		}
		off = to
	}
}

// holdsNothing tells paths on filesystems that hold no data of their own: the
// kernel's, and mounts of FUSE, where looking could be reading.
func holdsNothing(path string) bool {
	var st unix.Statfs_t
	if unix.Statfs(path, &st) != nil {
		return true
	}
	switch st.Type {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC,
		unix.SECURITYFS_MAGIC, unix.BPF_FS_MAGIC, unix.DEVPTS_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC, unix.PSTOREFS_MAGIC, unix.EFIVARFS_MAGIC,
		unix.SELINUX_MAGIC, unix.BINFMTFS_MAGIC, unix.NSFS_MAGIC, unix.AUTOFS_SUPER_MAGIC, 0x65735543 /* fusectl */, 0x19800202 /* mqueue */ :
		return true
	}
	return false
}

// ended waits until no process of the program is left.
func ended(t testing.TB, path string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; {
		left := processes(t, path)
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("processes that should have ended: %v", left)
			return
		}
		runtime.Gosched()
	}
}
