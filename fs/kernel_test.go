package fs

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"testing"
	"time"
	"unsafe"

	"bazil.org/fuse"
	"golang.org/x/sys/unix"

	"oncefs/internal/once"
	"oncefs/internal/secretmem"
)

// Opcodes of linux/fuse.h that these tests send.
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opOpen        = 14
	opRead        = 15
	opRelease     = 18
	opGetxattr    = 22
	opInterrupt   = 36
	opNotifyReply = 41
	opBatchForget = 42
	opReaddir     = 28
	opOpendir     = 27
	opReleasedir  = 29
)

// fakeKernel is the other end of a server's device: requests go in as they are,
// and answers are collected. A socket pair that keeps messages apart stands for
// /dev/fuse.
type fakeKernel struct {
	t       testing.TB
	server  *Server
	store   *secretmem.Store
	content [][]byte // of the secrets
	fd      int
	served  chan error

	mu      sync.Mutex
	cond    *sync.Cond
	answers []answer
	ended   bool
	last    uint64
}

type answer struct {
	id           uint64
	errno        unix.Errno
	body         []byte
	notification bool // unasked: its id is 0, and its error a code above 0
}

// bytesOf makes n bytes of which no eight in a row come twice.
func bytesOf(n int, seed uint64) []byte {
	b := make([]byte, 0, n+8)
	for x := seed<<32 | 1; len(b) < n; x++ {
		v := x * 0x9e3779b97f4a7c15
		b = binary.LittleEndian.AppendUint64(b, v^v>>29)
	}
	return b[:n]
}

// newKernel serves secrets of the given sizes over a directory with a few files
// in it, or one over a file. The third secret is in a directory that is there
// already, the fourth in one of its own.
func newKernel(t testing.TB, overFile bool, sizes ...int) *fakeKernel {
	t.Helper()
	store, err := secretmem.Open(false)
	if err != nil {
		t.Fatal(err)
	}
	k := &fakeKernel{t: t, store: store, served: make(chan error, 1)}
	k.cond = sync.NewCond(&k.mu)
	o := Options{
		Path:   "/nowhere",
		Who:    newFakeLookup(t),
		Holds:  func(pid uint32, _ uint64) bool { return pid%2 == 1 },
		Status: func(from int) []byte { return fmt.Appendf(nil, `{"from":%d}`, from) },
	}
	for i, size := range sizes {
		content := bytesOf(size, uint64(i+1))
		k.content = append(k.content, content)
		buffer := store.NewBuffer(1 << 30)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		go func() { w.Write(content); w.Close() }()
		if err := buffer.Fill(int(r.Fd()), int64(size)); err != nil {
			t.Fatal(err)
		}
		r.Close()
		name := []string{"secreta", "secretb", "sub/secretc", "own/secretd"}[i]
		o.Files = append(o.Files, File{Name: name, Secret: once.New(buffer, once.Options{}), Bytes: buffer, Perm: 0o400})
	}
	if overFile {
		o.Release = func() error { return nil }
	} else {
		dir := t.TempDir()
		os.WriteFile(filepath.Join(dir, "other"), []byte("other content"), 0o600)
		os.Mkdir(filepath.Join(dir, "sub"), 0o700)
		os.WriteFile(filepath.Join(dir, "sub", "deep"), []byte("deep"), 0o600)
		os.WriteFile(filepath.Join(dir, "sub", "secretc"), []byte("hidden"), 0o600)
		os.WriteFile(filepath.Join(dir, "own"), []byte("hidden"), 0o600)
		os.Symlink("other", filepath.Join(dir, "link"))
		if o.Under, err = os.Open(dir); err != nil {
			t.Fatal(err)
		}
		o.Dirs = []Dir{{Name: "own", Perm: 0o500}, {Name: "sub", Perm: 0o555}}
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1<<20)
	}
	k.fd = fds[0]
	if k.server, err = newServer(o); err != nil {
		t.Fatal(err)
	}
	if err := k.server.attach(connOn(t, fds[1])); err != nil {
		t.Fatal(err)
	}
	go func() { k.served <- k.server.Serve() }()
	go k.collect()
	return k
}

// connOn makes a connection of the library on a descriptor, as after a handshake
// with a kernel of today. Its fields are the library's own; a rename there
// fails here first.
func connOn(t testing.TB, fd int) *fuse.Conn {
	t.Helper()
	conn := &fuse.Conn{}
	v := reflect.ValueOf(conn).Elem()
	dev, proto := v.FieldByName("dev"), v.FieldByName("proto")
	if !dev.IsValid() || !proto.IsValid() {
		t.Fatal("the FUSE library's connection has other fields than it had")
	}
	*(**os.File)(unsafe.Pointer(dev.UnsafeAddr())) = os.NewFile(uintptr(fd), "device")
	*(*fuse.Protocol)(unsafe.Pointer(proto.UnsafeAddr())) = fuse.Protocol{Major: 7, Minor: 33}
	return conn
}

