// Package fs answers the kernel's questions about a mount that serves secrets
// once.
//
// Requests are read by one goroutine, in the order in which the kernel sent
// them; that order is what makes a close followed by an open do the right
// thing. Everything about a secret is answered by that goroutine at once.
// Whatever might wait for something else (the files under the mount, /proc, the
// unmounting process) is answered by a goroutine of its own, so that no request
// ever waits for another.
//
// The content of a secret does not pass through this package: the reply's
// header is made here, and secret memory goes behind it through a pipe.
package fs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"reflect"
	"sync"
	"time"

	"bazil.org/fuse"
	"golang.org/x/sys/unix"

	"oncefs/internal/once"
	"oncefs/internal/process"
	"oncefs/internal/secretmem"
)

// StatusAttr is the extended attribute of the mount's root that tells the
// status. Reading it claims nothing. Only root and the user who mounted may.
const StatusAttr = "user.oncefs.status"

// A File is one secret and what stat shows of it.
type File struct {
	Name     string
	Secret   *once.Secret
	Bytes    *secretmem.Buffer // what Secret guards
	Perm     uint32            // permission bits, without any that write
	UID, GID uint32
}

// Options say what to mount where.
type Options struct {
	Path       string
	Files      []File
	AllowOther bool // let other users than the mounting one in, as far as modes allow
	// Under is the directory that is mounted over, opened before. nil mounts the
	// one file over a file.
	Under *os.File
	// Release takes a mount over a file away, together with its name. It is
	// called before the first byte of the last read goes out, and may be called
	// again.
	Release func() error
	// Status makes the value of StatusAttr.
	Status func() []byte
	// Failed is told of what cannot be told to any reader. It must not block.
	Failed func(error)
}

// A Server serves one mount.
type Server struct {
	opts  Options
	conn  *fuse.Conn
	dev   int // a duplicate of conn's descriptor, for replies that carry secrets
	stop  int // eventfd
	pipe  *secretmem.Pipe
	files []*file
	names map[string]*file
	under *under // nil over a file
	since time.Time

	work sync.WaitGroup // requests that are answered elsewhere

	mu      sync.Mutex
	handles map[fuse.HandleID]any // *reading, *listing or *os.File
	last    fuse.HandleID
	changed time.Time // of the root's listing

	release sync.Once
	freed   error
}

// file is a secret with its place in the mount.
type file struct {
	File
	node  fuse.NodeID
	inode uint64
}

// reading is a claim that a reader has open.
type reading struct {
	*file
	claim *once.Claim
	// cached: the kernel read through its page cache (mmap, sendfile, splice), so
	// pages are to be dropped at the end.
	cached bool
}

// firstUnder is the first node of the files under the mount; secrets come
// before.
const firstUnder fuse.NodeID = 1 << 32

// Mount mounts and does not serve yet. The mount helper must be in PATH.
func Mount(o Options) (_ *Server, err error) {
	if (o.Under == nil) != (o.Release != nil) || o.Under == nil && len(o.Files) != 1 {
		return nil, errors.New("one file to mount over a file, or a directory to mount over")
	}
	s := &Server{opts: o, dev: -1, stop: -1, names: map[string]*file{}, handles: map[fuse.HandleID]any{}, since: time.Now(), changed: time.Now()}
	// One number for each, far from those of any disk filesystem, and unlike
	// those of another mount of ours: /proc/PID/fdinfo is searched for it.
	base := rand.Uint64N(1<<61) | 1<<62
	for i, f := range o.Files {
		node := fuse.RootID
		if o.Under != nil {
			node = fuse.RootID + 1 + fuse.NodeID(i)
		}
		s.files = append(s.files, &file{File: f, node: node, inode: base + uint64(i)})
		s.names[f.Name] = s.files[i]
	}
	if o.Under != nil {
		if s.under, err = newUnder(o.Under); err != nil {
			return nil, err
		}
	}
	if s.pipe, err = secretmem.NewPipe(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.closeDescriptors()
		}
	}()
	if s.stop, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	options := []fuse.MountOption{
		fuse.FSName("oncefs"),
		fuse.Subtype("oncefs"),
		// The kernel refuses changes by itself; what reaches us all the same is
		// refused too.
		fuse.ReadOnly(),
		// The kernel checks modes, owners and groups: it knows the groups of the
		// asking process, we would have to look them up.
		fuse.DefaultPermissions(),
		fuse.MaxReadahead(secretmem.MaxSend),
		// Release is a background request: it must not queue behind read-ahead.
		fuse.MaxBackground(1024),
	}
	if o.AllowOther {
		options = append(options, fuse.AllowOther())
	}
	if s.conn, err = fuse.Mount(o.Path, options...); err != nil {
		return nil, err
	}
	if s.dev, err = deviceOf(s.conn); err != nil {
		return nil, err
	}
	return s, nil
}

