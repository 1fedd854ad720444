package fs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"sync"

	"bazil.org/fuse"
	"golang.org/x/sys/unix"

	"oncefs/internal/once"
)

// under is the directory that was mounted over, seen through a descriptor that
// was opened before. Everything in it is served as it is, for reading only.
type under struct {
	dir  *os.File
	root fuse.Attr // as it was when mounted

	mu    sync.Mutex
	next  fuse.NodeID
	paths map[fuse.NodeID]*node
	nodes map[string]fuse.NodeID
}

// node is a path below dir that the kernel knows by number.
type node struct {
	path    string
	lookups uint64 // that the kernel has not yet forgotten
}

func newUnder(dir *os.File) (*under, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: dir.Name(), Err: err}
	}
	return &under{dir: dir, root: attrOf(&st), next: firstUnder, paths: map[fuse.NodeID]*node{}, nodes: map[string]fuse.NodeID{}}, nil
}

// open opens a path below the directory and never leaves it: neither a symbolic
// link nor .. is followed.
func (u *under) open(path string, flags uint64) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   flags | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(int(u.dir.Fd()), path, &how)
		if err == unix.EINTR || err == unix.EAGAIN && flags&unix.O_PATH != 0 {
			continue
		}
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

func (u *under) stat(path string) (fuse.Attr, error) {
	f, err := u.open(path, unix.O_PATH)
	if err != nil {
		return fuse.Attr{}, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fuse.Attr{}, err
	}
	return attrOf(&st), nil
}

// known counts a lookup and returns the path's node.
func (u *under) known(path string) fuse.NodeID {
	u.mu.Lock()
	defer u.mu.Unlock()
	id, ok := u.nodes[path]
	if !ok {
		id = u.next
		u.next++
		u.nodes[path] = id
		u.paths[id] = &node{path: path}
	}
	u.paths[id].lookups++
	return id
}

func (u *under) path(id fuse.NodeID) (string, bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	n, ok := u.paths[id]
	if !ok {
		return "", false
	}
	return n.path, true
}

func (s *Server) forget(id fuse.NodeID, n uint64) {
	if s.under == nil || id < firstUnder {
		return
	}
	u := s.under
	u.mu.Lock()
	defer u.mu.Unlock()
	known, ok := u.paths[id]
	if !ok {
		return
	}
	known.lookups -= min(n, known.lookups)
	if known.lookups == 0 {
		delete(u.paths, id)
		delete(u.nodes, known.path)
	}
}

// below answers a request about something under the mount, elsewhere.
func (s *Server) below(r fuse.Request, id fuse.NodeID, f func(path string)) {
	if s.under == nil {
		r.RespondError(unix.ENOENT)
		return
	}
	path, ok := s.under.path(id)
	if d := s.dir(id); d != nil && d.shows {
		path, ok = d.path, true
	}
	if !ok {
		r.RespondError(unix.ESTALE)
		return
	}
	s.elsewhere(func() { f(path) })
}

func (s *Server) lookupUnder(r *fuse.LookupRequest, parent string) {
	path := filepath.Join(parent, r.Name)
	if r.Name == "." || r.Name == ".." {
		r.RespondError(unix.ENOENT)
		return
	}
	attr, err := s.under.stat(path)
	if err != nil {
		r.RespondError(errno(err))
		return
	}
	r.Respond(&fuse.LookupResponse{Node: s.under.known(path), Attr: attr})
}

func (s *Server) getattrUnder(r *fuse.GetattrRequest, path string) {
	attr, err := s.under.stat(path)
	if err != nil {
		r.RespondError(errno(err))
		return
	}
	r.Respond(&fuse.GetattrResponse{Attr: attr})
}

func (s *Server) openUnder(r *fuse.OpenRequest, path string) {
	if r.Dir {
		r.Respond(&fuse.OpenResponse{Handle: s.addHandle(&listing{path: path})})
		return
	}
	if !r.Flags.IsReadOnly() {
		r.RespondError(unix.EROFS)
		return
	}
	// Not blocking: the kernel opens FIFOs and devices by itself, but the file may
	// have been replaced by one.
	f, err := s.under.open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		r.RespondError(errno(err))
		return
	}
	r.Respond(&fuse.OpenResponse{Handle: s.addHandle(f)})
}

// maxRead is the most that one read of a file under the mount is answered with;
// the kernel asks for no more than a megabyte (FUSE_MAX_MAX_PAGES).
const maxRead = 1 << 20

func (s *Server) readUnder(r *fuse.ReadRequest, h any) {
	switch h := h.(type) {
	case *os.File:
		buf := make([]byte, min(r.Size, maxRead))
		n, err := pread(h, buf, r.Offset)
		if err != nil {
			r.RespondError(errno(err))
			return
		}
		r.Respond(&fuse.ReadResponse{Data: buf[:n]})
	case *listing:
		data, err := s.list(h, r.Offset, r.Size)
		if err != nil {
			r.RespondError(errno(err))
			return
		}
		r.Respond(&fuse.ReadResponse{Data: data})
	default:
		r.RespondError(unix.EBADF)
	}
}