// collect takes answers apart until the server has closed its end. A spliced
// answer may come in several messages.
func (k *fakeKernel) collect() {
	var stream []byte
	buf := make([]byte, 1<<20)
	for {
		n, err := unix.Read(k.fd, buf)
		if err == unix.EINTR || err == unix.ECONNRESET {
			continue // the latter says, once, that the server left requests unread
		}
		k.mu.Lock()
		if err != nil || n == 0 {
			k.ended = true
			if len(stream) > 0 {
				k.t.Errorf("%d bytes that are no answer", len(stream))
			}
			k.cond.Broadcast()
			k.mu.Unlock()
			return
		}
		stream = append(stream, buf[:n]...)
		for len(stream) >= outHeaderSize {
			length := binary.NativeEndian.Uint32(stream)
			if length < outHeaderSize || int(length) > len(stream) {
				break
			}
			code := int32(binary.NativeEndian.Uint32(stream[4:]))
			a := answer{id: binary.NativeEndian.Uint64(stream[8:]), body: append([]byte(nil), stream[outHeaderSize:length]...)}
			if a.notification = code > 0; code < 0 {
				a.errno = unix.Errno(-code)
			}
			k.answers = append(k.answers, a)
			stream = stream[length:]
		}
		k.cond.Broadcast()
		k.mu.Unlock()
	}
}

// message is struct fuse_in_header of linux/fuse.h and what follows it.
func message(opcode uint32, id, node uint64, pid uint32, body []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(40+len(body)))
	b = binary.NativeEndian.AppendUint32(b, opcode)
	b = binary.NativeEndian.AppendUint64(b, id)
	b = binary.NativeEndian.AppendUint64(b, node)
	b = binary.NativeEndian.AppendUint32(b, 1000) // uid
	b = binary.NativeEndian.AppendUint32(b, 1000) // gid
	b = binary.NativeEndian.AppendUint32(b, pid)
	b = binary.NativeEndian.AppendUint32(b, 0)
	return append(b, body...)
}

// send gives the server a message; it reports whether the server still takes
// any.
func (k *fakeKernel) send(message []byte) bool {
	for {
		_, err := unix.Write(k.fd, message)
		if err == unix.EINTR {
			continue
		}
		return err == nil
	}
}

// ask sends one request and waits for its answer.
func (k *fakeKernel) ask(opcode uint32, node uint64, body ...any) answer {
	k.t.Helper()
	k.last++
	id := k.last
	var b []byte
	for _, part := range body {
		switch p := part.(type) {
		case string:
			b = append(append(b, p...), 0)
		case []byte:
			b = append(b, p...)
		default:
			b, _ = binary.Append(b, binary.NativeEndian, p)
		}
	}
	k.send(message(opcode, id, node, 7, b))
	timeout := time.AfterFunc(time.Minute, func() { k.mu.Lock(); k.ended = true; k.cond.Broadcast(); k.mu.Unlock() })
	defer timeout.Stop()
	k.mu.Lock()
	defer k.mu.Unlock()
	for {
		for _, a := range k.answers {
			if a.id == id {
				return a
			}
		}
		if k.ended {
			k.t.Fatalf("opcode %d: no answer", opcode)
		}
		k.cond.Wait()
	}
}

// Bodies of requests, as linux/fuse.h lays them out.
func openIn(flags uint32) []any { return []any{flags, uint32(0)} }

func readIn(handle, offset uint64, size uint32) []any {
	return []any{handle, offset, size, uint32(2) /* FUSE_READ_LOCKOWNER */, uint64(0), uint32(0), uint32(0)}
}

func releaseIn(handle uint64) []any { return []any{handle, uint32(0), uint32(0), uint64(0)} }

func (a answer) handle() uint64 { return binary.NativeEndian.Uint64(a.body) }

// end closes the kernel's end, as an unmount does, waits for the server's, and
// returns every answer.
func (k *fakeKernel) end() ([]answer, error) {
	unix.Shutdown(k.fd, unix.SHUT_WR)
	err := <-k.served
	k.mu.Lock()
	for !k.ended {
		k.cond.Wait()
	}
	answers := k.answers
	k.mu.Unlock()
	unix.Close(k.fd)
	if k.server.opts.Under != nil {
		k.server.opts.Under.Close()
	}
	return answers, err
}

// destroy zeroes what is left and shows that nothing is.
func (k *fakeKernel) destroy() {
	for _, f := range k.server.files {
		f.Secret.Destroy()
	}
	if n := k.store.Live(); n != 0 {
		k.t.Errorf("%d buffers are alive", n)
	}
}

// fakeLookup answers in a goroutine, as another process would.
type fakeLookup struct {
	ours, theirs int
}

func newFakeLookup(t testing.TB) *fakeLookup {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	l := &fakeLookup{ours: fds[0], theirs: fds[1]}
	if err := unix.SetNonblock(l.ours, true); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer unix.Close(l.theirs)
		for buf := make([]byte, 8); ; {
			n, err := unix.Read(l.theirs, buf)
			if err == unix.EINTR {
				continue
			}
			if n != len(buf) || err != nil {
				return
			}
			unix.Write(l.theirs, buf)
		}
	}()
	t.Cleanup(func() { unix.Close(l.ours) })
	return l
}

func (l *fakeLookup) FD() int { return l.ours }

func (l *fakeLookup) Ask(id uint64, pid uint32) error {
	_, err := unix.Write(l.ours, binary.NativeEndian.AppendUint64(nil, id))
	return err
}

func (l *fakeLookup) Answer() (uint64, string, string, error) {
	var buf [8]byte
	n, err := unix.Read(l.ours, buf[:])
	if err == nil && n == 0 {
		err = unix.EPIPE
	}
	return binary.NativeEndian.Uint64(buf[:]), "/bin/cat", "/group", err
}
