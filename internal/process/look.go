package process

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// What says which facts are wanted. The path of the executable always is.
type What struct {
	Groups bool `json:"groups,omitempty"`
	File   bool `json:"file,omitempty"`   // which file the executable is
	Digest bool `json:"digest,omitempty"` // its SHA-256; takes as long as reading it
}

// Facts are what decides about a process. All of them are of one process: the
// one that had the number when Look began and had it still when it ended.
type Facts struct {
	Exe    string   `json:"exe"`    // where the executable is, or was; for people, never for a decision
	Groups []uint32 `json:"groups"` // supplementary, in the caller's user namespace
	Dev    uint64   `json:"dev"`    // of the executable: device and inode of the open file
	Ino    uint64   `json:"ino"`
	SHA256 string   `json:"sha256"` // of the executable, lower-case hexadecimal
}

var (
	// ErrOutside says that the process has no number here: it is in a pid
	// namespace that ours does not contain.
	ErrOutside = errors.New("the process is outside of this pid namespace")
	// ErrGone says that the process ended while it was looked at.
	ErrGone = errors.New("the process is gone")
	// ErrLarge says that the executable is larger than maxDigest.
	ErrLarge = errors.New("the executable is too large to be hashed")
)

// maxDigest is the largest executable that is hashed: a sparse file of any size
// costs its owner nothing.
const maxDigest = 512 << 20

// Look tells the facts about a process, or about the process that a thread
// belongs to. An error means that something of what was asked for cannot be
// told.
//
// The number of a thread may be used again as soon as the thread is gone. So
// the thread is held by a pidfd, which never comes to mean another, its entry
// in /proc is opened once and all is read below that, and at the end it must
// still be there: then it was there all the time.
func Look(pid uint32, what What) (Facts, error) {
	if pid == 0 {
		return Facts{}, ErrOutside
	}
	h, err := hold(pid)
	if err != nil {
		return Facts{}, err
	}
	defer h.close()
	f, err := h.facts(what)
	if gone := h.gone(); gone != nil {
		return Facts{}, gone
	}
	return f, err
}

// A held thread keeps its meaning.
type held struct {
	pidfd int
	dir   int // its directory in /proc
}

// hold holds a thread, or its process where the kernel cannot hold threads.
func hold(pid uint32) (*held, error) {
	h, err := holdThread(pid)
	if errors.Is(err, unix.EINVAL) {
		return holdProcess(pid)
	}
	return h, err
}

