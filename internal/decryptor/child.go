package decryptor

import (
	"bufio"
	"errors"
	"io"
	"os"
	"runtime"
	"strconv"
	"sync"

	"oncefs/crypto"
	"oncefs/internal/sandbox"
)

// Descriptors that the child inherits.
const (
	pipeFD       = 3 // write end of the pipe to the parent
	passphraseFD = 4 // open passphrase file, or the terminal to ask at
	filesFD      = 5 // the encrypted files, one after another
)

// maxData is the most plaintext in one frame.
const maxData = 1 << 20

// Main is the child: `oncefs decryptor FILES MAX SOURCE`. It decrypts the
// inherited files, writes frames to the inherited pipe and returns the exit
// status; whatever went wrong was told through the pipe. Its heap holds
// passphrase and plaintext, and dies with it.
func Main(args []string) int {
	if len(args) == 1 && args[0] == inspecting {
		return inspectMain()
	}
	if len(args) != 3 {
		return 1
	}
	files, err1 := strconv.Atoi(args[0])
	max, err2 := strconv.ParseInt(args[1], 10, 64)
	if err1 != nil || err2 != nil || files < 1 {
		return 1
	}
	out := &frames{w: os.NewFile(pipeFD, "pipe")}
	secret := os.NewFile(passphraseFD, "passphrase")
	var inputs []io.Reader
	for i := range files {
		inputs = append(inputs, os.NewFile(uintptr(filesFD+i), "file "+strconv.Itoa(i)))
	}
	// From here on hostile bytes are parsed: nothing more to open or reach.
	if err := sandbox.Decryptor(args[2] == fromTerminal); err != nil {
		return 1
	}
	var passphrase []byte
	var err error
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
	decryptAll(out, inputs, passphrase, max)
	return 0
}

// decryptAll works on as many files at once as there are processors: nearly all
// the time of a small file is its S2K.
func decryptAll(out *frames, inputs []io.Reader, passphrase []byte, max int64) {
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(inputs)) {
		wg.Go(func() {
			for i := range next {
				out.file(uint32(i), inputs[i], passphrase, max)
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
	f.mu.Lock()
	defer f.mu.Unlock()
	head := h.put()
	if _, err := f.w.Write(head[:]); err != nil {
		return err
	}
	_, err := f.w.Write(body)
	return err
}

func (f *frames) file(i uint32, in io.Reader, passphrase []byte, max int64) {
	var total uint64
	body := bufio.NewWriterSize(writerFunc(func(p []byte) (int, error) {
		for sent := 0; sent < len(p); {
			part := p[sent:min(len(p), sent+maxData)]
			if err := f.send(header{kind: data, file: i, n: uint64(len(part))}, part); err != nil {
				return sent, err
			}
			sent += len(part)
			total += uint64(len(part))
		}
		return len(p), nil
	}), 256<<10)
	err := crypto.Decrypt(body, in, passphrase, max)
	if err == nil {
		err = body.Flush()
	}
	if err != nil {
		fault, detail := crypto.FaultOf(err)
		detail = printable(detail)
		f.send(header{kind: failed, fault: byte(fault), file: i, n: uint64(len(detail))}, []byte(detail))
		return
	}
	f.send(header{kind: done, file: i, n: total}, nil)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func printable(s string) string {
	b := []byte(s[:min(len(s), maxText)])
	for i, c := range b {
		if c < ' ' || c > '~' {
			b[i] = '?'
		}
	}
	return string(b)
}
