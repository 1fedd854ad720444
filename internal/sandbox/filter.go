package sandbox

import (
	"fmt"
	"os"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

// goRuntime is what the Go runtime and the os package need to go on with
// descriptors that are open already: memory, time, signals, reading, writing,
// waiting. None of it names a file, a process or an address of the network.
var goRuntime = []string{
	"read", "write", "pread64", "close", "fcntl", "fstat",
	"munmap", "madvise",
	"futex", "sched_yield", "sched_getaffinity", "nanosleep", "clock_gettime", "getrandom", "restart_syscall",
	"rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "getpid", "gettid",
	"epoll_create1", "epoll_ctl", "epoll_pwait", "eventfd2",
	"exit", "exit_group",
}

// A condition is a call that is allowed with some arguments only; several of
// one name allow any of them.
type condition = seccomp.NameWithConditions

func when(name string, argument uint32, op seccomp.Operation, value uint64) condition {
	return condition{Name: name, Conditions: seccomp.ArgumentConditions{{Argument: argument, Operation: op, Value: value}}}
}

// goConditions go with goRuntime: threads and no processes, memory that is never
// code, signals to this process's own threads and to no other, and the names that
// the runtime gives to its memory where the kernel keeps them.
func goConditions() []condition {
	return []condition{
		when("clone", 0, seccomp.BitsSet, unix.CLONE_THREAD),
		when("mmap", 2, seccomp.BitsNotSet, unix.PROT_EXEC),
		when("mprotect", 2, seccomp.BitsNotSet, unix.PROT_EXEC),
		when("tgkill", 0, seccomp.Equal, uint64(os.Getpid())),
		when("prctl", 0, seccomp.Equal, unix.PR_SET_VMA),
	}
}

// allowOnly installs a filter on every thread: what the runtime needs, the named
// calls and the conditions, and for anything else the given action. Calls by
// another machine's numbers (i386, x32) are turned away too.
func allowOnly(names []string, conditions []condition, otherwise seccomp.Action) error {
	info, err := arch.GetInfo("")
	if err != nil {
		return fmt.Errorf("seccomp: %w", err)
	}
	var known []string
	for _, n := range append(append([]string{}, goRuntime...), names...) {
		// Not every machine has every call: arm64 has no poll.
		if _, ok := info.SyscallNames[n]; ok {
			known = append(known, n)
		}
	}
	return load(known, append(goConditions(), conditions...), otherwise)
}

func load(names []string, conditions []condition, otherwise seccomp.Action) error {
	policy := seccomp.Policy{
		DefaultAction: otherwise,
		Syscalls:      []seccomp.SyscallGroup{{Action: seccomp.ActionAllow, Names: names, NamesWithCondtions: conditions}},
	}
	// TSYNC puts the filter on every thread.
	return seccomp.LoadFilter(seccomp.Filter{Flag: seccomp.FilterFlagTSync, Policy: policy})
}
