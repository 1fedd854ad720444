// Package warden is the process that keeps what the serving process gives up.
//
// The process that holds the secret ends with no privilege, no file to open and
// no program to start. Three things are left that take more: to remove the
// passphrase file, to take the mount off, and to look up who is reading, which
// /proc tells only to those that could trace the reader. A fourth is that the
// serving process must not look at its own mount: killed while the kernel waits
// for it to answer itself, it could not end. A small child of the same binary does
// them when asked. It holds no secret, and no answer of its can make the serving
// process give one out.
package warden

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"oncefs/internal/erase"
	"oncefs/internal/mountpoint"
	"oncefs/internal/process"
	"oncefs/internal/sandbox"
)

// Command is the first argument that makes the binary the warden.
const Command = "internal-warden"

// Descriptors that the warden inherits: ends of socket pairs.
const (
	releaseFD = 3
	lookupFD  = 4
	readersFD = 5
	parentFD  = 6 // the directory that the mount's name is in, for Stat
)

// How long a look-up may take, and one that reads a whole executable. A reader
// waits for it, nobody else.
const (
	patience       = 2 * time.Second
	digestPatience = 30 * time.Second
)

// startPatience is how long the warden may take until it is set up, which is
// milliseconds: one that is not by then never will be.
const startPatience = 30 * time.Second

// settled is when the warden gives back what its start took: once, so that nothing
// wakes it later, and when a first reader has most likely been looked up.
const settled = time.Second

// A Warden is the running process. Its methods may be called by several
// goroutines.
type Warden struct {
	cmd     *exec.Cmd
	path    string   // of the mount
	release *channel // what changes something: nothing may stand in its way
	lookup  *channel // who decides, and takes longer
	readers *Readers
	remover *Warden // who answers Release in its place; may be nil
	ready   func() error
}

// A question is what one message asks. Only the fields of its kind are set.
type question struct {
	ID      uint64 `json:"id"`
	Erase   bool   `json:"erase,omitempty"`
	Release bool   `json:"release,omitempty"`
	PID     uint32 `json:"pid,omitempty"`
	Inode   uint64 `json:"inode,omitempty"` // does the process hold it open?
	// Look, not nil: the facts about the process that decide.
	Look *process.What `json:"look,omitempty"`
	Tree uint32        `json:"tree,omitempty"` // not 0: does the process descend from this one?
	Stat []string      `json:"stat,omitempty"` // paths below the parent directory
}

type answer struct {
	ID    uint64 `json:"id"`
	Error string `json:"error,omitempty"`
	Errno int    `json:"errno,omitempty"` // what the kernel said, if it did
	Kept  bool   `json:"kept,omitempty"`  // at the start: the file to erase is what the error is about
	Gone  bool   `json:"gone,omitempty"`  // for Erase: removed, in spite of the error
	Holds bool   `json:"holds,omitempty"`
	// Facts and Outside answer Look.
	Facts   process.Facts `json:"facts,omitzero"`
	Outside bool          `json:"outside,omitempty"` // process.ErrOutside
	Within  bool          `json:"within,omitempty"`
	Shown   []Shown       `json:"shown,omitempty"` // for Stat, in the order of the paths
}

// Shown is what stat shows of one file.
type Shown struct {
	Size  int64      `json:"size"`
	Mode  uint32     `json:"mode"`            // type and permission bits, as in stat(2)
	Errno unix.Errno `json:"errno,omitempty"` // not 0: nothing was shown
}

// Start starts the warden of a point, which must be done before the mount is
// made: for a mount over a file it gets a mount namespace of its own, see
// mountpoint.Remover. erasable is the file that Erase removes, or nil. It is
// running when Start returns, and set up when Ready does.
func Start(binary string, p *mountpoint.Point, erasable *erase.File) (*Warden, error) {
	if !p.File {
		return start(binary, p.Path, erasable, mountpoint.Detach, 0)
	}
	if mountpoint.MayMount() {
		w, err := start(binary, p.Path, erasable, mountpoint.Unlink, unix.CLONE_NEWNS)
		if err == nil {
			err = w.Ready()
		}
		// A file that cannot be erased is no reason to do without namespaces.
		if err == nil || errors.As(err, new(*erase.RemoveError)) {
			return w, nil
		}
		w.abandon()
	} else if remover, err := start(binary, p.Path, nil, mountpoint.Unlink, unix.CLONE_NEWNS|unix.CLONE_NEWUSER); err == nil {
		if remover.Ready() == nil {
			// In a user namespace of its own it can look nobody up who is outside:
			// that takes another process.
			w, err := start(binary, p.Path, erasable, mountpoint.DetachAndUnlink, 0)
			if err != nil {
				remover.Close()
				return nil, err
			}
			w.remover = remover
			return w, nil
		}
		remover.abandon()
	}
	// No namespaces to be had: the placeholder, which nobody may read, can then
	// be seen for a moment.
	return start(binary, p.Path, erasable, mountpoint.DetachAndUnlink, 0)
}