// deviceOf duplicates the connection's descriptor, which the library keeps to
// itself. Nobody else uses the connection yet, so reading its field is safe;
// should the library rename it, the mount fails and a test says so.
//
// The descriptor is made non-blocking, for both: a request that was withdrawn
// between poll and read must not leave us waiting, deaf to Stop.
func deviceOf(conn *fuse.Conn) (int, error) {
	field := reflect.ValueOf(conn).Elem().FieldByName("dev")
	if !field.IsValid() || field.Type() != reflect.TypeFor[*os.File]() || field.IsNil() {
		return -1, errors.New("the FUSE library keeps its device elsewhere than it did")
	}
	dev, err := unix.FcntlInt((*os.File)(field.UnsafePointer()).Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return -1, fmt.Errorf("duplicate the FUSE device: %w", err)
	}
	if err := unix.SetNonblock(dev, true); err != nil {
		unix.Close(dev)
		return -1, fmt.Errorf("make the FUSE device non-blocking: %w", err)
	}
	return dev, nil
}

func (s *Server) closeDescriptors() {
	if s.pipe != nil {
		s.pipe.Close()
	}
	if s.conn != nil {
		s.conn.Close()
	}
	for _, fd := range []*int{&s.dev, &s.stop} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}

// Serve answers until the mount is gone or Stop is called. When it returns, the
// connection is closed: a reader that still has the file open gets ENOTCONN. The
// secrets are as they were; they are the caller's to destroy.
func (s *Server) Serve() error {
	err := s.loop()
	s.work.Wait()
	s.closeDescriptors()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.handles {
		if f, ok := h.(*os.File); ok {
			f.Close()
		}
	}
	s.handles = nil
	return err
}

// Stop makes Serve return. It must not be called after Serve has returned.
func (s *Server) Stop() {
	one := binary.NativeEndian.AppendUint64(nil, 1)
	unix.Write(s.stop, one)
}

func (s *Server) loop() error {
	fds := []unix.PollFd{{Fd: int32(s.dev), Events: unix.POLLIN}, {Fd: int32(s.stop), Events: unix.POLLIN}}
	for {
		req, err := s.conn.ReadRequest()
		switch {
		case err == nil:
			s.dispatch(req)
		case err == io.EOF: // unmounted
			return nil
		case errors.Is(err, unix.ECONNABORTED):
			return fmt.Errorf("the FUSE connection was aborted: %w", err)
		case errors.Is(err, unix.EAGAIN):
			if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
				return fmt.Errorf("poll: %w", err)
			}
			if fds[1].Revents != 0 {
				return nil
			}
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENOENT):
			// Interrupted, or the request was withdrawn: there may be others.
		default:
			var errno unix.Errno
			if errors.As(err, &errno) {
				return fmt.Errorf("read from the FUSE device: %w", err)
			}
			// A request that makes no sense was dropped; its sender is the kernel.
			s.failed(err)
		}
	}
}

func (s *Server) failed(err error) {
	if err != nil && s.opts.Failed != nil {
		s.opts.Failed(err)
	}
}

// elsewhere answers a request in a goroutine of its own.
func (s *Server) elsewhere(f func()) { s.work.Go(f) }

func (s *Server) addHandle(h any) fuse.HandleID {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last++
	s.handles[s.last] = h
	return s.last
}

func (s *Server) handle(id fuse.HandleID) any {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.handles[id]
}

func (s *Server) dropHandle(id fuse.HandleID) any {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.handles[id]
	delete(s.handles, id)
	return h
}

// secret is the secret at a node, or nil.
func (s *Server) secret(node fuse.NodeID) *file {
	if s.under == nil {
		if node == fuse.RootID {
			return s.files[0]
		}
		return nil
	}
	if i := int64(node) - int64(fuse.RootID) - 1; i >= 0 && i < int64(len(s.files)) {
		return s.files[i]
	}
	return nil
}

func who(h *fuse.Header) func() once.Reader {
	return func() once.Reader {
		return once.Reader{PID: h.Pid, UID: h.Uid, GID: h.Gid, Exe: process.Exe(h.Pid), Cgroup: process.Cgroup(h.Pid)}
	}
}

func (f *file) attr(since time.Time) fuse.Attr {
	size := uint64(f.Secret.Size())
	return fuse.Attr{
		Inode: f.inode, Size: size, Blocks: (size + 511) / 512, BlockSize: uint32(unix.Getpagesize()),
		Atime: since, Mtime: since, Ctime: since,
		Mode: os.FileMode(f.Perm), Nlink: 1, Uid: f.UID, Gid: f.GID,
	}
}

// noteChange moves the root's times: its listing is another one now.
func (s *Server) noteChange() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changed = time.Now()
}
