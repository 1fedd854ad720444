package process

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// maxDepth is how many ancestors are looked at; pid_max(5) allows more, no
// machine has them.
const maxDepth = 4096

// Descends tells whether a process, or the process of a thread, is a descendant
// of another, which must be alive and a reaper of orphans: then nobody leaves
// its tree by losing a parent. The process must be held, so that its number is
// not used again meanwhile. An ancestor's number may be: but a parent is never
// younger than its child, and one that is has taken a dead one's number.
func Descends(pid, ancestor uint32) bool {
	for range 3 {
		if is, known := descends(pid, ancestor); known {
			return is
		}
	}
	return false
}

// descends is one walk; known is false where an ancestor ended under way.
func descends(pid, ancestor uint32) (is, known bool) {
	child, err := readStat(pid)
	for range maxDepth {
		switch {
		case err != nil:
			return false, false
		case child.parent == ancestor:
			return true, true
		case child.parent <= 1:
			return false, true
		}
		var parent stat
		if parent, err = readStat(child.parent); err == nil && parent.started > child.started {
			return false, false
		}
		child = parent
	}
	return false, true
}

// Children lists the children of a process, also those that have ended and were
// not waited for.
func Children(of int) (pids []int) {
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, path := range all {
		pid, err := strconv.ParseUint(filepath.Base(path), 10, 32)
		if err != nil {
			continue
		}
		if s, err := readStat(uint32(pid)); err == nil && int(s.parent) == of {
			pids = append(pids, int(pid))
		}
	}
	return pids
}

type stat struct {
	parent  uint32
	started uint64 // clock ticks since boot
}

// readStat reads /proc/PID/stat, proc_pid_stat(5): the fourth field is the
// parent, the twenty-second the start. The second is in brackets and may hold
// anything.
func readStat(pid uint32) (s stat, err error) {
	f, err := os.Open(dir(pid) + "/stat")
	if err != nil {
		return s, err
	}
	defer f.Close()
	buf := make([]byte, 1024)
	n, err := f.Read(buf)
	if err != nil {
		return s, err
	}
	text := string(buf[:n])
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return s, fmt.Errorf("%s/stat has %d fields", dir(pid), len(fields))
	}
	parent, err := strconv.ParseUint(fields[1], 10, 32)
	if err == nil {
		s.parent = uint32(parent)
		s.started, err = strconv.ParseUint(fields[19], 10, 64)
	}
	return s, err
}
