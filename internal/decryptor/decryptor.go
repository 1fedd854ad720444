// Package decryptor runs a child process that decrypts, and keeps its two ends
// together.
//
// The child is this same binary. It inherits the open encrypted files, the open
// passphrase file and a pipe; it is the only process that sees a passphrase, a
// key or a byte that an attacker may have written, and the only one that holds
// plaintext in ordinary memory. The parent reads the pipe straight into secret
// memory. When the child has ended, all that it held has gone with it.
package decryptor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"oncefs/internal/bundle"
	"oncefs/internal/secretmem"
)

// Command is the first argument that makes the binary the child.
const Command = "internal-decryptor"

// A Passphrase says where the child gets it: from an open file, or by asking at
// an open terminal.
type Passphrase struct {
	File     *os.File
	Terminal bool
	// Until is called while the child starts, which takes a while. The child reads
	// nothing before it has returned nil; on an error it ends. nil waits for
	// nothing.
	Until func() error
}

// goOn is what the child waits for on its standard input.
const goOn = '\n'

const (
	fromTerminal = "terminal"
	fromFile     = "file"
)

// ErrDied says that the child ended without saying why, for example because it
// was killed.
var ErrDied = errors.New("the decrypting process died")

// A Message is an open encrypted file and what its content is taken for.
type Message struct {
	File   *os.File
	Bundle bool // a tar archive of files, see package bundle
}

// about is a guess of how much the message holds: what is neither compressed nor
// binary takes four letters for three bytes. If it is wrong, a little time is lost.
func (m Message) about() int64 {
	info, err := m.File.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return 0
	}
	return info.Size() / 4 * 3
}

// A Content is what a message held: all of it, or one file or directory of a
// bundle.
type Content struct {
	bundle.Entry                   // zero but for a bundle's
	Bytes        *secretmem.Buffer // nil for a directory
}

// Decrypt runs the child on the messages and returns the contents of each,
// authenticated and in secret memory: one content of a plain message; of a bundle
// its directories, parents first, and then its files in the archive's order. max is
// the most that a message may hold; of a bundle, the contents of its files in all.
// On an error everything is wiped and nothing returned: a *FileError for a fault of
// one message, a PassphraseFault, ErrDied, or what the system said.
func Decrypt(ctx context.Context, binary string, messages []Message, pass Passphrase, max int64, store *secretmem.Store) (_ [][]Content, err error) {
	ours, theirs, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("pipe to the decrypting process: %w", err)
	}
	defer ours.Close()
	// Fewer turns between the two processes. Where the user has no room for more
	// the pipe stays as it is.
	_, _ = unix.FcntlInt(ours.Fd(), unix.F_SETPIPE_SZ, maxData)
	source := fromFile
	if pass.Terminal {
		source = fromTerminal
	}
	files := []*os.File{theirs, pass.File}
	var kinds []byte
	var parts []*arriving
	for _, m := range messages {
		files = append(files, m.File)
		kind := byte(plainKind)
		if m.Bundle {
			kind = bundleKind
		}
		kinds = append(kinds, kind)
		parts = append(parts, newArriving(m.Bundle, max, m.about(), store))
	}
	gate, open, err := os.Pipe()
	if err != nil {
		theirs.Close()
		return nil, fmt.Errorf("pipe to the decrypting process: %w", err)
	}
	defer open.Close()
	cmd, err := startChild(ctx, binary, gate, files, string(kinds), strconv.FormatInt(max, 10), source)
	gate.Close()
	theirs.Close()
	if err == nil {
		err = cmd.begin(pass.Until, open)
	}
	if err == nil {
		err = cmd.receive(ctx, int(ours.Fd()), parts)
	}
	var all [][]Content
	for _, p := range parts {
		if err != nil {
			err = errors.Join(err, p.wipe())
		}
		all = append(all, p.content)
	}
	if err != nil {
		return nil, err
	}
	return all, nil
}

// begin lets the child go on once until, if there is one, says so; if it says
// that it may not, the child is waited for.
func (c *child) begin(until func() error, gate *os.File) error {
	if until != nil {
		if err := until(); err != nil {
			gate.Close() // the child finds it closed and ends
			c.wait()
			return err
		}
	}
	// Should the child have died, its pipe tells; if it lives and could not be told,
	// it must not wait for ever.
	if _, err := gate.Write([]byte{goOn}); err != nil {
		gate.Close()
	}
	return nil
}

// receive takes what the child sends, to the end of both.
func (c *child) receive(ctx context.Context, fd int, parts []*arriving) error {
	received := receive(fd, parts)
	if received != nil {
		// Whatever it still wanted to say is of no use.
		c.Process.Kill()
	}
	waited := c.wait()
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case received != nil && !errors.Is(received, io.ErrUnexpectedEOF):
		return received
	case waited != nil:
		return fmt.Errorf("%w: %w", ErrDied, waited)
	case received != nil:
		return ErrDied
	}
	return nil
}

// child is a running child. It must be waited for by the goroutine that started
// it.
type child struct{ *exec.Cmd }

// startChild starts the child with open files from descriptor 3 on.
func startChild(ctx context.Context, binary string, stdin *os.File, files []*os.File, args ...string) (*child, error) {
	cmd := exec.CommandContext(ctx, binary, append([]string{Command}, args...)...)
	cmd.Args[0] = "oncefs"
	cmd.Env = []string{} // it needs nothing of ours
	// Its standard error goes nowhere: a crash report could hold anything.
	cmd.ExtraFiles = files
	if stdin != nil {
		cmd.Stdin = stdin
	}
	// The child must not outlive us with a passphrase in its memory; if we die
	// it is killed rather than left to find its pipe closed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	// The signal comes when the thread that started it ends, so this goroutine
	// keeps its thread until the child is gone.
	runtime.LockOSThread()
	if err := cmd.Start(); err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("start the decrypting process: %w", err)
	}
	return &child{cmd}, nil
}

func (c *child) wait() error {
	defer runtime.UnlockOSThread()
	return c.Wait()
}
