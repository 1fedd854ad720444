package sandbox

import (
	"fmt"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/landlock-lsm/go-landlock/landlock"
	"golang.org/x/sys/unix"
)

// noFiles takes away every file, directory and TCP port that is not open
// already, as far as the kernel's Landlock goes.
func noFiles() error {
	if err := landlock.V9.BestEffort().Restrict(); err != nil {
		return fmt.Errorf("landlock: %w", err)
	}
	return nil
}

// terminal is what asking for a passphrase takes: to read and to set how a
// terminal behaves (tcsetattr(3)), and not to type into it (TIOCSTI).
var terminal = []condition{
	when("ioctl", 1, seccomp.Equal, unix.TCGETS),
	when("ioctl", 1, seccomp.Equal, unix.TCSETS),
}

// Decryptor is put on by the process that parses hostile input. It keeps its
// open descriptors and its memory; it can open, connect, start and see nothing.
// Any other system call kills it. asks tells that it is to ask at a terminal.
func Decryptor(asks bool) error {
	var conditions []condition
	if asks {
		conditions = terminal
	}
	for _, step := range []func() error{
		Hide,
		DropCapabilities,
		noNewPrivs,
		noFiles,
		func() error { return allowOnly(nil, conditions, seccomp.ActionKillProcess) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}
