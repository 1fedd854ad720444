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

	"oncefs/internal/secretmem"
)

// Command is the first argument that makes the binary the child.
const Command = "internal-decryptor"

// A Passphrase says where the child gets it: from an open file, or by asking at
// an open terminal.
type Passphrase struct {
	File     *os.File
	Terminal bool
}

const (
	fromTerminal = "terminal"
	fromFile     = "file"
)

// ErrDied says that the child ended without saying why, for example because it
// was killed.
var ErrDied = errors.New("the decrypting process died")

// Decrypt runs the child on the open files and returns one buffer for each,
// filled and authenticated. max is the most that each may hold. On an error
// every buffer is wiped and none is returned: a *FileError for a fault of one
// file, a PassphraseFault, ErrDied, or what the system said.
func Decrypt(ctx context.Context, binary string, files []*os.File, pass Passphrase, max int64, store *secretmem.Store) (_ []*secretmem.Buffer, err error) {
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
	cmd, err := startChild(ctx, binary, append([]*os.File{theirs, pass.File}, files...), strconv.Itoa(len(files)), strconv.FormatInt(max, 10), source)
	theirs.Close()
	if err != nil {
		return nil, err
	}

	bufs := make([]*secretmem.Buffer, len(files))
	for i := range bufs {
		bufs[i] = store.NewBuffer(max)
	}
	received := receive(int(ours.Fd()), bufs)
	if received != nil {
		// Whatever it still wanted to say is of no use.
		cmd.Process.Kill()
	}
	waited := cmd.wait()
	switch {
	case ctx.Err() != nil:
		err = ctx.Err()
	case errors.Is(received, io.ErrUnexpectedEOF):
		err = ErrDied
	case received != nil:
		err = received
	case waited != nil:
		err = fmt.Errorf("%w: %w", ErrDied, waited)
	default:
		return bufs, nil
	}
	for _, b := range bufs {
		err = errors.Join(err, b.Wipe())
	}
	return nil, err
}

// child is a running child. It must be waited for by the goroutine that started
// it.
type child struct{ *exec.Cmd }

// startChild starts the child with open files from descriptor 3 on.
func startChild(ctx context.Context, binary string, files []*os.File, args ...string) (*child, error) {
	cmd := exec.CommandContext(ctx, binary, append([]string{Command}, args...)...)
	cmd.Args[0] = "oncefs"
	cmd.Env = []string{} // it needs nothing of ours
	// Its standard error goes nowhere: a crash report could hold anything.
	cmd.ExtraFiles = files
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
