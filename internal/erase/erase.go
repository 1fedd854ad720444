// Package erase is a file that is to be gone for good: the one that holds a
// passphrase, once it has been used, or a plaintext, once it is encrypted.
//
// Nothing here reads the file: it is opened, passed on, and removed. Whatever
// might keep it from being removed is looked for when it is opened, so that a
// start fails while everything is still as it was.
package erase

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

var (
	// ErrSymlink: removing the link would leave what it points to.
	ErrSymlink = errors.New("is a symbolic link; removing it would leave the file it points to")
	// ErrHardLink: the file has another name somewhere.
	ErrHardLink = errors.New("has another name (a hard link), which would stay")
	// ErrReplaced: another file has taken the name since it was opened.
	ErrReplaced = errors.New("was replaced by another file since it was opened")
	// ErrStays: there is a file under the name after it was removed.
	ErrStays = errors.New("is there again after it was removed")
	// ErrNoRegular: neither a file nor a pipe.
	ErrNoRegular = errors.New("is neither a file nor a pipe")
)

// A RemoveError says that the file cannot be removed, or was not.
type RemoveError struct {
	Path string
	Err  error
}

func (e *RemoveError) Error() string {
	return fmt.Sprintf("%s cannot be removed: %v", e.Path, e.Err)
}
func (e *RemoveError) Unwrap() error { return e.Err }

// An OverwriteError says that the file is gone, but that its content was not
// overwritten first and may still be on the disk.
type OverwriteError struct {
	Path string
	Err  error
}

func (e *OverwriteError) Error() string {
	return fmt.Sprintf("%s was removed but not overwritten: %v", e.Path, e.Err)
}
func (e *OverwriteError) Unwrap() error { return e.Err }

// A File is an open file that may have to go.
type File struct {
	f    *os.File
	w    *os.File // the same file, to overwrite it; nil where there is nothing to remove
	path string   // "" where there is nothing to remove
	dev  uint64
	ino  uint64

	// Exposed tells that the file's mode lets others than its owner read it.
	Exposed bool
}

// Open opens the file without reading it. A name in /dev/fd or /proc/self/fd is
// the descriptor of that number, which is used as it is. With remove it refuses
// what Remove could not take away.
func Open(path string, remove bool) (*File, error) {
	f, inherited, err := open(path)
	if err != nil {
		return nil, err
	}
	p := &File{f: f, path: path}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	p.dev, p.ino = uint64(st.Dev), st.Ino
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		p.Exposed = st.Mode&0o077 != 0
	case unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFCHR:
		// Reading it has emptied it.
	default:
		f.Close()
		return nil, &fs.PathError{Op: "open", Path: path, Err: ErrNoRegular}
	}
	if inherited || st.Mode&unix.S_IFMT != unix.S_IFREG || !remove {
		p.path = ""
		return p, nil
	}
	if err := p.removable(); err != nil {
		f.Close()
		return nil, &RemoveError{Path: path, Err: err}
	}
	return p, nil
}

func open(path string) (f *os.File, inherited bool, err error) {
	for _, dir := range []string{"/dev/fd/", "/proc/self/fd/"} {
		if n, found := strings.CutPrefix(path, dir); found {
			fd, err := strconv.Atoi(n)
			if err != nil || fd < 0 {
				return nil, false, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
			}
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
				return nil, false, &fs.PathError{Op: "open", Path: path, Err: err}
			}
			unix.CloseOnExec(fd)
			return os.NewFile(uintptr(fd), path), true, nil
		}
	}
	f, err = os.OpenFile(path, os.O_RDONLY, 0)
	return f, false, err
}

// File is the open file, for whoever reads it.
func (p *File) File() *os.File { return p.f }

// Removable is the path that Remove takes away, or "" where there is nothing to
// remove.
func (p *File) Removable() string { return p.path }

// Unlinked tells that the file has no name any more, whoever took it away.
func (p *File) Unlinked() bool {
	var st unix.Stat_t
	return unix.Fstat(int(p.f.Fd()), &st) == nil && st.Nlink == 0
}