// abandon ends one that did not set itself up, if it runs at all.
func (w *Warden) abandon() {
	if w != nil {
		w.Close()
	}
}

func start(binary, path string, erasable *erase.File, how mountpoint.How, flags uintptr) (_ *Warden, err error) {
	var ours, theirs [2]*os.File
	for i := range ours {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return nil, fmt.Errorf("socketpair: %w", err)
		}
		ours[i], theirs[i] = os.NewFile(uintptr(fds[0]), "warden"), os.NewFile(uintptr(fds[1]), "warden's end")
		defer theirs[i].Close()
	}
	w := &Warden{path: path}
	readers, theirReaders, err := newReaders()
	if err != nil {
		for _, f := range ours {
			f.Close()
		}
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	defer theirReaders.Close()
	w.readers = readers
	for i, c := range []**channel{&w.release, &w.lookup} {
		*c = &channel{f: ours[i], done: make(chan struct{}), waiting: map[uint64]chan answer{}}
	}
	name, identity := "", ""
	if erasable != nil {
		name, identity = erasable.Removable(), erasable.Identity()
	}
	w.cmd = exec.Command(binary, Command, string(how), path, name, identity)
	w.cmd.Args[0] = "oncefs"
	// Two: one for who reads, whom it waits for in the kernel.
	w.cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "GOMAXPROCS=2"}
	w.cmd.ExtraFiles = append(theirs[:], theirReaders)
	if flags&unix.CLONE_NEWUSER == 0 {
		// Opened here, for in a mount namespace of its own the mount cannot be seen
		// by its path.
		parent, err := os.OpenFile(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			w.closeChannels()
			return nil, err
		}
		defer parent.Close()
		w.cmd.ExtraFiles = append(w.cmd.ExtraFiles, parent)
	}
	w.cmd.SysProcAttr = &syscall.SysProcAttr{
		// A terminal's interrupt is for the serving process, which then asks us.
		Setpgid:    true,
		Cloneflags: flags,
	}
	if flags&unix.CLONE_NEWUSER != 0 {
		w.cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Geteuid(), HostID: os.Geteuid(), Size: 1}}
		// Of that namespace only: to make its mounts private. Who is not 0 there
		// would lose it in execve.
		w.cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_SYS_ADMIN}
		w.cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getegid(), HostID: os.Getegid(), Size: 1}}
	}
	err = w.cmd.Start()
	for _, f := range w.cmd.ExtraFiles {
		f.Close() // or its death could not be seen from ours
	}
	if err != nil {
		w.closeChannels()
		return nil, fmt.Errorf("start the warden: %w", err)
	}
	w.ready = sync.OnceValue(func() error {
		// It says once, unasked, that it is set up.
		in := bufio.NewReader(w.release.f)
		err := w.release.f.SetReadDeadline(time.Now().Add(startPatience))
		var a answer
		if err == nil {
			a, err = readAnswer(in)
		}
		if a.Kept {
			return &erase.RemoveError{Path: name, Err: a.err()}
		}
		if err = errors.Join(err, a.err(), w.release.f.SetReadDeadline(time.Time{})); err != nil {
			w.cmd.Process.Kill()
			return fmt.Errorf("start the warden: %w", err)
		}
		go w.release.listen(in)
		go w.lookup.listen(bufio.NewReader(w.lookup.f))
		return nil
	})
	return w, nil
}

// Ready waits until the warden is set up, which must be before anything is
// asked of it and before the mount is made.
func (w *Warden) Ready() error { return w.ready() }

// failure is an error that the warden had: its words, and the kernel's number.
type failure struct {
	text  string
	errno unix.Errno
}

func (f *failure) Error() string { return f.text }

func (f *failure) Unwrap() error {
	if f.errno == 0 {
		return nil
	}
	return f.errno
}

func (a answer) err() error {
	if a.Error == "" {
		return nil
	}
	return &failure{text: a.Error, errno: unix.Errno(a.Errno)}
}

