package supervisor

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// A Launcher is the process that becomes the command. It gives up everything
// before anything is decrypted, so that what fails does so early.
type Launcher struct {
	Control int
	// Prepare gives up privileges, for the calling thread at least, and finds
	// the command's file.
	Prepare func() (file string, err error)
	Args    []string
	Env     func() []string
	// Close lists descriptors that are not for the command.
	Close []int
}

// Run returns only if there is nothing to run: with an error, or without one
// where the supervisor is gone.
func (l *Launcher) Run() error {
	// Privileges and the parent's death are this thread's, and exec takes this
	// thread along.
	runtime.LockOSThread()
	parent := os.Getppid()
	control, err := newLink(l.Control)
	if err != nil {
		return err
	}
	file, err := l.Prepare()
	if err != nil {
		return err
	}
	// After the user has changed, which takes it back.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("prctl PR_SET_PDEATHSIG: %w", err)
	}
	dir, dirErr := os.Getwd()
	for _, fd := range l.Close {
		unix.CloseOnExec(fd)
	}
	if err := control.say("prepared"); err != nil {
		return err
	}
	if line := <-control.lines; line != "go" || os.Getppid() != parent {
		return control.broken
	}
	if dirErr == nil {
		// The directory may be what was mounted over, and we be beneath it.
		os.Chdir(dir)
	}
	env := l.Env()
	err = unix.Exec(file, l.Args, env)
	_ = control.say("failed") // and so it ends
	return &ExecError{File: file, Err: err}
}

// An ExecError is a command that the kernel did not start.
type ExecError struct {
	File string
	Err  error
}

func (e *ExecError) Error() string { return fmt.Sprintf("start %s: %v", e.File, e.Err) }
func (e *ExecError) Unwrap() error { return e.Err }