// pread reads without waiting for more. The descriptor is kept for as long: whoever
// closes the file meanwhile does not give its number to another.
func pread(f *os.File, buf []byte, offset int64) (n int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	if closed := raw.Control(func(fd uintptr) { n, err = unix.Pread(int(fd), buf, offset) }); closed != nil {
		return 0, unix.EBADF
	}
	return n, err
}

func (s *Server) readlink(r *fuse.ReadlinkRequest, path string) {
	f, err := s.under.open(path, unix.O_PATH)
	if err != nil {
		r.RespondError(errno(err))
		return
	}
	defer f.Close()
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(f.Fd()), "", buf)
	if err != nil {
		r.RespondError(errno(err))
		return
	}
	r.Respond(string(buf[:n]))
}

func (s *Server) statfs(r *fuse.StatfsRequest) {
	if s.under == nil {
		r.Respond(&fuse.StatfsResponse{Bsize: uint32(unix.Getpagesize()), Namelen: unix.NAME_MAX})
		return
	}
	s.elsewhere(func() {
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(s.under.dir.Fd()), &st); err != nil {
			r.RespondError(errno(err))
			return
		}
		r.Respond(&fuse.StatfsResponse{
			Blocks: st.Blocks, Bfree: st.Bfree, Bavail: 0, Files: st.Files, Ffree: st.Ffree,
			Bsize: uint32(st.Bsize), Namelen: uint32(st.Namelen), Frsize: uint32(st.Frsize),
		})
	})
}

// listing is an open directory. Its entries are read when the reader begins,
// not when it opens, and a secret's is left out as soon as it is claimed.
type listing struct {
	dir  *dir   // nil where no secret is in it
	path string // of one that has none

	mu      sync.Mutex
	entries []entry
}

type entry struct {
	fuse.Dirent
	secret *file
}

func (s *Server) list(l *listing, offset int64, size int) ([]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if offset == 0 {
		if err := s.load(l); err != nil {
			return nil, err
		}
	}
	var data []byte
	for i := max(0, offset); i < int64(len(l.entries)); i++ {
		e := l.entries[i]
		if e.secret != nil && e.secret.Secret.State() != once.Sealed {
			continue
		}
		start := len(data)
		longer := fuse.AppendDirent(data, e.Dirent)
		if len(longer) > size {
			break
		}
		data = longer
		// struct fuse_dirent: u64 ino, u64 off. The offset is where to go on,
		// which is the entry's number and not, as the library has it, a count of
		// bytes: entries may vanish between two calls.
		binary.NativeEndian.PutUint64(data[start+8:], uint64(i+1))
	}
	return data, nil
}

func (s *Server) load(l *listing) error {
	l.entries = l.entries[:0]
	add := func(name string, inode uint64, kind fuse.DirentType, secret *file) {
		l.entries = append(l.entries, entry{Dirent: fuse.Dirent{Inode: inode, Type: kind, Name: name}, secret: secret})
	}
	here, up, path := s.under.root.Inode, s.under.root.Inode, l.path
	if l.dir != nil {
		here, up, path = l.dir.attr.Inode, l.dir.parent.attr.Inode, l.dir.path
	}
	add(".", here, fuse.DT_Dir, nil)
	add("..", up, fuse.DT_Dir, nil)
	if l.dir != nil {
		for _, own := range l.dir.own {
			switch own := own.(type) {
			case *file:
				add(filepath.Base(own.Name), own.inode, fuse.DT_File, own)
			case *dir:
				add(filepath.Base(own.path), own.attr.Inode, fuse.DT_Dir, nil)
			}
		}
		if !l.dir.shows {
			return nil
		}
	}
	disk, err := s.under.open(path, unix.O_RDONLY|unix.O_DIRECTORY)
	if l.dir != nil && errors.Is(err, unix.ENOENT) {
		return nil // it was removed since; what is mounted is there
	}
	if err != nil {
		return err
	}
	defer disk.Close()
	entries, err := readDir(int(disk.Fd()))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if l.dir != nil && (l.dir.files[e.Name] != nil || l.dir.dirs[e.Name] != nil) {
			continue // what is mounted stands before it, now and when it is spent
		}
		l.entries = append(l.entries, entry{Dirent: e})
	}
	return nil
}

// readDir reads a whole directory with getdents64(2), whose entries carry
// number and type, so that no file need be looked at.
func readDir(fd int) ([]fuse.Dirent, error) {
	var all []fuse.Dirent
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Getdents(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return all, err
		}
		// struct linux_dirent64: u64 ino, s64 off, u16 reclen, u8 type, name.
		for rest := buf[:n]; len(rest) > 19; {
			length := min(int(binary.NativeEndian.Uint16(rest[16:])), len(rest))
			name, _, _ := bytes.Cut(rest[19:length], []byte{0})
			if e := (fuse.Dirent{Inode: binary.NativeEndian.Uint64(rest), Type: fuse.DirentType(rest[18]), Name: string(name)}); e.Name != "." && e.Name != ".." {
				all = append(all, e)
			}
			rest = rest[length:]
		}
	}
}