// holdThread holds a thread by a pidfd of its own (Linux 6.9).
func holdThread(pid uint32) (*held, error) {
	h := &held{dir: -1}
	var err error
	if h.pidfd, err = unix.PidfdOpen(int(pid), unix.PIDFD_THREAD); err != nil {
		return nil, missing("pidfd_open", err)
	}
	number, err := inProc(h.pidfd)
	if err == nil {
		h.dir, err = openDir(number)
	}
	if err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

// holdProcess holds the process of a thread, and makes sure of the thread by its
// directory, which is of that thread for good.
func holdProcess(pid uint32) (*held, error) {
	h := &held{pidfd: -1}
	var err error
	if h.dir, err = openDir(strconv.FormatUint(uint64(pid), 10)); err != nil {
		return nil, err
	}
	tgid, err := h.field("status", "Tgid")
	var leader int
	if err == nil {
		leader, err = strconv.Atoi(tgid)
	}
	if err == nil {
		h.pidfd, err = unix.PidfdOpen(leader, 0)
		err = missing("pidfd_open", err)
	}
	var number string
	if err == nil {
		number, err = inProc(h.pidfd)
	}
	if err == nil && number != tgid {
		// Numbers in this /proc are not those that the kernel told us.
		err = ErrOutside
	}
	if err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

// missing is what an error means that says that there is no such process.
func missing(op string, err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) {
		return ErrGone
	}
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	return nil
}

// inProc is the number that a pidfd's thread has in the /proc that is mounted
// here, which need not be the one of our pid namespace (proc_pid_fdinfo(5),
// "Pid").
func inProc(pidfd int) (string, error) {
	info, err := os.Open("/proc/self/fdinfo/" + strconv.Itoa(pidfd))
	if err != nil {
		return "", fmt.Errorf("who it is: %w", err)
	}
	defer info.Close()
	number, err := field(info, "Pid")
	switch {
	case err != nil:
		return "", err
	case number == "0": // not in that namespace
		return "", ErrOutside
	case number == "-1":
		return "", ErrGone
	}
	return number, nil
}

func openDir(number string) (int, error) {
	dir, err := unix.Open("/proc/"+number, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	return dir, missing("open /proc/"+number, err)
}

func (h *held) close() {
	for _, fd := range []int{h.pidfd, h.dir} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// gone returns ErrGone unless the thread is there still. A pidfd is readable
// once its thread has ended (pidfd_open(2)).
func (h *held) gone() error {
	fds := []unix.PollFd{{Fd: int32(h.pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return fmt.Errorf("poll: %w", err)
		case n > 0:
			return ErrGone
		}
		// Where the pidfd is the whole process's, the thread may have ended alone.
		return missing("stat", unix.Faccessat(h.dir, "status", unix.F_OK, 0))
	}
}

func (h *held) facts(what What) (f Facts, err error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(h.dir, "exe", buf)
	if err == nil {
		f.Exe = string(buf[:n])
	} else if what.File || what.Digest {
		return f, fmt.Errorf("which executable it runs: %w", err)
	}
	if what.Groups {
		if f.Groups, err = h.groups(); err != nil {
			return f, err
		}
	}
	if what.File {
		// Following the link opens the file itself, whatever is at its path now.
		fd, err := unix.Openat(h.dir, "exe", unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return f, fmt.Errorf("which executable it runs: %w", err)
		}
		defer unix.Close(fd)
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return f, fmt.Errorf("which executable it runs: %w", err)
		}
		f.Dev, f.Ino = uint64(st.Dev), st.Ino
	}
	if what.Digest {
		if f.SHA256, err = h.digest(); err != nil {
			return f, fmt.Errorf("hash its executable: %w", err)
		}
	}
	return f, nil
}

func (h *held) digest() (string, error) {
	fd, err := unix.Openat(h.dir, "exe", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	exe := os.NewFile(uintptr(fd), "exe")
	defer exe.Close()
	if info, err := exe.Stat(); err != nil {
		return "", err
	} else if info.Size() > maxDigest {
		return "", ErrLarge
	}
	sum := sha256.New()
	n, err := io.Copy(sum, io.LimitReader(exe, maxDigest+1))
	if err == nil && n > maxDigest {
		err = ErrLarge
	}
	if err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

func (h *held) groups() (groups []uint32, err error) {
	list, err := h.field("status", "Groups")
	if err != nil {
		return nil, err
	}
	for _, g := range strings.Fields(list) {
		n, err := strconv.ParseUint(g, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("its groups: %w", err)
		}
		groups = append(groups, uint32(n))
	}
	return groups, nil
}

// field reads one field of a file in the thread's directory.
func (h *held) field(file, key string) (string, error) {
	fd, err := unix.Openat(h.dir, file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", missing("open "+file, err)
	}
	f := os.NewFile(uintptr(fd), file)
	defer f.Close()
	return field(f, key)
}

// field finds "key: value" in lines as /proc writes them.
func field(r io.Reader, key string) (string, error) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if k, v, found := bytes.Cut(lines.Bytes(), []byte(":")); found && string(k) == key {
			return string(bytes.TrimSpace(v)), nil
		}
	}
	if err := lines.Err(); err != nil {
		return "", missing("read "+key, err)
	}
	return "", fmt.Errorf("/proc does not tell %s", key)
}
