// Package mountpoint is the place in the file tree where a mount is attached:
// which one it is, what stands in its way, how a mount gets there without any
// package installed, and how it comes off again, also when its daemon is dead.
package mountpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Subtype is what a mount of ours is called: its type reads fuse.oncefs in
// /proc/self/mountinfo.
const Subtype = "oncefs"

var (
	// ErrMissing: there is nothing to mount on.
	ErrMissing = errors.New("does not exist")
	// ErrSymlink: the target is a symbolic link to something that is no
	// directory, so what would be removed after the read is not what was named.
	ErrSymlink = errors.New("is a symbolic link")
	// ErrNotEmpty: a file with content stands where the secret would be; it
	// would be back after the read.
	ErrNotEmpty = errors.New("is a file with content")
	// ErrKind: neither a directory nor a regular file.
	ErrKind = errors.New("is neither a directory nor a regular file")
	// ErrMounted: a live mount of ours is there already.
	ErrMounted = errors.New("an oncefs is mounted there already")
	// ErrNotMounted: no mount of ours is there.
	ErrNotMounted = errors.New("no oncefs is mounted there")
	// ErrDead: a dead FUSE mount that is not ours is there.
	ErrDead = errors.New("a dead mount of another filesystem is there")
	// ErrPrivate: the target is inside a FUSE mount without allow_other, which
	// lets no setuid program in.
	ErrPrivate = errors.New("is inside a FUSE mount that lets only its own user in, and so not fusermount3")
	// ErrNoDevice: there is no /dev/fuse.
	ErrNoDevice = errors.New("/dev/fuse does not exist")
	// ErrDevice: /dev/fuse cannot be opened.
	ErrDevice = errors.New("/dev/fuse cannot be opened")
	// ErrNoHelper: a user without privilege needs fusermount3, and it is not
	// in PATH.
	ErrNoHelper = errors.New("fusermount3 is not in PATH")
)

// A Point is where a mount goes.
type Point struct {
	Path string // absolute, without symbolic links
	File bool   // mounted over a file, not over a directory
	made bool   // Prepare made the placeholder
}

// Real makes a path absolute and resolves the symbolic links of all but its
// last element, which may be a dead mount that nothing can look at.
func Real(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, filepath.Base(abs)), nil
}

// Find decides what the target is. A directory is mounted over whole; a path
// whose last element is name is mounted over by itself and need not exist yet.
// A dead mount of ours on the way is taken off first; it reports how many were.
func Find(target, name string) (p *Point, healed int, err error) {
	real, err := Real(target)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = ErrMissing
		}
		return nil, 0, &fs.PathError{Op: "mount on", Path: target, Err: err}
	}
	wrap := func(err error) error { return &fs.PathError{Op: "mount on", Path: real, Err: err} }
	// Killed in the instant between rename and removal, one of ours left this.
	aside := filepath.Join(filepath.Dir(real), asideOf(filepath.Base(real)))
	if n, _ := heal(aside); n > 0 {
		healed += n
		if err := os.Remove(aside); err != nil {
			return nil, healed, wrap(err)
		}
	}
	if err := admitsHelper(real); err != nil {
		return nil, healed, wrap(err)
	}
	for links := 0; ; links++ {
		n, err := heal(real)
		healed += n
		if err != nil {
			return nil, healed, wrap(err)
		}
		info, err := os.Lstat(real)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			if filepath.Base(real) != name || strings.HasSuffix(target, "/") {
				return nil, healed, wrap(ErrMissing)
			}
			return &Point{Path: real, File: true}, healed, nil
		case err != nil:
			return nil, healed, err
		case info.IsDir():
			return &Point{Path: real}, healed, nil
		case info.Mode()&fs.ModeSymlink != 0:
			if isLink(real) {
				return &Point{Path: real, File: true}, healed, nil
			}
			to, err := filepath.EvalSymlinks(real)
			if err != nil || links > 0 {
				return nil, healed, wrap(ErrSymlink)
			}
			if info, err := os.Stat(to); err != nil || !info.IsDir() {
				return nil, healed, wrap(ErrSymlink)
			}
			real = to
		case !info.Mode().IsRegular():
			return nil, healed, wrap(ErrKind)
		case info.Size() > 0:
			return nil, healed, wrap(ErrNotEmpty)
		default:
			return &Point{Path: real, File: true}, healed, nil
		}
	}
}

// nowhere is what a placeholder that is a symbolic link points to.
const nowhere = "oncefs-placeholder-points-nowhere"

// Prepare makes the placeholder that a mount over a file needs. A program that
// is on its way through the path when mount and placeholder vanish may still
// come upon the placeholder. Where we mount by ourselves it is a link to nowhere,
// so that such a program is told that there is no file; fusermount3 mounts over
// no link, so there it is an empty file that nobody may read.
func (p *Point) Prepare() error {
	if !p.File {
		return nil
	}
	if MayMount() {
		switch err := os.Symlink(nowhere, p.Path); {
		case err == nil:
			p.made = true
			return nil
		case !errors.Is(err, fs.ErrExist):
			return err
		}
		if isLink(p.Path) {
			return nil
		}
		// An empty file that Find saw: one of ours from before, or a user's.
		if err := os.Remove(p.Path); err != nil {
			return err
		}
		p.made = true
		return os.Symlink(nowhere, p.Path)
	}
	f, err := os.OpenFile(p.Path, os.O_CREATE|os.O_EXCL|os.O_WRONLY|unix.O_NOFOLLOW, 0o200)
	if errors.Is(err, fs.ErrExist) {
		return nil // Find saw it, empty
	}
	if err != nil {
		return err
	}
	p.made = true
	return f.Close()
}

