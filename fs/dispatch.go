package fs

import (
	"encoding/binary"
	"errors"
	"strconv"
	"strings"

	"bazil.org/fuse"
	"golang.org/x/sys/unix"

	"oncefs/internal/once"
	"oncefs/internal/secretmem"
)

// Opcodes of linux/fuse.h that the library does not know.
const (
	opIoctl   = 39
	opRename2 = 45
	opTmpfile = 51
)

// errno is the one table from our errors to the kernel's.
func errno(err error) error {
	var e unix.Errno
	switch {
	case err == nil:
		return nil
	case errors.Is(err, once.ErrClaimed), errors.Is(err, once.ErrSpent):
		return unix.ENOENT
	case errors.As(err, new(*errNotAllowed)):
		return unix.EACCES
	case errors.Is(err, once.ErrRevoked), errors.Is(err, secretmem.ErrWiped):
		return unix.ESTALE
	case errors.As(err, &e):
		return e
	}
	return unix.EIO
}

// dispatch answers one request, or sees to it that it is answered.
func (s *Server) dispatch(req fuse.Request) {
	s.who.see(req.Hdr().Pid)
	switch r := req.(type) {
	case *fuse.LookupRequest:
		s.lookup(r)
	case *fuse.GetattrRequest:
		s.getattr(r)
	case *fuse.OpenRequest:
		switch f := s.secret(r.Node); {
		case f != nil && !r.Dir:
			s.open(r, f)
		case r.Dir && s.dir(r.Node) != nil:
			r.Respond(&fuse.OpenResponse{Handle: s.addHandle(&listing{dir: s.dir(r.Node)})})
		default:
			s.below(r, r.Node, func(path string) { s.openUnder(r, path) })
		}
	case *fuse.ReadRequest:
		switch h := s.handle(r.Handle).(type) {
		case *reading:
			s.read(r, h)
		case nil:
			r.RespondError(unix.EBADF)
		default:
			s.elsewhere(func() { s.readUnder(r, h) })
		}
	case *fuse.ReleaseRequest:
		s.releaseHandle(r)
	case *fuse.ReadlinkRequest:
		s.below(r, r.Node, func(path string) { s.readlink(r, path) })
	case *fuse.StatfsRequest:
		s.statfs(r)
	case *fuse.GetxattrRequest:
		s.getxattr(r)
	case *fuse.ListxattrRequest:
		r.Respond(&fuse.ListxattrResponse{})

	case *fuse.ForgetRequest:
		s.forget(r.Node, r.N)
		r.Respond()
	case *fuse.BatchForgetRequest:
		for _, f := range r.Forget {
			s.forget(f.NodeID, f.N)
		}
		r.Respond()
	case *fuse.InterruptRequest:
		// Every request is answered at once; there is nothing to interrupt.
		r.Respond()
	case *fuse.NotifyReply:
		discard(r)
	case *fuse.DestroyRequest:
		r.Respond()

	case *fuse.SetattrRequest, *fuse.CreateRequest, *fuse.MkdirRequest, *fuse.MknodRequest, *fuse.SymlinkRequest,
		*fuse.LinkRequest, *fuse.RenameRequest, *fuse.RemoveRequest, *fuse.WriteRequest, *fuse.FAllocateRequest,
		*fuse.SetxattrRequest, *fuse.RemovexattrRequest:
		s.refuse(req)
	case *fuse.UnrecognizedRequest:
		switch r.Opcode {
		case opRename2, opTmpfile:
			s.refuse(req)
		case opIoctl:
			r.RespondError(unix.ENOTTY)
		default:
			// The kernel takes this for "no such call here" and does without: seek
			// to data or hole, copying between files of one mount, stat by handle.
			r.RespondError(unix.ENOSYS)
		}
	default:
		// Flush, Fsync, Access, Poll, locks: nothing to do that the kernel does
		// not do by itself, and it does not ask again.
		req.RespondError(unix.ENOSYS)
	}
}

// discard gives a request's memory back to the library without an answer. Only
// a forget does that there.
func discard(req fuse.Request) { (&fuse.ForgetRequest{Header: *req.Hdr()}).Respond() }

// refuse turns away what would change something.
func (s *Server) refuse(req fuse.Request) {
	if f := s.secret(req.Hdr().Node); f != nil {
		s.turnAway(req, f, once.Refusal, "change", unix.EROFS)
		return
	}
	req.RespondError(unix.EROFS)
}

