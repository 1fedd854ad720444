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
	"sync/atomic"
	"time"

	"bazil.org/fuse"
	"golang.org/x/sys/unix"

	"oncefs/internal/once"
	"oncefs/internal/secretmem"
	"oncefs/internal/wait"
)

// StatusAttr is the extended attribute of the mount's root that tells the
// status. Of what does not fit into one, StatusAttr with .N tells from file N on.
// Reading it claims nothing. Only root and the user who mounted may. The
// kernel leaves who may read a system attribute to the filesystem (xattr(7)); for
// a user attribute it would ask for the permission to read the file, which over a
// file is not there for anybody while it is claimed.
const StatusAttr = "system.oncefs.status"

// A File is one secret and what stat shows of it.
type File struct {
	Name     string // with the directories that it is in, slashes between them
	Secret   *once.Secret
	Bytes    *secretmem.Buffer // what Secret guards
	Perm     uint32            // permission bits, without any that write
	UID, GID uint32
}

// Options say what to mount where.
type Options struct {
	Path       string
	Files      []File
	Dirs       []Dir // that the files are in, parents first; none over a file
	AllowOther bool  // let other users than the mounting one in, as far as modes allow
	// Under is the directory that is mounted over, opened before. nil mounts the
	// one file over a file.
	Under *os.File
	// Release takes a mount over a file away, together with its name. It is
	// called before the first byte of the last read goes out, and may be called
	// again.
	Release func() error
	// Allow decides who may read: nil lets everybody in, as far as modes go. An
	// error turns the reader away with EACCES before anything is claimed, and its
	// text goes into the refusal's event: it says why, and nothing secret. pid is
	// the asking thread's, 0 where it is outside our pid namespace; uid and gid
	// are the kernel's word on the asking process. It is called in a goroutine of
	// its own and may take a moment: until it returns the kernel keeps the asking
	// thread, and so its number. What it cannot tell it must not allow.
	Allow func(pid, uid, gid uint32) error
	// Who looks readers up for the log; nil leaves them unknown.
	Who Lookup
	// Holds tells whether a process has a file of that inode number open.
	Holds func(pid uint32, inode uint64) bool
	// Status makes the value of StatusAttr, which tells of the files from that
	// number on: as many as fit.
	Status func(from int) []byte
	// Failed is told of what cannot be told to any reader. It must not block.
	Failed func(error)
}

// A Server serves one mount.
type Server struct {
	opts   Options
	conn   *fuse.Conn
	devFD  int // a duplicate of conn's descriptor: to wait on, and for replies that carry secrets
	pipe   *secretmem.Pipe
	who    asking
	wake   *os.File // an eventfd(2) that ends a wait of the loop, and its number
	wakeFD int32
	over   atomic.Bool
	files  []*file
	dirs   []*dir // the root first; none over a file
	under  *under // nil over a file
	since  time.Time

	work sync.WaitGroup // requests that are answered elsewhere

	mu      sync.Mutex
	handles map[fuse.HandleID]any // *reading, *listing or *os.File
	last    fuse.HandleID

	release sync.Once
	freed   error
}

// file is a secret with its place in the mount.
type file struct {
	File
	parent *dir // nil over a file
	node   fuse.NodeID
	inode  uint64
	opener atomic.Uint32 // thread that made the latest claim
}

// reading is a claim that a reader has open.
type reading struct {
	*file
	claim *once.Claim
	// known: it is known who made the claim, as far as it ever will be. Until then
	// reads wait. Both are the loop's, once the kernel knows the handle.
	known   bool
	waiting []*fuse.ReadRequest
	// cached: the kernel read through its page cache (mmap, sendfile, splice), so
	// pages are to be dropped at the end.
	cached bool
}

// firstUnder is the first node of the files under the mount; secrets come
// before.
const firstUnder fuse.NodeID = 1 << 32

// Mount mounts and does not serve yet. The mount helper must be in PATH.
func Mount(o Options) (*Server, error) {
	s, err := newServer(o)
	if err != nil {
		return nil, err
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
	conn, err := fuse.Mount(o.Path, options...)
	if err == nil {
		err = s.attach(conn)
	}
	if err != nil {
		s.closeDescriptors()
		return nil, err
	}
	return s, nil
}

// newServer makes a server that has no kernel to talk to yet.
func newServer(o Options) (_ *Server, err error) {
	if (o.Under == nil) != (o.Release != nil) || o.Under == nil && len(o.Files) != 1 {
		return nil, errors.New("one file to mount over a file, or a directory to mount over")
	}
	s := &Server{opts: o, devFD: -1, who: asking{lookup: o.Who}, handles: map[fuse.HandleID]any{}, since: time.Now()}
	// One number for each, far from those of any disk filesystem, and unlike
	// those of another mount of ours: /proc/PID/fdinfo is searched for it.
	base := rand.Uint64N(1<<61) | 1<<62
	for i, f := range o.Files {
		node := fuse.RootID
		if o.Under != nil {
			node = fuse.RootID + 1 + fuse.NodeID(i)
		}
		s.files = append(s.files, &file{File: f, node: node, inode: base + uint64(i)})
	}
	defer func() {
		if err == nil {
			for _, f := range s.files {
				f.Secret.OnRevoke(func() { s.dropPages(f) })
			}
		}
	}()
	if o.Under != nil {
		if s.under, err = newUnder(o.Under); err != nil {
			return nil, err
		}
		if err := s.plant(base + uint64(len(s.files))); err != nil {
			return nil, err
		}
	}
	if s.pipe, err = secretmem.NewPipe(); err != nil {
		return nil, err
	}
	// Blocking, so that the Go runtime does not wait on it too. Only who was woken
	// reads it.
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		s.pipe.Close()
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	s.wake, s.wakeFD = os.NewFile(uintptr(wake), "eventfd"), int32(wake)
	return s, nil
}

// attach takes the kernel's end of a mount.
func (s *Server) attach(conn *fuse.Conn) (err error) {
	s.conn = conn
	s.devFD, err = deviceOf(s.conn)
	return err
}

// deviceOf duplicates the connection's descriptor, which the library keeps to
// itself. Nobody else uses the connection yet, so reading its field is safe;
// should the library rename it, the mount fails and a test says so.
//
// The descriptor is made non-blocking, for both: the loop waits on others with it.
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
	if s.devFD >= 0 {
		unix.Close(s.devFD)
	}
	s.wake.Close()
}

