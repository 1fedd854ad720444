package mountpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
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
// namespaces can be renamed, with the mounts on it, and removed, and they go
// with it (Linux 3.18 and later, d_move and __detach_mounts). Renamed first, it
// is never seen bare under the name that was served: whoever is on the way
// through that name has the dentry's sequence number from before the rename and
// looks it up again (rcu-walk, Documentation/filesystems/path-lookup.rst). So
// for Unlink the calling process must have a mount namespace of its own, and
// NewRemover be called before the mount is made.
type Remover struct {
	how  How
	path string
	dir  int // the placeholder's directory, in this namespace
	done bool
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

// Alone tells that Remove starts no program: fusermount3 unmounts for a user who
// may not.
func (r *Remover) Alone() bool { return r.how == Unlink || os.Geteuid() == 0 }

// Remove takes the mount off. It may be called again, and when the mount is
// gone already. Once it has succeeded it does nothing more: a file that
// somebody makes under the name that became free is theirs.
func (r *Remover) Remove() (err error) {
	if r.done {
		return nil
	}
	switch r.how {
	case Unlink:
		err = r.unlinkAside(filepath.Base(r.path))
	case DetachAndUnlink:
		if err = r.detach(); err == nil {
			err = r.unlink(r.path)
		}
	default:
		return r.detach() // nothing of anybody's is at stake
	}
	r.done = err == nil
	return err
}

// unlinkAside removes the name by way of another one.
func (r *Remover) unlinkAside(name string) error {
	if err := r.isPlaceholder(name); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	aside := asideOf(name)
	if err := unix.Renameat2(r.dir, name, r.dir, aside, unix.RENAME_NOREPLACE); err != nil && !errors.Is(err, unix.ENOENT) {
		// A filesystem that cannot, or a file of that name: without the detour.
		return r.unlink(name)
	}
	return r.unlink(aside)
}

func (r *Remover) detach() error {
	top, err := at(r.path)
	if err != nil || !ours(top) {
		return err
	}
	return detach(r.path)
}

// asideOf is the name that a placeholder has for the instant before it is
// removed.
func asideOf(name string) string {
	const mark = ".oncefs-spent"
	return "." + name[:min(len(name), unix.NAME_MAX-1-len(mark))] + mark
}

// isPlaceholder looks that the name is still the placeholder that was put
// there.
func (r *Remover) isPlaceholder(name string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(r.dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "stat", Path: r.path, Err: err}
	}
	buf := make([]byte, len(nowhere)+1)
	n, _ := unix.Readlinkat(r.dir, name, buf)
	link := n > 0 && string(buf[:n]) == nowhere
	if !link && (st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != 0) {
		return &fs.PathError{Op: "remove", Path: r.path, Err: ErrNotEmpty}
	}
	return nil
}

// unlink removes the name if it is still the placeholder. Somebody else's file
// stays.
func (r *Remover) unlink(name string) error {
	if err := r.isPlaceholder(name); errors.Is(err, unix.ENOENT) {
		return nil
	} else if err != nil {
		return err
	}
	if err := unix.Unlinkat(r.dir, name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "remove", Path: r.path, Err: err}
	}
	return nil
}