func (s *Server) lookup(r *fuse.LookupRequest) {
	if s.under == nil {
		r.RespondError(unix.ENOTDIR)
		return
	}
	if in := s.dir(r.Node); in != nil {
		if f := in.files[r.Name]; f != nil {
			if f.Secret.State() != once.Sealed {
				s.turnAway(r, f, once.Late, "lookup", unix.ENOENT)
				return
			}
			s.who.foresee(r.Pid)
			r.Respond(&fuse.LookupResponse{Node: f.node, Attr: f.attr(s.since)})
			return
		}
		if d := in.dirs[r.Name]; d != nil {
			r.Respond(&fuse.LookupResponse{Node: d.node, Attr: s.dirAttr(d)})
			return
		}
		if !in.shows {
			r.RespondError(unix.ENOENT)
			return
		}
	}
	s.below(r, r.Node, func(path string) { s.lookupUnder(r, path) })
}

func (s *Server) getattr(r *fuse.GetattrRequest) {
	f := s.secret(r.Node)
	if f == nil {
		if d := s.dir(r.Node); d != nil {
			r.Respond(&fuse.GetattrResponse{Attr: s.dirAttr(d)})
			return
		}
		s.below(r, r.Node, func(path string) { s.getattrUnder(r, path) })
		return
	}
	show := func() { r.Respond(&fuse.GetattrResponse{Attr: f.attr(s.since)}) }
	switch f.Secret.State() {
	case once.Sealed:
		show()
	case once.Claimed:
		if s.under != nil || r.Pid == 0 || r.Pid == f.opener.Load() {
			// By path there is no way here any more, only by a descriptor.
			show()
			return
		}
		// Over a file the path still leads here: only who has it open may see it.
		s.elsewhere(func() {
			if s.opts.Holds(r.Pid, f.inode) {
				show()
				return
			}
			s.turnAway(r, f, once.Late, "stat", unix.ENOENT)
		})
	default:
		r.RespondError(unix.ENOENT)
	}
}

func (s *Server) open(r *fuse.OpenRequest, f *file) {
	if !r.Flags.IsReadOnly() || r.Flags&(fuse.OpenTruncate|fuse.OpenAppend) != 0 {
		s.refuse(r)
		return
	}
	if s.opts.Allow == nil {
		s.claim(r, f)
		return
	}
	if f.Secret.State() != once.Sealed {
		// Too late for anybody; no need to ask who it is.
		s.turnAway(r, f, once.Late, "open", once.ErrClaimed)
		return
	}
	s.elsewhere(func() {
		if err := s.opts.Allow(r.Pid, r.Uid, r.Gid); err != nil {
			s.turnAway(r, f, once.Refusal, "open", &errNotAllowed{err})
			return
		}
		s.claim(r, f)
	})
}

// claim takes the secret for who sent the request, and then answers it.
func (s *Server) claim(r *fuse.OpenRequest, f *file) {
	claim, err := f.Secret.Claim()
	if err != nil {
		s.turnAway(r, f, once.Late, "open", err)
		return
	}
	f.opener.Store(r.Pid)
	s.noteChange(f)
	h := &reading{file: f, claim: claim}
	// Who it is takes another process to find out. The open need not wait for
	// that; the first byte does, for a reader that waits for it can be looked at.
	// The question goes out first: it is answered while the reader goes on.
	s.reader(r.Hdr(), s.who.askOpener, func(reader once.Reader) {
		claim.Opened(reader)
		h.known = true
		for _, r := range h.waiting {
			s.who.stayed(r.Pid)
			s.answerRead(r, h)
		}
		h.waiting = nil
	})
	// Direct I/O: reads come to us and leave nothing in the page cache.
	r.Respond(&fuse.OpenResponse{Handle: s.addHandle(h), Flags: fuse.OpenDirectIO})
}

func (s *Server) read(r *fuse.ReadRequest, h *reading) {
	if err := h.claim.Valid(); err != nil {
		r.RespondError(errno(err))
		return
	}
	if r.Flags&fuse.ReadLockOwner == 0 {
		// Direct reads name the owner of the descriptor, the page cache's do not.
		h.cached = true
	}
	if !h.known {
		h.waiting = append(h.waiting, r)
		return
	}
	s.answerRead(r, h)
}