func failed(err error) answer {
	if err == nil {
		return answer{}
	}
	a := answer{Error: strings.ReplaceAll(err.Error(), "\n", "; ")}
	var errno unix.Errno
	if errors.As(err, &errno) {
		a.Errno = int(errno)
	}
	return a
}

// Erase removes the file that Start named, as erase.File.Remove does. gone tells
// that it was removed in spite of an error.
func (w *Warden) Erase() (gone bool, err error) {
	a, err := w.release.ask(question{Erase: true}, 0)
	return a.Gone, errors.Join(err, a.err())
}

// Release takes the mount off, lazily, and for a mount over a file removes the
// placeholder with it. It may be called again, and when the mount is gone.
func (w *Warden) Release() error {
	if w.remover != nil {
		return w.remover.Release()
	}
	a, err := w.release.ask(question{Release: true}, 0)
	if err = errors.Join(err, a.err()); err != nil {
		return fmt.Errorf("unmount: %w", err)
	}
	return nil
}

// Readers asks who readers are.
func (w *Warden) Readers() *Readers { return w.readers }

// Holds tells whether a process has a file of that inode number open. What
// cannot be known in time is no.
func (w *Warden) Holds(pid uint32, inode uint64) bool {
	a, _ := w.lookup.ask(question{PID: pid, Inode: inode}, patience)
	return a.Holds
}

// Look tells the facts that decide about a process. An error means that they
// cannot be told, and is process.ErrOutside if that is why. The kernel must be
// keeping the process for us: see fs.Options.Allow.
func (w *Warden) Look(pid uint32, what process.What) (process.Facts, error) {
	limit := patience
	if what.Digest {
		limit = digestPatience
	}
	a, err := w.lookup.ask(question{PID: pid, Look: &what}, limit)
	if err == nil && a.Outside {
		return process.Facts{}, process.ErrOutside
	}
	if err = errors.Join(err, a.err()); err != nil {
		return process.Facts{}, err
	}
	return a.Facts, nil
}

// Descends tells whether a process descends from another, see
// process.Descends. What cannot be known in time is no.
func (w *Warden) Descends(pid, ancestor uint32) bool {
	a, _ := w.lookup.ask(question{PID: pid, Tree: ancestor}, patience)
	return a.Within
}

// Stat looks at files of the mount, by their names in it; "" is what the mount is
// on. It is to be asked once, and waits for as long as the mount takes to answer.
func (w *Warden) Stat(names []string) ([]Shown, error) {
	paths := make([]string, len(names))
	for i, name := range names {
		paths[i] = filepath.Join(filepath.Base(w.path), name)
	}
	a, err := w.lookup.ask(question{Stat: paths}, 0)
	if err == nil && len(a.Shown) != len(names) {
		err = ErrGone
	}
	return a.Shown, err
}

// PID is the warden's process.
func (w *Warden) PID() int { return w.cmd.Process.Pid }

// Close ends the warden, which does not unmount. One that hangs is left behind
// after a second.
func (w *Warden) Close() error {
	if w.remover != nil {
		defer w.remover.Close()
	}
	w.closeChannels()
	ended := make(chan error, 1)
	go func() { ended <- w.cmd.Wait() }()
	select {
	case err := <-ended:
		return err
	case <-time.After(time.Second):
		return errors.New("the warden does not end")
	}
}

func (w *Warden) closeChannels() {
	w.release.f.Close()
	w.lookup.f.Close()
	w.readers.f.Close()
}

// A channel carries questions one way and answers, in any order, the other: no
// question waits for another's answer.
type channel struct {
	f    *os.File
	done chan struct{} // closed when the other end is gone

	mu      sync.Mutex
	last    uint64
	waiting map[uint64]chan answer
}

// ErrGone says that the warden is no more: whether it did what was asked is not
// known.
var ErrGone = errors.New("the warden is gone")

// listen passes answers on until the other end is gone.
func (c *channel) listen(in *bufio.Reader) {
	defer close(c.done)
	for {
		a, err := readAnswer(in)
		if err != nil {
			return
		}
		c.mu.Lock()
		waiter := c.waiting[a.ID]
		delete(c.waiting, a.ID)
		c.mu.Unlock()
		if waiter != nil { // else it came too late
			waiter <- a
		}
	}
}

