package sandbox

import (
	"fmt"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/landlock-lsm/go-landlock/landlock"
	"golang.org/x/sys/unix"
)

// goRuntime is what the Go runtime and the os package need to go on with
// descriptors that are open already: memory, threads of this process, time,
// signals, reading and writing.
var goRuntime = []string{
	"read", "write", "readv", "writev", "pread64", "close", "fcntl", "fstat", "newfstatat", "lseek",
	"mmap", "munmap", "mremap", "madvise", "mprotect", "brk",
	"futex", "sched_yield", "sched_getaffinity", "nanosleep", "clock_nanosleep", "clock_gettime", "gettimeofday", "getrandom", "restart_syscall",
	"rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "tgkill", "getpid", "gettid",
	"epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "eventfd2", "poll", "ppoll", "pipe2",
	"set_robust_list", "rseq", "timer_create", "timer_settime", "timer_delete", "setitimer",
	"exit", "exit_group",
}

// allowOnly installs a filter on every thread: the named calls, clone for
// threads, and for anything else the given action.
func allowOnly(names []string, otherwise seccomp.Action) error {
	info, err := arch.GetInfo("")
	if err != nil {
		return fmt.Errorf("seccomp: %w", err)
	}
	var known []string
	for _, n := range names {
		// Not every machine has every call: arm64 has no poll.
		if _, ok := info.SyscallNames[n]; ok {
			known = append(known, n)
		}
	}
	policy := seccomp.Policy{
		DefaultAction: otherwise,
		Syscalls: []seccomp.SyscallGroup{{
			Action: seccomp.ActionAllow,
			Names:  known,
			NamesWithCondtions: []seccomp.NameWithConditions{{
				Name:       "clone",
				Conditions: seccomp.ArgumentConditions{{Argument: 0, Operation: seccomp.BitsSet, Value: unix.CLONE_THREAD}},
			}},
		}},
	}
	// TSYNC puts the filter on every thread.
	return seccomp.LoadFilter(seccomp.Filter{Flag: seccomp.FilterFlagTSync, Policy: policy})
}

// noFiles takes away every file, directory and TCP port that is not open
// already, as far as the kernel's Landlock goes.
func noFiles() error {
	if err := landlock.V9.BestEffort().Restrict(); err != nil {
		return fmt.Errorf("landlock: %w", err)
	}
	return nil
}

// Decryptor is put on by the process that parses hostile input. It keeps its
// open descriptors and its memory; it can open, connect, start and see nothing.
// Any other system call kills it.
func Decryptor() error {
	for _, step := range []func() error{
		Hide,
		dropCapabilities,
		noNewPrivs,
		noFiles,
		func() error {
			// ioctl is for the terminal that a passphrase is asked at.
			return allowOnly(append([]string{"ioctl"}, goRuntime...), seccomp.ActionKillProcess)
		},
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}