// Serve answers until the mount is gone or Stop is called. When it returns, the
// connection is closed: a reader that still has the file open gets ENOTCONN. The
// secrets are as they were; they are the caller's to destroy.
func (s *Server) Serve() error {
	stopped, err := s.loop()
	s.work.Wait()
	s.who.hearOut() // some are told of only when it is known who they are
	s.work.Wait()
	s.mu.Lock()
	left := s.handles
	s.handles = nil
	s.mu.Unlock()
	for _, h := range left {
		switch h := h.(type) {
		case *os.File:
			h.Close()
		case *reading:
			if !stopped && err == nil {
				// A mount that was detached ends with the last close in it, and
				// nobody is told of that close.
				h.claim.Close()
			}
		}
	}
	s.closeDescriptors()
	return err
}

// Stop makes Serve return.
func (s *Server) Stop() {
	s.over.Store(true)
	s.rouse()
}

// rouse ends a wait of the loop, for which something has changed.
func (s *Server) rouse() {
	s.wake.Write(binary.NativeEndian.AppendUint64(nil, 1)) // fails only when the loop has ended
}

func (s *Server) loop() (stopped bool, _ error) {
	for w := (wait.Waiter{}); !s.over.Load(); {
		s.who.hear()
		req, err := s.readRequest()
		switch {
		case err == nil:
			s.dispatch(req)
		case errors.Is(err, unix.EAGAIN):
			if err := s.wait(&w); err != nil {
				return false, err
			}
		case err == io.EOF, errors.Is(err, unix.ECONNABORTED):
			// Unmounted; ECONNABORTED is the same between the taking of a request and
			// its copying (fuse_dev_do_read in fs/fuse/dev.c).
			return false, nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENOENT):
			// Interrupted, or the request was withdrawn: there may be others.
		default:
			return false, fmt.Errorf("read from the FUSE device: %w", err)
		}
	}
	return true, nil
}

// wait waits for the kernel, for who reads, or to be roused; or returns for nothing.
func (s *Server) wait(w *wait.Waiter) error {
	fds := []unix.PollFd{{Fd: int32(s.devFD), Events: unix.POLLIN}, {Fd: s.wakeFD, Events: unix.POLLIN}, {Fd: -1}}
	limit := time.Duration(-1)
	if left, due := s.who.left(); due {
		fds[2] = unix.PollFd{Fd: int32(s.opts.Who.FD()), Events: unix.POLLIN}
		limit = left
	}
	if err := w.Poll(fds, limit); err != nil {
		return fmt.Errorf("wait for the FUSE device: %w", err)
	}
	if fds[1].Revents != 0 {
		var count [8]byte
		unix.Read(int(s.wakeFD), count[:])
	}
	return nil
}

// errNonsense is a message that the library could not even refuse.
var errNonsense = errors.New("a message makes no sense")

// readRequest reads the next request. One that makes no sense is an error that
// ends the connection: it cannot be answered, for the library does not tell which
// it was, and who sent it would wait for ever. The library trusts the kernel in
// places, and would panic.
func (s *Server) readRequest() (req fuse.Request, err error) {
	defer func() {
		if recover() != nil {
			req, err = nil, errNonsense
		}
	}()
	return s.conn.ReadRequest()
}

func (s *Server) failed(err error) {
	if err != nil && s.opts.Failed != nil {
		s.opts.Failed(err)
	}
}

// elsewhere answers a request in a goroutine of its own.
func (s *Server) elsewhere(f func()) {
	s.work.Go(func() {
		f()
		if _, due := s.who.left(); due {
			s.rouse() // it may wait without knowing that
		}
	})
}

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

// errNotAllowed is a reader whom Options.Allow does not let in; why is told to
// the log, and to the reader only that it is so.
type errNotAllowed struct{ why error }

func (e *errNotAllowed) Error() string { return e.why.Error() }

// turnAway answers with an error and notes the attempt.
func (s *Server) turnAway(r fuse.Request, f *file, kind once.Kind, op string, err error) {
	why := ""
	if no := (*errNotAllowed)(nil); errors.As(err, &no) {
		why = no.Error()
	}
	tell := f.Secret.Attempt(kind, op, why, r.Hdr().Pid)
	if tell == nil {
		r.RespondError(errno(err))
		return
	}
	s.reader(r.Hdr(), s.who.ask, func(reader once.Reader) {
		tell(reader)
		r.RespondError(errno(err))
	})
}

func (f *file) attr(since time.Time) fuse.Attr {
	size := uint64(f.Secret.Size())
	return fuse.Attr{
		Inode: f.inode, Size: size, Blocks: (size + 511) / 512, BlockSize: uint32(unix.Getpagesize()),
		Atime: since, Mtime: since, Ctime: since,
		Mode: os.FileMode(f.Perm), Nlink: 1, Uid: f.UID, Gid: f.GID,
	}
}