// answerRead answers a read of whom is known who it is.
func (s *Server) answerRead(r *fuse.ReadRequest, h *reading) {
	if s.opts.Release == nil || !h.claim.Last() {
		s.deliver(r, h)
		return
	}
	s.elsewhere(func() {
		// The name must be gone before a byte is out.
		if err := s.releaseOnce(); err != nil {
			s.failed(err)
			r.RespondError(unix.EIO)
			return
		}
		s.deliver(r, h)
	})
}

func (s *Server) releaseOnce() error {
	s.release.Do(func() { s.freed = s.opts.Release() })
	return s.freed
}

// outHeaderSize and the layout are struct fuse_out_header of linux/fuse.h: u32
// len, s32 error, u64 unique.
const outHeaderSize = 16

func (s *Server) deliver(r *fuse.ReadRequest, h *reading) {
	n := max(0, min(int64(r.Size), h.Secret.Size()-r.Offset, secretmem.MaxSend))
	if r.Offset < 0 {
		n = 0
	}
	err := h.claim.Deliver(r.Offset, n, func() (out bool, err error) {
		if n == 0 {
			r.Respond(&fuse.ReadResponse{})
			return true, nil
		}
		var head [outHeaderSize]byte
		binary.NativeEndian.PutUint32(head[0:], uint32(outHeaderSize+n))
		binary.NativeEndian.PutUint64(head[8:], uint64(r.ID))
		err = s.pipe.Send(s.devFD, head[:], h.Bytes, r.Offset, n)
		// ENOENT: the reader was killed while it waited, and got nothing. After any
		// other failure a part may be in its hands.
		return !errors.Is(err, unix.ENOENT), err
	})
	switch {
	case n == 0 && err == nil:
		// answered
	case err == nil, errors.Is(err, unix.ENOENT):
		discard(r)
	case errors.Is(err, once.ErrRevoked):
		r.RespondError(errno(err))
	default:
		s.failed(err)
		r.RespondError(errno(err))
	}
}

func (s *Server) releaseHandle(r *fuse.ReleaseRequest) {
	switch h := s.dropHandle(r.Handle).(type) {
	case *reading:
		s.closeClaim(h)
	case interface{ Close() error }:
		s.elsewhere(func() { h.Close() })
	}
	r.Respond()
}

func (s *Server) closeClaim(h *reading) {
	state := h.claim.Close()
	s.noteChange(h.file)
	if h.cached {
		// No descriptor is left, so no page is being read and this cannot wait.
		s.dropPages(h.file)
	}
	if state == once.Spent || state == once.Kept {
		s.failed(s.pipe.Scrub())
	}
}

// dropPages takes back what the kernel read of a secret through its page cache,
// also from where it is mapped: to touch it there asks again, and is refused. It
// waits for reads of those pages, so where there may be any, not in the goroutine
// that answers them.
func (s *Server) dropPages(f *file) {
	err := s.conn.InvalidateNode(f.node, 0, -1)
	switch {
	case errors.Is(err, fuse.ErrNotCached):
	case errors.Is(err, unix.EBADF), errors.Is(err, unix.ENODEV), errors.Is(err, unix.EPERM):
		// Unmounted, and the connection is gone.
	default:
		s.failed(err)
	}
}

func (s *Server) getxattr(r *fuse.GetxattrRequest) {
	from, ok := statusFrom(r.Name)
	if !ok || r.Node != fuse.RootID || s.opts.Status == nil {
		r.RespondError(unix.ENODATA)
		return
	}
	if r.Uid != 0 && int(r.Uid) != unix.Geteuid() {
		r.RespondError(unix.EACCES)
		return
	}
	value := s.opts.Status(from)
	if r.Size != 0 && int(r.Size) < len(value) {
		r.RespondError(unix.ERANGE)
		return
	}
	r.Respond(&fuse.GetxattrResponse{Xattr: value})
}

// statusFrom tells from which file on a status attribute tells.
func statusFrom(name string) (from int, ok bool) {
	rest, ok := strings.CutPrefix(name, StatusAttr)
	if !ok || rest == "" {
		return 0, ok
	}
	number, ok := strings.CutPrefix(rest, ".")
	from, err := strconv.Atoi(number)
	return from, ok && err == nil && from >= 0
}
