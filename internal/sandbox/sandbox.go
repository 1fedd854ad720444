// Package sandbox is what a process gives up.
package sandbox

import (
	"fmt"
	"os"

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

// spare is a real-time signal that neither the Go runtime nor a C library has a use
// for: the runtime takes it for nothing. 33, by which the runtime has every thread
// make a system call, would be another's where a C library is linked.
const spare = unix.Signal(64)

// signalable tells whether the threads of this process can be signalled, which
// giving something up in all of them takes. Where its user has too many signals
// waiting (RLIMIT_SIGPENDING) they cannot; the runtime does not look, and would
// wait for its threads for ever.
func signalable() error {
	if err := unix.Tgkill(os.Getpid(), unix.Gettid(), spare); err != nil {
		return fmt.Errorf("tgkill (RLIMIT_SIGPENDING is how many signals may wait): %w", err)
	}
	return nil
}
