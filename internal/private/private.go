// Package private is a place that only one program and what it starts can see,
// and that is gone with them.
//
// It is a directory in memory (ramfs, whose pages are never written to swap) in
// a mount namespace of its own, whose other mounts are read-only: what a program
// in there writes, it writes there or not at all. The program is the first
// process of a process namespace of its own: when it ends, however it ends, the
// kernel ends all that it has started and frees the memory.
//
// What it does not keep out: root, and another process of the same user that
// traces one in there.
package private

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
	"oncefs/internal/sandbox"
)

// ErrUnavailable says that there can be no private place here.
var ErrUnavailable = errors.New("there can be no private place in memory here")

// Start starts a command, made by build, as the first process of its own
// namespaces. A user without the capability for that gets it from a user
// namespace, in which the same user and group are themselves.
func Start(build func() *exec.Cmd) (*exec.Cmd, error) {
	attr := &syscall.SysProcAttr{
		// Go makes every mount private to the new namespace by itself, so nothing
		// that is mounted there is seen outside.
		Cloneflags:   unix.CLONE_NEWPID,
		Unshareflags: unix.CLONE_NEWNS,
		Pdeathsig:    syscall.SIGKILL,
	}
	cmd := build()
	cmd.SysProcAttr = attr
	err := cmd.Start()
	if err == nil {
		return cmd, nil
	}
	if !errors.Is(err, unix.EPERM) {
		return nil, unavailable(err)
	}
	uid, gid := os.Geteuid(), os.Getegid()
	attr.Cloneflags |= unix.CLONE_NEWUSER
	attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
	attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}}
	// Kept over the exec, for Enter.
	attr.AmbientCaps = []uintptr{unix.CAP_SYS_ADMIN}
	cmd = build()
	cmd.SysProcAttr = attr
	if err := cmd.Start(); err != nil {
		return nil, unavailable(err)
	}
	return cmd, nil
}

func unavailable(err error) error {
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// Dir is the private directory, for whoever is in there. For everybody else it is
// what it always was: a directory of the kernel's that is empty (the line
// disciplines of Linux 2.4) and in which nobody, not even root, can make a file.
// So nothing need be made for it on any disk, nothing is left of it, and a program
// outside that is told the name cannot write there by mistake.
const Dir = "/proc/tty/ldisc"

// Enter is called once by the program that Start started: it makes Dir a private
// directory of mode 0700. With seal every other mount becomes read-only. Then it
// gives up what it needed for that.
func Enter(seal bool) error {
	if seal {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &attr); err != nil {
			return unavailable(fmt.Errorf("make the other mounts read-only: mount_setattr: %w", err))
		}
	}
	if err := attach(Dir); err != nil {
		return unavailable(err)
	}
	if os.Geteuid() != 0 {
		if err := sandbox.DropCapabilities(); err != nil {
			return err
		}
	}
	return nil
}

// attach mounts a new ramfs. Unlike tmpfs it is never swapped and any user
// namespace may have it (tmpfs can do without swap since Linux 6.4, but for root
// alone); unlike tmpfs it has no limit but the machine's memory.
func attach(dir string) error {
	fs, err := unix.Fsopen("ramfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("ramfs: fsopen: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetString(fs, "mode", "0700"); err != nil {
		return fmt.Errorf("ramfs: fsconfig: %w", err)
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return fmt.Errorf("ramfs: fsconfig: %w", err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
	if err != nil {
		return fmt.Errorf("ramfs: fsmount: %w", err)
	}
	defer unix.Close(mount)
	if err := unix.MoveMount(mount, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("ramfs: move_mount to %s: %w", dir, err)
	}
	// What is written from here on must be in memory that is not swapped: better
	// look than believe.
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("ramfs: statfs: %w", err)
	}
	if st.Type != ramfsMagic {
		return fmt.Errorf("ramfs: %s is on another filesystem", dir)
	}
	return nil
}

// ramfsMagic is RAMFS_MAGIC of linux/magic.h.
const ramfsMagic = 0x858458f6

// Left waits, as the first process of its namespace, for everything that was
// started in there and has no parent any more. It returns when nothing is left.
func Left() {
	for {
		if _, err := unix.Wait4(-1, nil, 0, nil); err != nil && err != unix.EINTR {
			return
		}
	}
}

// Any tells, without waiting, whether something that was started in there is
// left, apart from this process.
func Any() bool {
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return false
		case pid == 0:
			return true
		}
	}
}

// EndAll ends everything in the namespace but this process.
func EndAll() { unix.Kill(-1, unix.SIGKILL) }
