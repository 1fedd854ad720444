package mountpoint

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// JanitorCommand is the first argument that makes the binary the janitor.
const JanitorCommand = "internal-janitor"

// A Janitor is a small process that takes the mount off when told to. It
// exists so that the process that holds the secret need not keep what
// unmounting takes: privilege, or starting fusermount3.
//
// For a mount over a file it has a second reason. Unmounting first and removing
// the placeholder then would show the empty placeholder in between, and a
// program that reads an empty file believes it. But removing a file over which
// something is mounted in another mount namespace removes the mount with it
// (since Linux 4.2; rename(2), unlink(2): EBUSY is for the caller's own
// namespace). So the janitor gets a namespace of its own before the mount is
// made, and one unlink there ends name and mount in the same instant.
type Janitor struct {
	mu  sync.Mutex
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader

	// Atomic tells whether a mount over a file comes off in one instant. It
	// does not where the system allows no user namespaces and the caller is no
	// root; then the placeholder, which nobody may read, can be seen briefly.
	Atomic bool
}

const (
	janitorDir    = "directory"
	janitorFile   = "file"
	janitorPlain  = "file-plain"
	janitorReady  = "ready"
	janitorGo     = "release"
	janitorDone   = "done"
	janitorFailed = "failed: "
)

// StartJanitor starts the janitor of a point. It must be called before the
// mount is made.
func StartJanitor(binary string, p *Point) (*Janitor, error) {
	if !p.File {
		return startJanitor(binary, janitorDir, p.Path, 0)
	}
	flags := uintptr(unix.CLONE_NEWNS)
	if os.Geteuid() != 0 {
		flags |= unix.CLONE_NEWUSER
	}
	j, err := startJanitor(binary, janitorFile, p.Path, flags)
	if err == nil {
		j.Atomic = true
		return j, nil
	}
	return startJanitor(binary, janitorPlain, p.Path, 0)
}

func startJanitor(binary, mode, path string, flags uintptr) (*Janitor, error) {
	cmd := exec.Command(binary, JanitorCommand, mode, path)
	cmd.Args[0] = "oncefs"
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "GOGC=off", "GOMAXPROCS=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		// A terminal's interrupt is for the daemon, which then tells the janitor.
		Setpgid:    true,
		Cloneflags: flags,
	}
	if flags&unix.CLONE_NEWUSER != 0 {
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Geteuid(), HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getegid(), HostID: os.Getegid(), Size: 1}}
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the unmounting process: %w", err)
	}
	j := &Janitor{cmd: cmd, in: in, out: bufio.NewReader(out)}
	if err := j.expect(janitorReady); err != nil {
		j.Close()
		return nil, fmt.Errorf("start the unmounting process: %w", err)
	}
	return j, nil
}

func (j *Janitor) expect(want string) error {
	line, err := j.out.ReadString('\n')
	line = strings.TrimSuffix(line, "\n")
	switch {
	case err != nil:
		return errors.New("it ended unasked")
	case line == want:
		return nil
	case strings.HasPrefix(line, janitorFailed):
		return errors.New(strings.TrimPrefix(line, janitorFailed))
	}
	return fmt.Errorf("it said %q", line)
}

// Release takes the mount off, lazily, and for a mount over a file removes the
// placeholder with it. It may be called again, and when the mount is gone
// already.
func (j *Janitor) Release() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, err := io.WriteString(j.in, janitorGo+"\n"); err != nil {
		return fmt.Errorf("unmount: the unmounting process is gone: %w", err)
	}
	if err := j.expect(janitorDone); err != nil {
		return fmt.Errorf("unmount: %w", err)
	}
	return nil
}

// PID is the janitor's process.
func (j *Janitor) PID() int { return j.cmd.Process.Pid }

// Close ends the janitor. It does not unmount.
func (j *Janitor) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.in.Close()
	return j.cmd.Wait()
}

// JanitorMain is the janitor: `oncefs janitor MODE PATH`. It returns the exit
// status.
func JanitorMain(args []string, in io.Reader, out io.Writer) int {
	say := func(line string) { io.WriteString(out, line+"\n") }
	if len(args) != 2 {
		return 1
	}
	mode, path := args[0], args[1]
	j := &janitor{path: path, dir: -1}
	if mode == janitorFile {
		if err := j.hide(); err != nil {
			say(janitorFailed + err.Error())
			return 1
		}
	}
	say(janitorReady)
	for lines := bufio.NewScanner(in); lines.Scan(); {
		if lines.Text() != janitorGo {
			return 1
		}
		if err := j.release(mode); err != nil {
			say(janitorFailed + err.Error())
			continue
		}
		say(janitorDone)
	}
	// The daemon is gone. A mount that it left is dead and says so to readers
	// (ENOTCONN); an empty directory in its place would be a lie.
	return 0
}

type janitor struct {
	path string
	dir  int // the placeholder's directory, in this namespace
}

// hide cuts this namespace off from mounts that are made later elsewhere.
func (j *janitor) hide() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	dir, err := unix.Open(filepath.Dir(j.path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: filepath.Dir(j.path), Err: err}
	}
	j.dir = dir
	return nil
}

func (j *janitor) release(mode string) error {
	switch mode {
	case janitorFile:
		return j.removePlaceholder(j.dir, filepath.Base(j.path))
	case janitorPlain, janitorDir:
		top, err := at(j.path)
		if err != nil {
			return err
		}
		if ours(top) {
			if err := detach(j.path); err != nil {
				return err
			}
		}
		if mode == janitorPlain {
			return j.removePlaceholder(unix.AT_FDCWD, j.path)
		}
		return nil
	}
	return fmt.Errorf("unknown mode %q", mode)
}

// removePlaceholder removes the name if it is still the empty file that was put
// there. Somebody else's file stays.
func (j *janitor) removePlaceholder(dir int, name string) error {
	var st unix.Stat_t
	err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "stat", Path: j.path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != 0 {
		return &fs.PathError{Op: "remove", Path: j.path, Err: ErrNotEmpty}
	}
	if err := unix.Unlinkat(dir, name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "remove", Path: j.path, Err: err}
	}
	return nil
}
