// Package sandbox is what a process gives up.
package sandbox

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Hide makes the process unreadable for others of its own user: not dumpable,
// so no ptrace, no core, and /proc/PID belongs to root. It does not keep root
// out; secret memory does.
func Hide() error {
	if err := Undump(); err != nil {
		return err
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("setrlimit RLIMIT_CORE: %w", err)
	}
	return nil
}

// Undump is Hide for a process that starts others: a limit on cores would be
// theirs too.
func Undump() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("prctl PR_SET_DUMPABLE: %w", err)
	}
	return nil
}