// isLink tells whether the path is a placeholder that is a link.
func isLink(path string) bool {
	to, err := os.Readlink(path)
	return err == nil && to == nowhere
}

// Abandon removes the placeholder if Prepare made it and nothing was mounted.
func (p *Point) Abandon() error {
	if !p.made {
		return nil
	}
	p.made = false
	return os.Remove(p.Path)
}

// admitsHelper tells early that fusermount3 cannot get to the path.
func admitsHelper(path string) error {
	if MayMount() {
		return nil
	}
	around, err := mountinfo.GetMounts(mountinfo.ParentsFilter(filepath.Dir(path)))
	if err != nil {
		return fmt.Errorf("read mountinfo: %w", err)
	}
	var in *mountinfo.Info
	for _, i := range around {
		if in == nil || len(i.Mountpoint) >= len(in.Mountpoint) {
			in = i
		}
	}
	if in != nil && strings.HasPrefix(in.FSType, "fuse") && !slices.Contains(strings.Split(in.VFSOptions, ","), "allow_other") {
		return ErrPrivate
	}
	return nil
}

// at returns the topmost mount on exactly that path, or nil.
func at(path string) (*mountinfo.Info, error) {
	all, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return i.Mountpoint != path, false })
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	if len(all) == 0 {
		return nil, nil
	}
	return all[len(all)-1], nil
}

func ours(i *mountinfo.Info) bool { return i != nil && i.FSType == "fuse."+Subtype }

// dead tells whether the daemon behind a mount is gone.
// It asks of the filesystem and not of the file: over a file that somebody has
// claimed, a stat would be an attempt.
func dead(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == unix.ENOTCONN
}

// heal takes dead mounts of ours off the path, however many were stacked.
func heal(path string) (healed int, err error) {
	for {
		top, err := at(path)
		if err != nil {
			return healed, err
		}
		switch {
		case dead(path) && ours(top):
			if err := detach(path); err != nil {
				return healed, fmt.Errorf("a dead mount cannot be taken off: %w", err)
			}
			healed++
		case dead(path):
			return healed, ErrDead
		case ours(top):
			return healed, ErrMounted
		default:
			return healed, nil
		}
	}
}

// detach takes the topmost mount off the path, lazily: an open descriptor goes
// on working, and nobody's being inside keeps it there.
func detach(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err == nil || !errors.Is(err, unix.EPERM) {
		return err
	}
	// Not for us to do: fusermount3 may, for the user who mounted it.
	helper, err := exec.LookPath(HelperName)
	if err != nil {
		return ErrNoHelper
	}
	out, err := exec.Command(helper, "-u", "-z", "--", path).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %s", HelperName, strings.TrimSpace(string(out)))
	}
	return nil
}

// Unmount takes a mount of ours off the target, dead or alive.
func Unmount(target string) error {
	real, err := Real(target)
	if errors.Is(err, fs.ErrNotExist) {
		return &fs.PathError{Op: "unmount", Path: target, Err: ErrNotMounted}
	}
	if err != nil {
		return err
	}
	top, err := at(real)
	if err != nil {
		return err
	}
	if !ours(top) {
		if to, err := filepath.EvalSymlinks(real); err == nil && to != real {
			return Unmount(to)
		}
		return &fs.PathError{Op: "unmount", Path: real, Err: ErrNotMounted}
	}
	if err := detach(real); err != nil {
		return &fs.PathError{Op: "unmount", Path: real, Err: err}
	}
	return nil
}

// Mounted tells whether a mount of ours is on the target, and whether its
// daemon is alive.
func Mounted(target string) (path string, mounted, alive bool, err error) {
	real, err := Real(target)
	if errors.Is(err, fs.ErrNotExist) {
		return target, false, false, nil
	}
	if err != nil {
		return "", false, false, err
	}
	top, err := at(real)
	if err != nil {
		return real, false, false, err
	}
	if !ours(top) {
		if to, err := filepath.EvalSymlinks(real); err == nil && to != real {
			return Mounted(to)
		}
		return real, false, false, nil
	}
	return real, true, !dead(real), nil
}

// All lists the paths of the mounts of ours that this process can see.
func All() []string {
	all, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return !ours(i), false })
	if err != nil {
		return nil
	}
	var paths []string
	for _, i := range all {
		paths = append(paths, i.Mountpoint)
	}
	slices.Sort(paths)
	return slices.Compact(paths)
}

// Private makes what is mounted from here on in the calling process's mount
// namespace, which must be its own, invisible outside. What is mounted outside
// later still comes in.
func Private() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	return nil
}
