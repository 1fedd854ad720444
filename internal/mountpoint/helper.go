package mountpoint

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// MayMount tells whether this process mounts by itself: root, or a user with
// CAP_SYS_ADMIN in a user namespace of their own.
func MayMount() bool {
	if os.Geteuid() == 0 {
		return true
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData // two for version 3, capget(2)
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	return data[0].Effective&(1<<unix.CAP_SYS_ADMIN) != 0
}

// HelperName is the program that the FUSE library runs to mount. A binary of
// ours that is called by this name does what that program does for root.
const HelperName = "fusermount3"

// CheckDevice tells early whether /dev/fuse can be used at all.
func CheckDevice() error {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		return f.Close()
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return ErrNoDevice
	}
	return fmt.Errorf("%w: %w", ErrDevice, err)
}

// HelperPath returns a PATH in which the mount helper is found, and a function
// that removes what was made for it. Where fusermount3 is installed that is the
// PATH as it is. Elsewhere root is helped by this binary under that name.
//
// For root and a mount over a file it is always this binary: the other one
// cannot mount over the placeholder of Prepare. It is too for a user who may
// mount in a namespace of their own: there set-user-id gives nothing.
func HelperPath(binary string, overFile bool) (path string, cleanup func(), err error) {
	path = os.Getenv("PATH")
	_, err = exec.LookPath(HelperName)
	root, may := os.Geteuid() == 0, MayMount()
	if err == nil && !(root && overFile) && (root || !may) {
		return path, func() {}, nil
	}
	if !may {
		return "", nil, ErrNoHelper
	}
	// An image may bring the link along; it then needs no writable directory.
	beside := filepath.Dir(binary)
	if info, err := os.Stat(filepath.Join(beside, HelperName)); err == nil && info.Mode().IsRegular() {
		return beside + ":" + path, func() {}, nil
	}
	var dir string
	for _, in := range []string{os.TempDir(), "/dev/shm", "/run"} {
		if dir, err = os.MkdirTemp(in, "oncefs-"); err == nil {
			break
		}
	}
	if err != nil {
		return "", nil, fmt.Errorf("no directory to put %s in: %w", HelperName, err)
	}
	cleanup = func() { os.RemoveAll(dir) }
	if err := os.Symlink(binary, filepath.Join(dir, HelperName)); err != nil {
		cleanup()
		return "", nil, err
	}
	return dir + ":" + path, cleanup, nil
}

// IsHelper tells whether the program was called as the mount helper.
func IsHelper(argv0 string) bool { return filepath.Base(argv0) == HelperName }

// Helper is fusermount3 as far as the FUSE library and this program call it:
// `-o OPTIONS -- DIR` mounts and passes the device's descriptor on, `-u [-z] --
// DIR` unmounts. It has the privilege of its caller and no more. It returns the
// exit status.
func Helper(args []string, stderr io.Writer) int {
	var opts, dir string
	var unmount, lazy bool
	for i := 0; i < len(args); i++ {
		switch args[i] {
		case "-o":
			if i++; i < len(args) {
				opts = args[i]
			}
		case "-u":
			unmount = true
		case "-z":
			lazy = true
		case "-q", "--":
		default:
			dir = args[i]
		}
	}
	err := errors.New("usage: fusermount3 -o OPTIONS -- DIR | fusermount3 -u [-z] -- DIR")
	switch {
	case dir == "":
	case unmount:
		flags := unix.UMOUNT_NOFOLLOW
		if lazy {
			flags |= unix.MNT_DETACH
		}
		err = unix.Unmount(dir, flags)
	default:
		err = mountAndPass(dir, opts)
	}
	if err != nil {
		fmt.Fprintf(stderr, "%s: %s: %v\n", HelperName, dir, err)
		return 1
	}
	return 0
}

func mountAndPass(dir, opts string) error {
	comm, err := strconv.Atoi(os.Getenv("_FUSE_COMMFD"))
	if err != nil {
		return errors.New("no _FUSE_COMMFD to pass the device to")
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return err
	}
	at, mode := dir, st.Mode&unix.S_IFMT
	if mode == unix.S_IFLNK {
		// A placeholder: the mount goes onto the link itself, not to where it leads.
		link, err := unix.Open(dir, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(link)
		at, mode = fmt.Sprintf("/proc/self/fd/%d", link), unix.S_IFREG
	}
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("/dev/fuse: %w", err)
	}
	// Neither set-user-id programs nor devices ever come from this filesystem.
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV)
	data := []string{
		fmt.Sprintf("fd=%d", dev),
		fmt.Sprintf("rootmode=%o", mode),
		fmt.Sprintf("user_id=%d", os.Getuid()),
		fmt.Sprintf("group_id=%d", os.Getgid()),
	}
	source, kind := Subtype, "fuse"
	for _, o := range strings.Split(opts, ",") {
		key, value, _ := strings.Cut(o, "=")
		switch key {
		case "ro":
			flags |= unix.MS_RDONLY
		case "fsname":
			source = value
		case "subtype":
			kind = "fuse." + value
		case "allow_other", "default_permissions":
			data = append(data, key)
		case "", "nonempty", "rw":
		default:
			return fmt.Errorf("unknown option %q", key)
		}
	}
	if err := unix.Mount(source, at, kind, flags, strings.Join(data, ",")); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	if err := unix.Sendmsg(comm, []byte{0}, unix.UnixRights(dev), nil, 0); err != nil {
		unix.Unmount(dir, unix.MNT_DETACH)
		return fmt.Errorf("pass the device on: %w", err)
	}
	return nil
}
