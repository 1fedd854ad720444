package mountpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// How says how a mount comes off.
type How string

const (
	// Detach unmounts lazily.
	Detach How = "detach"
	// Unlink removes the placeholder from a mount namespace in which nothing is
	// mounted on it; the mount goes with it.
	Unlink How = "unlink"
	// DetachAndUnlink unmounts and then removes the placeholder.
	DetachAndUnlink How = "detach-and-unlink"
)

// A Remover takes a mount off.
//
// For a mount over a file, unmounting first and removing the placeholder then
// would show the empty placeholder in between, and a program that reads an
// empty file believes it. But a file that is a mount point only in other mount
// namespaces can be removed, and the mounts on it go in the same instant (Linux
// 3.18 and later, __detach_mounts). So for Unlink the calling process must have
// a mount namespace of its own, and NewRemover be called before the mount is
// made.
type Remover struct {
	how  How
	path string
	dir  int // the placeholder's directory, in this namespace
}

// NewRemover prepares to take off what will be mounted on path.
func NewRemover(how How, path string) (*Remover, error) {
	r := &Remover{how: how, path: path, dir: unix.AT_FDCWD}
	switch how {
	case Detach, DetachAndUnlink:
	case Unlink:
		// Mounts that are made elsewhere later must not come here.
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return nil, fmt.Errorf("make mounts private: %w", err)
		}
		dir, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
		}
		r.dir = dir
	default:
		return nil, fmt.Errorf("unknown way to unmount: %q", string(how))
	}
	return r, nil
}

// Remove takes the mount off. It may be called again, and when the mount is
// gone already.
func (r *Remover) Remove() error {
	switch r.how {
	case Unlink:
		return r.unlink(filepath.Base(r.path))
	case DetachAndUnlink:
		if err := r.detach(); err != nil {
			return err
		}
		return r.unlink(r.path)
	}
	return r.detach()
}

func (r *Remover) detach() error {
	top, err := at(r.path)
	if err != nil || !ours(top) {
		return err
	}
	return detach(r.path)
}

// unlink removes the name if it is still the empty file that was put there.
// Somebody else's file stays.
func (r *Remover) unlink(name string) error {
	var st unix.Stat_t
	err := unix.Fstatat(r.dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "stat", Path: r.path, Err: err}
	}
	buf := make([]byte, len(nowhere)+1)
	n, _ := unix.Readlinkat(r.dir, name, buf)
	link := n > 0 && string(buf[:n]) == nowhere
	if !link && (st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != 0) {
		return &fs.PathError{Op: "remove", Path: r.path, Err: ErrNotEmpty}
	}
	if err := unix.Unlinkat(r.dir, name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "remove", Path: r.path, Err: err}
	}
	return nil
}
