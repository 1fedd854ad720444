// Package process tells who another process is, as far as /proc lets us know.
// What it tells is for the log: a process may end and its number be used again
// at any time, unless the kernel holds it in a request that we have not
// answered.
package process

import (
	"bufio"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

func dir(pid uint32) string { return "/proc/" + strconv.FormatUint(uint64(pid), 10) }

// Exe is the path of the process's executable, or "" if it cannot be known.
func Exe(pid uint32) string {
	var buf [unix.PathMax]byte
	n, err := unix.Readlink(dir(pid)+"/exe", buf[:])
	if err != nil {
		return ""
	}
	return string(buf[:n])
}

// Cgroup is the process's control group in the unified hierarchy, or else in
// the first one listed; "" if it cannot be known.
func Cgroup(pid uint32) string {
	// Without the os package, which asks the kernel as much again about the file: a
	// reader waits for this.
	fd, err := unix.Open(dir(pid)+"/cgroup", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	var buf [16 << 10]byte
	n, err := unix.Read(fd, buf[:])
	if err != nil {
		return ""
	}
	first := ""
	for line := range strings.Lines(string(buf[:n])) {
		// cgroups(7): hierarchy-ID:controller-list:cgroup-path
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		if parts[0] == "0" && parts[2] != "/" {
			return parts[2]
		}
		if first == "" && parts[2] != "/" {
			first = parts[2]
		}
	}
	return first
}

// HoldsOpen tells whether the process has a file of that inode number open for
// reading. It looks at /proc/PID/fdinfo (proc_pid_fdinfo(5), "ino" since Linux
// 5.14), never at the file itself, so it asks nothing of the filesystem that
// the file is on.
func HoldsOpen(pid uint32, inode uint64) bool {
	infos, err := filepath.Glob(dir(pid) + "/fdinfo/*")
	if err != nil {
		return false
	}
	want := strconv.FormatUint(inode, 10)
	for _, path := range infos {
		if holds(path, want) {
			return true
		}
	}
	return false
}

func holds(path, inode string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	var match, reading bool
	for lines := bufio.NewScanner(f); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimSpace(value)
		switch key {
		case "ino":
			match = value == inode
		case "flags":
			flags, err := strconv.ParseUint(value, 8, 64)
			reading = err == nil && flags&unix.O_PATH == 0
		}
	}
	return match && reading
}
