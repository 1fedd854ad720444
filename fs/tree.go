package fs

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"time"

	"bazil.org/fuse"
	"golang.org/x/sys/unix"
)

// A Dir is a directory that files are in. Where the directory that is mounted over
// has one of that name, that one's owner and mode count, for its files show
// through.
type Dir struct {
	Name     string // like a File's
	Perm     uint32
	UID, GID uint32
}

// dir is a directory that secrets are in. It is there as long as the mount is,
// also when all of them are spent.
type dir struct {
	path   string // "." is the root
	parent *dir   // the root's is itself
	node   fuse.NodeID
	attr   fuse.Attr
	shows  bool // the directory that is mounted over has it too
	files  map[string]*file
	dirs   map[string]*dir
	own    []any // *file and *dir, in the order of the listing

	changed time.Time // of the listing; Server.mu guards it
}

// plant makes the tree of what is mounted; inode is the first number for its
// directories.
func (s *Server) plant(inode uint64) error {
	root := &dir{path: ".", node: fuse.RootID, attr: s.under.root, shows: true}
	root.parent = root
	known := map[string]*dir{".": root}
	s.dirs = []*dir{root}
	for _, d := range s.opts.Dirs {
		in, name, err := place(known, d.Name)
		if err != nil {
			return err
		}
		made := &dir{path: d.Name, parent: in, node: fuse.RootID + fuse.NodeID(len(s.files)+len(s.dirs)), attr: fuse.Attr{
			Inode: inode + uint64(len(s.dirs)), BlockSize: uint32(unix.Getpagesize()), Atime: s.since,
			Mode: os.ModeDir | os.FileMode(d.Perm), Nlink: 2, Uid: d.UID, Gid: d.GID,
		}}
		if in.shows {
			if err := made.show(s.under); err != nil {
				return err
			}
		}
		in.add(name, made)
		known[d.Name] = made
		s.dirs = append(s.dirs, made)
	}
	for _, f := range s.files {
		in, name, err := place(known, f.Name)
		if err != nil {
			return err
		}
		f.parent = in
		in.add(name, f)
	}
	for _, d := range s.dirs {
		d.changed = s.since
	}
	return nil
}

// place finds the directory that a name is in, and refuses a name that is taken or
// leads elsewhere.
func place(known map[string]*dir, full string) (in *dir, name string, err error) {
	if full == "." || !filepath.IsLocal(full) || filepath.Clean(full) != full {
		return nil, "", fmt.Errorf("%q is no name below the mount", full)
	}
	name = path.Base(full)
	if in = known[path.Dir(full)]; in == nil {
		return nil, "", fmt.Errorf("%q is in no directory", full)
	}
	if in.files[name] != nil || in.dirs[name] != nil {
		return nil, "", fmt.Errorf("two of the name %q", full)
	}
	return in, name, nil
}

func (d *dir) add(name string, what any) {
	if d.files == nil {
		d.files, d.dirs = map[string]*file{}, map[string]*dir{}
	}
	switch what := what.(type) {
	case *file:
		d.files[name] = what
	case *dir:
		d.dirs[name] = what
	}
	d.own = append(d.own, what)
}

// show looks whether the directory that is mounted over has this one too. What is
// there and is no directory is hidden, like a file of a secret's name.
func (d *dir) show(under *under) error {
	attr, err := under.stat(d.path)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return nil
	case err != nil:
		return &os.PathError{Op: "stat", Path: d.path, Err: err}
	case attr.Mode.IsDir():
		d.shows, d.attr = true, attr
	}
	return nil
}

// dir is the directory at a node, or nil.
func (s *Server) dir(node fuse.NodeID) *dir {
	if s.under == nil {
		return nil
	}
	if node == fuse.RootID {
		return s.dirs[0]
	}
	if i := int64(node) - int64(fuse.RootID) - int64(len(s.files)); i >= 1 && i < int64(len(s.dirs)) {
		return s.dirs[i]
	}
	return nil
}

// dirAttr is answered from memory: every path walk asks for it.
func (s *Server) dirAttr(d *dir) fuse.Attr {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := d.attr
	a.Mtime, a.Ctime = d.changed, d.changed
	return a
}

// noteChange moves the times of the directory that a secret is in: its listing is
// another one now.
func (s *Server) noteChange(f *file) {
	if f.parent == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f.parent.changed = time.Now()
}