// ask asks and waits for the answer, for limit if that is not 0.
func (c *channel) ask(q question, limit time.Duration) (answer, error) {
	waiter := make(chan answer, 1)
	c.mu.Lock()
	c.last++
	q.ID = c.last
	c.waiting[q.ID] = waiter
	line, err := json.Marshal(q)
	if err == nil {
		_, err = c.f.Write(append(line, '\n'))
	}
	c.mu.Unlock()
	if err != nil {
		return answer{}, fmt.Errorf("%w: %w", ErrGone, err)
	}
	var late <-chan time.Time
	if limit > 0 {
		timer := time.NewTimer(limit)
		defer timer.Stop()
		late = timer.C
	}
	select {
	case a := <-waiter:
		return a, nil
	case <-c.done:
		return answer{}, ErrGone
	case <-late:
		c.mu.Lock()
		delete(c.waiting, q.ID)
		c.mu.Unlock()
		return answer{}, errors.New("the warden did not answer in time")
	}
}

func readAnswer(in *bufio.Reader) (a answer, err error) {
	line, err := in.ReadBytes('\n')
	if err != nil {
		return a, err
	}
	return a, json.Unmarshal(line, &a)
}

// Main is the warden: `oncefs internal-warden HOW PATH ERASABLE IDENTITY`. It returns the
// exit status.
func Main(args []string) int {
	if len(args) != 4 {
		return 1
	}
	release := &end{f: os.NewFile(releaseFD, "release")}
	lookup := &end{f: os.NewFile(lookupFD, "lookup")}
	remover, err := mountpoint.NewRemover(mountpoint.How(args[0]), args[1])
	if err != nil {
		release.answer(failed(err))
		return 1
	}
	var erasable *erase.File
	if args[2] != "" {
		// Opened now, so that what is removed is what was read.
		if erasable, err = erase.Open(args[2], true); err == nil && erasable.Identity() != args[3] {
			err = erase.ErrReplaced
		}
		if err != nil {
			if remove := (*erase.RemoveError)(nil); errors.As(err, &remove) {
				err = remove.Err
			}
			a := failed(err)
			a.Kept = true
			release.answer(a)
			return 1
		}
	}
	if err := sandbox.Warden(remover.Alone()); err != nil {
		release.answer(failed(err))
		return 1
	}
	release.answer(answer{})
	time.AfterFunc(settled, sandbox.GiveBack)
	go answerReaders()
	go lookup.serve(func(q question) answer {
		switch {
		case q.Look != nil:
			facts, err := process.Look(q.PID, *q.Look)
			a := failed(err)
			a.Facts, a.Outside = facts, errors.Is(err, process.ErrOutside)
			return a
		case q.Tree != 0:
			return answer{Within: process.Descends(q.PID, q.Tree)}
		case q.Stat != nil:
			return answer{Shown: stat(q.Stat)}
		}
		return answer{Holds: process.HoldsOpen(q.PID, q.Inode)}
	})
	var one sync.Mutex
	release.serve(func(q question) answer {
		one.Lock()
		defer one.Unlock()
		if !q.Erase {
			return failed(remover.Remove())
		}
		if erasable == nil {
			return failed(errors.New("there is nothing to erase"))
		}
		err := erasable.Remove()
		a := failed(err)
		var left *erase.OverwriteError
		a.Gone = errors.As(err, &left)
		return a
	})
	// The serving process is gone. A mount that it left is dead and says so to
	// readers (ENOTCONN); an empty directory in its place would be a lie.
	return 0
}

// stat looks at paths below the parent directory and then lets go of that, for its
// filesystem could not be unmounted as long as it is open.
func stat(paths []string) []Shown {
	defer unix.Close(parentFD)
	all := make([]Shown, len(paths))
	for i, path := range paths {
		var st unix.Stat_t
		err := unix.Fstatat(parentFD, path, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err != nil && !errors.As(err, &all[i].Errno) {
			all[i].Errno = unix.EIO
		}
		all[i].Size, all[i].Mode = st.Size, st.Mode
	}
	return all
}

// An end is the warden's end of a channel.
type end struct {
	f  *os.File
	mu sync.Mutex
}

func (e *end) answer(a answer) {
	line, err := json.Marshal(a)
	if err != nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, err := e.f.Write(append(line, '\n')); err != nil {
		e.f.Close() // who waits for this answer must not wait for ever
	}
}

// serve answers questions, each in its own time, until the other end is gone.
func (e *end) serve(f func(question) answer) {
	for in := bufio.NewReader(e.f); ; {
		line, err := in.ReadBytes('\n')
		var q question
		if err != nil || json.Unmarshal(line, &q) != nil {
			return
		}
		go func() {
			a := f(q)
			a.ID = q.ID
			e.answer(a)
		}()
	}
}
