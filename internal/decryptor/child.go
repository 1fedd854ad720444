package decryptor

import (
	"errors"
	"io"
	"math"
	"os"
	"runtime"
	"strconv"
	"sync"

	"oncefs/crypto"
	"oncefs/internal/bundle"
	"oncefs/internal/sandbox"
)

// Descriptors that the child inherits.
const (
	pipeFD       = 3 // write end of the pipe to the parent
	passphraseFD = 4 // open passphrase file, or the terminal to ask at
	filesFD      = 5 // the encrypted files, one after another
)

// What the child is told of each message, one letter after another.
const (
	plainKind  = 'f' // one file
	bundleKind = 'b'
)

// maxData is the most plaintext in one frame, dataFrame how much is sent in one.
const (
	maxData   = 1 << 20
	dataFrame = 256 << 10
)

// Main is the child: `oncefs decryptor KINDS MAX SOURCE`. It decrypts the
// inherited files, of which each has a kind, writes frames to the inherited pipe and returns the exit
// status; whatever went wrong was told through the pipe. Its heap holds
// passphrase and plaintext, and dies with it.
func Main(args []string) int {
	if len(args) == 1 && args[0] == inspecting {
		return inspectMain()
	}
	if len(args) != 3 {
		return 1
	}
	kinds := args[0]
	max, err := strconv.ParseInt(args[1], 10, 64)
	if err != nil || kinds == "" {
		return 1
	}
	out := &frames{w: os.NewFile(pipeFD, "pipe")}
	secret := os.NewFile(passphraseFD, "passphrase")
	var inputs []io.Reader
	for i := range kinds {
		inputs = append(inputs, os.NewFile(uintptr(filesFD+i), "file "+strconv.Itoa(i)))
	}
	// From here on hostile bytes are parsed: nothing more to open or reach.
	if err := sandbox.Decryptor(args[2] == fromTerminal); err != nil {
		return 1
	}
	var gate [1]byte
	if _, err := io.ReadFull(os.Stdin, gate[:]); err != nil || gate[0] != goOn {
		return 1
	}
	var passphrase []byte
	if args[2] == fromTerminal {
		passphrase, err = askTerminal(secret)
	} else {
		passphrase, err = FirstLine(secret)
	}
	if err != nil {
		fault := ErrUnread
		errors.As(err, &fault)
		out.send(header{kind: refuse, fault: byte(fault)}, nil)
		return 0
	}
	decryptAll(out, inputs, kinds, passphrase, max)
	return 0
}

// decryptAll works on as many files at once as there are processors: nearly all
// the time of a small file is its S2K.
func decryptAll(out *frames, inputs []io.Reader, kinds string, passphrase []byte, max int64) {
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(inputs)) {
		wg.Go(func() {
			for i := range next {
				if kinds[i] == bundleKind {
					out.bundle(uint32(i), inputs[i], passphrase, max)
				} else {
					out.file(uint32(i), inputs[i], passphrase, max)
				}
			}
		})
	}
	for i := range inputs {
		next <- i
	}
	close(next)
	wg.Wait()
}

// frames writes whole frames, from several goroutines.
type frames struct {
	mu sync.Mutex
	w  io.Writer
}

func (f *frames) send(h header, body []byte) error {
	head := h.put()
	return f.write(append(head[:], body...))
}

// write writes a frame at once: who reads it would else take its header, and then
// contend for the pipe with who still writes.
func (f *frames) write(frame []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := f.w.Write(frame)
	return err
}

// content sends a message's plaintext, in frames of their own for each file.
type content struct {
	*frames
	file  uint32
	sum   uint64
	frame []byte // room for its header, and data that was not sent yet
}

func (f *frames) content(file uint32) *content {
	return &content{frames: f, file: file, frame: make([]byte, headerSize, headerSize+dataFrame)}
}

func (c *content) Write(p []byte) (int, error) {
	for n := 0; ; {
		room := c.frame[len(c.frame):cap(c.frame)]
		took := copy(room, p[n:])
		c.frame = c.frame[:len(c.frame)+took]
		if n += took; n == len(p) {
			return n, nil
		}
		if err := c.Flush(); err != nil {
			return n, err
		}
	}
}

// Flush sends what was written and not yet sent.
func (c *content) Flush() error {
	n := uint64(len(c.frame) - headerSize)
	if n == 0 {
		return nil
	}
	head := header{kind: data, file: c.file, n: n}.put()
	copy(c.frame, head[:])
	err := c.frames.write(c.frame)
	c.frame, c.sum = c.frame[:headerSize], c.sum+n
	return err
}

// Expect tells how much is to be expected. A failure to tell is not lost: what
// follows fails too.
func (c *content) Expect(n int64) {
	_ = c.send(header{kind: expect, file: c.file, n: uint64(n)}, nil)
}

func (f *frames) file(i uint32, in io.Reader, passphrase []byte, max int64) {
	out := f.content(i)
	err := crypto.Decrypt(out, in, passphrase, max)
	if err == nil {
		err = out.Flush()
	}
	f.finish(out, err)
}

// finish says how a message ended.
func (f *frames) finish(out *content, err error) {
	if err != nil {
		fault, detail := crypto.FaultOf(err)
		detail = printable(detail)
		f.send(header{kind: failed, fault: byte(fault), file: out.file, n: uint64(len(detail))}, []byte(detail))
		return
	}
	f.send(header{kind: done, file: out.file, n: out.sum}, nil)
}

// bundle takes a message's content apart as it is decrypted. A fault of the archive
// is told only when the message was authenticated: before that it may be damage.
func (f *frames) bundle(i uint32, in io.Reader, passphrase []byte, max int64) {
	out := f.content(i)
	r, w := io.Pipe()
	read := make(chan error, 1)
	go func() {
		err := bundle.Read(r, max, func(e bundle.Entry) (io.Writer, error) {
			if err := out.Flush(); err != nil {
				return nil, err
			}
			h := header{kind: entry, mode: uint16(e.Mode), file: i, n: uint64(8 + len(e.Name))}
			if e.Dir {
				h.fault = 1
			}
			return out, f.send(h, putEntry(e))
		})
		if err == nil {
			err = out.Flush()
		}
		_, _ = io.Copy(io.Discard, r) // to its end, which says whether it is authentic
		read <- err
	}()
	most := int64(math.MaxInt64)
	if max < most-bundle.Overhead {
		most = max + bundle.Overhead
	}
	err := crypto.Decrypt(w, in, passphrase, most)
	w.CloseWithError(err) // nil is the end
	var fault *bundle.Error
	if bad := <-read; err == nil && errors.As(bad, &fault) {
		f.send(header{kind: unfit, fault: byte(fault.Fault), file: i, n: uint64(fault.Entry)}, nil)
		return
	} else if err == nil {
		err = bad
	}
	f.finish(out, err)
}

func printable(s string) string {
	b := []byte(s[:min(len(s), maxText)])
	for i, c := range b {
		if c < ' ' || c > '~' {
			b[i] = '?'
		}
	}
	return string(b)
}