// Identity tells this file from any other that may have its name meanwhile.
func (p *File) Identity() string { return fmt.Sprintf("%d:%d", p.dev, p.ino) }

// Close closes the file and leaves it where it is.
func (p *File) Close() error {
	if p.w != nil {
		p.w.Close()
	}
	return p.f.Close()
}

// removable looks for every reason against removal that can be known without
// trying.
func (p *File) removable() error {
	var st unix.Stat_t
	if err := unix.Lstat(p.path, &st); err != nil {
		return err
	}
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFLNK:
		return ErrSymlink
	case uint64(st.Dev) != p.dev || st.Ino != p.ino:
		return ErrReplaced
	case st.Nlink > 1:
		return ErrHardLink
	}
	var stx unix.Statx_t
	if err := unix.Statx(int(p.f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &stx); err == nil {
		if stx.Attributes&(unix.STATX_ATTR_IMMUTABLE|unix.STATX_ATTR_APPEND) != 0 {
			return unix.EPERM
		}
	}
	// Writing to the directory, and not being a read-only filesystem.
	if err := unix.Faccessat(unix.AT_FDCWD, filepath.Dir(p.path), unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
		return fmt.Errorf("directory %s: %w", filepath.Dir(p.path), err)
	}
	w, err := p.writable()
	if err != nil {
		return fmt.Errorf("it cannot be overwritten: %w", err)
	}
	p.w = w
	return nil
}

// writable opens the same file for writing, whatever name it has by now. An
// owner without write permission gives it to itself: the file is about to go.
func (p *File) writable() (*os.File, error) {
	self := "/proc/self/fd/" + strconv.Itoa(int(p.f.Fd()))
	w, err := os.OpenFile(self, os.O_WRONLY, 0)
	if !errors.Is(err, fs.ErrPermission) {
		return w, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(p.f.Fd()), &st); err != nil {
		return nil, err
	}
	if err := unix.Fchmod(int(p.f.Fd()), st.Mode&0o7777|0o200); err != nil {
		return nil, err
	}
	// Back at once: if the start fails the file must be as it was.
	defer unix.Fchmod(int(p.f.Fd()), st.Mode&0o7777)
	return os.OpenFile(self, os.O_WRONLY, 0)
}

// Remove takes the file away: first its name, for an unlink that fails leaves
// it whole; then its content, through the descriptor that is open since Open;
// then it looks that the name is free. A *RemoveError means that the file is, or
// may be, still there; an *OverwriteError that it is gone. Where there is
// nothing to remove it does nothing.
func (p *File) Remove() error {
	if p.path == "" {
		return nil
	}
	if err := p.unlink(); err != nil {
		return &RemoveError{Path: p.path, Err: err}
	}
	if err := p.overwrite(); err != nil {
		return &OverwriteError{Path: p.path, Err: err}
	}
	return nil
}

func (p *File) unlink() error {
	var st unix.Stat_t
	switch err := unix.Lstat(p.path, &st); {
	case err != nil:
		return err
	case uint64(st.Dev) != p.dev || st.Ino != p.ino:
		return ErrReplaced
	case st.Nlink > 1:
		return ErrHardLink
	}
	if err := unix.Unlink(p.path); err != nil {
		return err
	}
	if err := unix.Fstat(int(p.f.Fd()), &st); err != nil {
		return err
	}
	if st.Nlink != 0 {
		// The name that went was another file's.
		return ErrReplaced
	}
	switch err := unix.Lstat(p.path, &st); {
	case err == unix.ENOENT:
		return nil
	case err != nil:
		return err
	}
	return ErrStays
}

func (p *File) overwrite() error {
	info, err := p.w.Stat()
	if err != nil {
		return err
	}
	zeros := make([]byte, 64<<10)
	for off := int64(0); off < info.Size(); off += int64(len(zeros)) {
		if _, err := p.w.WriteAt(zeros[:min(int64(len(zeros)), info.Size()-off)], off); err != nil {
			return err
		}
	}
	if err := p.w.Sync(); err != nil {
		return err
	}
	if err := p.w.Truncate(0); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(p.path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
