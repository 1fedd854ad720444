package sandbox

import (
	"os"

	seccomp "github.com/elastic/go-seccomp-bpf"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// publishing is what answering takes on a socket that listens already.
var publishing = []string{"accept4", "getsockname", "getpeername", "getsockopt", "setsockopt", "shutdown"}

// replacing is what it takes to replace a file in a directory that is open.
var replacing = []string{"openat", "fchmod", "fsync", "renameat", "unlinkat"}

// Publisher is put on by the process that shows counters, when it listens. It may
// go on accepting connections, and making, renaming and removing files below dir,
// which may be nil; of its capabilities it then keeps the one that lets root write
// where it is not the owner.
func Publisher(dir *os.File) error {
	if err := Hide(); err != nil {
		return err
	}
	var keep []cap.Value
	names := publishing
	if dir != nil {
		keep = []cap.Value{cap.DAC_OVERRIDE}
		names = append(append([]string{}, publishing...), replacing...)
	}
	if err := dropCapabilities(keep...); err != nil {
		return err
	}
	if err := noNewPrivs(); err != nil {
		return err
	}
	// To read them as well: the library opens what it writes for both.
	if _, err := onlyBelow(dir, ll.AccessFSMakeReg|ll.AccessFSReadFile|ll.AccessFSWriteFile|ll.AccessFSRemoveFile); err != nil {
		return err
	}
	if !seccomp.Supported() {
		return nil
	}
	return allowOnly(names, nil, seccomp.ActionErrno)
}
