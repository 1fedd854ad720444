package sandbox

import (
	"fmt"
	"maps"
	"slices"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// kept are the capabilities that the warden's acts may take: to unmount, to look
// at any process in /proc, to open and remove a file wherever it is.
var kept = []cap.Value{cap.SYS_ADMIN, cap.SYS_PTRACE, cap.DAC_OVERRIDE, cap.DAC_READ_SEARCH, cap.FOWNER}

// forbidden is what the warden has no use for and an intruder would.
var forbidden = []string{
	"execve", "execveat", "fork", "vfork", "clone3",
	"socket", "socketpair", "connect", "bind", "listen", "accept", "accept4",
	"ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "pidfd_getfd", "kcmp", "perf_event_open",
	"mount", "fsopen", "fsconfig", "fsmount", "fspick", "open_tree", "move_mount", "mount_setattr", "pivot_root", "chroot", "setns", "unshare",
	"init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "bpf", "userfaultfd",
	"io_uring_setup", "io_uring_enter", "io_uring_register", "memfd_create", "memfd_secret", "open_by_handle_at",
	"swapon", "swapoff", "reboot", "acct", "quotactl", "settimeofday", "clock_settime", "adjtimex",
	"add_key", "request_key", "keyctl", "mknod", "mknodat", "link", "linkat", "symlink", "symlinkat",
	"setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups", "setfsuid", "setfsgid", "capset",
}

// Warden is put on by the process that unmounts, removes and looks up. alone
// tells that it unmounts by itself: where a plain user's fusermount3 does it,
// that program must be started and must get its privilege, so only dumps and
// capabilities are given up. Landlock is none of its layers, for it takes
// unmounting away.
func Warden(alone bool) error {
	if err := Hide(); err != nil {
		return err
	}
	if err := dropCapabilities(kept...); err != nil {
		return err
	}
	if !alone {
		return nil
	}
	if err := noNewPrivs(); err != nil {
		return err
	}
	if !seccomp.Supported() {
		return nil
	}
	info, err := arch.GetInfo("")
	if err != nil {
		return fmt.Errorf("seccomp: %w", err)
	}
	allowed := maps.Clone(info.SyscallNames)
	for _, name := range forbidden {
		delete(allowed, name)
	}
	conditions := goConditions()
	for _, c := range conditions {
		delete(allowed, c.Name)
	}
	// A list of what is allowed, made from what is not: the other way round the
	// library lets calls by another machine's numbers through.
	return load(slices.Sorted(maps.Keys(allowed)), conditions, seccomp.ActionErrno)
}
