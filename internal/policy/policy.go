// Package policy is which readers are let in.
//
// There are four kinds of rules: user, group, executable, and the executable's
// SHA-256. Of one kind one must fit; of the kinds that are given all must. What
// cannot be told about a reader does not fit.
package policy

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"oncefs/internal/process"
)

// A Policy is the rules. The zero value lets everybody in.
type Policy struct {
	UIDs    []uint32
	GIDs    []uint32 // the process's group or a supplementary one
	Exes    []*Executable
	Digests []string // SHA-256 in lower-case hexadecimal
}

var (
	// ErrScript says that a file is a script: what runs, and reads, is its
	// interpreter.
	ErrScript = errors.New("is a script: the process that reads is its interpreter")
	// ErrNoProgram says that a file is none that can be run.
	ErrNoProgram = errors.New("is not an executable file")
	// ErrUnknown says that a reader cannot be told from others, and so is
	// refused. Why follows: ErrOutside or what the kernel said.
	ErrUnknown = errors.New("who it is cannot be told")
	// ErrOutside says that the reader is in a pid namespace that ours does not
	// contain.
	ErrOutside = process.ErrOutside
)

// An Executable is a file, whatever lies at its path later. It is held open, so
// that its inode number is not given to another file.
type Executable struct {
	Path     string
	file     *os.File
	dev, ino uint64
}

// OpenExecutable opens what is at the path now; links are followed.
func OpenExecutable(path string) (*Executable, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	e := &Executable{Path: path, file: os.NewFile(uintptr(fd), path)}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		e.Close()
		return nil, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	e.dev, e.ino = uint64(st.Dev), st.Ino
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o111 == 0 {
		e.Close()
		return nil, fmt.Errorf("%s %w", path, ErrNoProgram)
	}
	if script(fd) {
		e.Close()
		return nil, fmt.Errorf("%s %w", path, ErrScript)
	}
	return e, nil
}

// script tells whether the file is known to begin with #! (execve(2)). One that
// may be run and not read may be anything.
func script(fd int) bool {
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return false
	}
	defer f.Close()
	var head [2]byte
	_, err = f.ReadAt(head[:], 0)
	return err == nil && string(head[:]) == "#!"
}

// Close lets the file go.
func (e *Executable) Close() error { return e.file.Close() }

// Close lets the executables go.
func (p *Policy) Close() {
	for _, e := range p.Exes {
		e.Close()
	}
}

// Open tells whether the policy has no rule.
func (p *Policy) Open() bool {
	return len(p.UIDs)+len(p.GIDs)+len(p.Exes)+len(p.Digests) == 0
}

// Decide returns nil for a reader that is let in, else why not. uid and gid are
// the kernel's word; everything else is asked with look, and only if the rest
// fits. It may be called by several goroutines.
func (p *Policy) Decide(pid, uid, gid uint32, look func(uint32, process.What) (process.Facts, error)) error {
	if len(p.UIDs) > 0 && !slices.Contains(p.UIDs, uid) {
		return fmt.Errorf("uid %d is not a reader's", uid)
	}
	what := process.What{
		Groups: len(p.GIDs) > 0 && !slices.Contains(p.GIDs, gid),
		File:   len(p.Exes) > 0,
	}
	if what.Groups || what.File {
		f, err := look(pid, what)
		switch {
		case err != nil:
			return fmt.Errorf("%w: %w", ErrUnknown, err)
		case what.Groups && !slices.ContainsFunc(f.Groups, func(g uint32) bool { return slices.Contains(p.GIDs, g) }):
			return errors.New("none of its groups is a reader's")
		case what.File && !slices.ContainsFunc(p.Exes, func(e *Executable) bool { return e.dev == f.Dev && e.ino == f.Ino }):
			return p.otherFile(f)
		}
	}
	if len(p.Digests) > 0 {
		// Hashing takes time, so it comes last and only for those that fit.
		f, err := look(pid, process.What{File: what.File, Digest: true})
		switch {
		case err != nil:
			return fmt.Errorf("%w: %w", ErrUnknown, err)
		case what.File && !slices.ContainsFunc(p.Exes, func(e *Executable) bool { return e.dev == f.Dev && e.ino == f.Ino }):
			return p.otherFile(f)
		case !slices.Contains(p.Digests, f.SHA256):
			return fmt.Errorf("its executable's SHA-256 is %s", f.SHA256)
		}
	}
	return nil
}

// otherFile says that the executable is not a reader's, and says more where the
// paths are the same and the files are not.
func (p *Policy) otherFile(f process.Facts) error {
	path := strings.TrimSuffix(f.Exe, " (deleted)")
	if slices.ContainsFunc(p.Exes, func(e *Executable) bool { return e.Path == path }) {
		return fmt.Errorf("%s is another file than it was when mounted", path)
	}
	return fmt.Errorf("%s is not a reader's executable", f.Exe)
}
