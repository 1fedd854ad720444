package sandbox

import (
	"errors"
	"fmt"
	"os"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// A Layer is one thing that a process has given up. Its text is what `status`
// shows and what --require names.
type Layer string

const (
	Undumpable   Layer = "undumpable"   // no core, no ptrace by its own user
	NoPrivileges Layer = "noprivileges" // no_new_privs and no capability
	Landlock     Layer = "landlock"     // no file but those under the mount, no network
	Seccomp      Layer = "seccomp"      // no system call but those it needs
)

// Layers are all there are, from the outermost.
func Layers() []Layer { return []Layer{Undumpable, NoPrivileges, Landlock, Seccomp} }

// serving is what the serving process needs beside the runtime: to wait for a FUSE
// device and to answer it through a pipe, to know its user, to leave its session once,
// to hang up on its supervisor, and to wait for its children.
var serving = []string{"poll", "ppoll", "splice", "geteuid", "setsid", "dup3", "shutdown", "wait4", "waitid"}

// reading is what the files under the mount take: openat2 below a descriptor,
// and readlinkat of a link that is open already. Their paths lie in memory, where
// a filter cannot look; it is Landlock that keeps them under the mount.
var reading = []string{"openat2", "readlinkat", "getdents64", "fstatfs"}

// Server is put on by the process that holds the secret, when it is mounted. It
// may go on reading the directory under, which may be nil; nothing else can be
// opened, reached or started. What the kernel does not have is left out: it
// returns the layers that are in force. An error means that a layer that the
// kernel has could not be put on.
func Server(under *os.File) (on []Layer, err error) {
	if err := Hide(); err != nil {
		return nil, err
	}
	on = append(on, Undumpable)
	if err := DropCapabilities(); err != nil {
		return on, err
	}
	// Landlock and seccomp take it as the price of not being root.
	if err := noNewPrivs(); err != nil {
		return on, err
	}
	on = append(on, NoPrivileges)
	locked, err := onlyBelow(under, ll.AccessFSReadFile|ll.AccessFSReadDir)
	if err != nil {
		return on, err
	}
	if locked {
		on = append(on, Landlock)
	}
	if !seccomp.Supported() {
		return on, nil
	}
	// An unforeseen call fails and does not kill: a dead server is a dead mount.
	names := serving
	if under != nil {
		names = append(append([]string{}, serving...), reading...)
	}
	if err := allowOnly(names, nil, seccomp.ActionErrno); err != nil {
		return on, err
	}
	return append(on, Seccomp), nil
}

// onlyBelow takes away every file, directory and port but some rights below a
// directory, which may be nil. It speaks to the kernel by descriptor, where the
// library's own rules take paths: the path of the directory under a mount leads
// to the mount by now.
func onlyBelow(dir *os.File, rights uint64) (bool, error) {
	version, err := ll.LandlockGetABIVersion()
	if err != nil || version < 1 {
		return false, nil // not built in, or not switched on
	}
	if dir == nil {
		return true, noFiles()
	}
	// Ports and scopes first; this layer leaves files alone.
	rest := landlock.V9
	rest.HandledAccessFS = 0
	if err := rest.BestEffort().Restrict(); err != nil {
		return false, fmt.Errorf("landlock: %w", err)
	}
	attr := ll.RulesetAttr{HandledAccessFS: fileRights(version)}
	ruleset, err := ll.LandlockCreateRuleset(&attr, 0)
	if err != nil {
		return false, fmt.Errorf("landlock_create_ruleset: %w", err)
	}
	defer unix.Close(ruleset)
	rule := ll.PathBeneathAttr{ParentFd: int(dir.Fd()), AllowedAccess: rights}
	if err := ll.LandlockAddPathBeneathRule(ruleset, &rule, 0); err != nil {
		return false, fmt.Errorf("landlock_add_rule: %w", err)
	}
	if err := ll.AllThreadsLandlockRestrictSelf(ruleset, 0); err != nil {
		return false, fmt.Errorf("landlock_restrict_self: %w", err)
	}
	return true, nil
}

// fileRights are all the rights over files that a Landlock of that version
// knows (landlock(7), table of ABI versions).
func fileRights(version int) uint64 {
	rights := uint64(ll.AccessFSRefer - 1)
	for _, since := range []struct {
		version int
		right   uint64
	}{{2, ll.AccessFSRefer}, {3, ll.AccessFSTruncate}, {5, ll.AccessFSIoctlDev}} {
		if version >= since.version {
			rights |= since.right
		}
	}
	return rights
}

// DropCapabilities gives up every capability of every thread.
func DropCapabilities() error { return dropCapabilities() }

// dropCapabilities gives up every capability of every thread but those named.
// The bounding set is left: it says what a started program could get, and with
// no_new_privs that is nothing.
func dropCapabilities(but ...cap.Value) error {
	if err := signalable(); err != nil {
		return err
	}
	keep := cap.NewSet()
	if len(but) > 0 {
		have := cap.GetProc()
		for _, c := range but {
			if on, err := have.GetFlag(cap.Permitted, c); err == nil && on {
				if err := errors.Join(keep.SetFlag(cap.Permitted, true, c), keep.SetFlag(cap.Effective, true, c)); err != nil {
					return fmt.Errorf("capabilities: %w", err)
				}
			}
		}
	}
	if err := keep.SetProc(); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}

func noNewPrivs() error {
	if err := signalable(); err != nil {
		return err
	}
	if err := ll.AllThreadsPrctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("prctl PR_SET_NO_NEW_PRIVS: %w", err)
	}
	return nil
}

// Available tells which layers Server could put on here.
func Available() []Layer {
	on := []Layer{Undumpable, NoPrivileges}
	if version, err := ll.LandlockGetABIVersion(); err == nil && version >= 1 {
		on = append(on, Landlock)
	}
	if seccomp.Supported() {
		on = append(on, Seccomp)
	}
	return on
}
