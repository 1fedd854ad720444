package attack

import (
	"bytes"
	"debug/elf"
	"debug/gosym"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

// A faulter runs a program and all its children under ptrace(2), names each
// system call by the process that makes it and the line of the source that it
// comes from, and makes one of them fail, or the moment of SIGKILL.
//
// It does what `strace -f -e inject=` does, with two differences that matter
// here. strace counts calls per thread, and a goroutine is now on this thread and
// now on that, so "the second openat" would be another one in each run; a line
// of the source is the same one always. And strace replaces the call by one that
// does not exist, which the decryptor's seccomp filter answers with death before
// the error is seen; here it is replaced by getpid.
type order struct {
	Role  string `json:"role,omitempty"` // of the process that is hit; "" only lists
	Call  string `json:"call,omitempty"`
	Site  string `json:"site,omitempty"`
	On    string `json:"on,omitempty"`    // for read and write, what kind of file
	Own   bool   `json:"own,omitempty"`   // the Go runtime makes it by itself, and may give up if it fails
	Nth   int    `json:"nth,omitempty"`   // occurrence at that site, counted from 1
	Errno int    `json:"errno,omitempty"` // what it returns
	Kill  bool   `json:"kill,omitempty"`  // instead: the process is killed before the call
	After bool   `json:"after,omitempty"` // the call is made, and then said to have failed
}

// A sighting is a call at a site, and how often it was made.
type sighting struct {
	Role  string `json:"role"`
	Call  string `json:"call"`
	Site  string `json:"site"`
	On    string `json:"on,omitempty"`
	Own   bool   `json:"own"`
	Count int    `json:"count"`
}

// A report is what the faulter has seen.
type report struct {
	Hit     bool       `json:"hit"`   // the order was carried out
	Where   string     `json:"where"` // with the calling functions
	Ended   string     `json:"ended"` // how the first process did
	Seen    []sighting `json:"seen,omitempty"`
	Problem string     `json:"problem,omitempty"`
}

// faultMain is that process: `fault REPORT ORDER -- PROGRAM ARGUMENTS`.
func faultMain(args []string) int {
	runtime.LockOSThread() // ptrace is per thread
	var rep report
	in := &faulter{to: args[0], dir: filepath.Dir(args[3]), rep: &rep, lines: map[string]*gosym.Table{}, tracees: map[int]*tracee{}, groups: map[int]*group{}, seen: map[sighting]int{}}
	err := json.Unmarshal([]byte(args[1]), &in.order)
	code := 125
	if err == nil {
		code, err = in.run(args[3:])
	}
	if err != nil {
		rep.Problem = err.Error()
	}
	for s, n := range in.seen {
		s.Count = n
		rep.Seen = append(rep.Seen, s)
	}
	in.save()
	return code
}

// save writes the report.
func (in *faulter) save() {
	if b, err := json.Marshal(in.rep); err == nil {
		os.WriteFile(in.to, b, 0o600)
	}
}

type faulter struct {
	order   order
	to      string // file for the report
	rep     *report
	dir     string                  // of the programs that are under test
	lines   map[string]*gosym.Table // of those that were met, by path
	tracees map[int]*tracee         // by thread
	groups  map[int]*group          // by process
	seen    map[sighting]int
	count   int          // occurrences of what is ordered
	daemon  atomic.Int64 // the process that SIGTERM is passed on to
}

// A group is the threads of one process.
type group struct {
	role  string
	lines *gosym.Table // of what it runs; nil for a program that is not ours
}

type tracee struct {
	tgid  int
	errno int // to be returned at the exit; 0 for none
}

// ours are the lines of a program that is under test, read when it is first met; nil
// for any other.
func (in *faulter) ours(exe string) *gosym.Table {
	if filepath.Dir(exe) != in.dir {
		return nil
	}
	if in.lines[exe] == nil {
		table, err := linesOf(exe)
		if err != nil {
			in.rep.Problem = err.Error()
			return nil
		}
		in.lines[exe] = table
	}
	return in.lines[exe]
}

func linesOf(program string) (*gosym.Table, error) {
	f, err := elf.Open(program)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	table, text := f.Section(".gopclntab"), f.Section(".text")
	if table == nil || text == nil {
		return nil, fmt.Errorf("%s has no line table", program)
	}
	b, err := table.Data()
	if err != nil {
		return nil, err
	}
	return gosym.NewTable(nil, gosym.NewLineTable(b, text.Addr))
}

const traceOptions = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK |
	unix.PTRACE_O_TRACEEXEC | unix.PTRACE_O_EXITKILL

func (in *faulter) run(args []string) (code int, err error) {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		return 125, err
	}
	first := cmd.Process.Pid
	// It stops at its own exec.
	var ws unix.WaitStatus
	if _, err := unix.Wait4(first, &ws, unix.WALL, nil); err != nil {
		return 125, err
	}
	if err := unix.PtraceSetOptions(first, traceOptions); err != nil {
		return 125, err
	}
	in.groups[first] = &group{}
	in.executed(first)
	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, unix.SIGTERM)
	go func() {
		for range terminate {
			if pid := in.daemon.Load(); pid > 1 {
				unix.Kill(int(pid), unix.SIGTERM)
			}
		}
	}()
	in.tracees[first] = &tracee{tgid: first}
	if err := in.resume(first, 0); err != nil {
		return 125, err
	}
	early := map[int]bool{} // threads that stopped before we heard of them
	code = 125
	for {
		pid, err := unix.Wait4(-1, &ws, unix.WALL, nil)
		if err == unix.EINTR {
			continue
		}
		if err == unix.ECHILD {
			return code, nil
		}
		if err != nil {
			return code, err
		}
		switch {
		case ws.Exited() || ws.Signaled():
			if pid == first {
				code = ws.ExitStatus()
				in.rep.Ended = fmt.Sprintf("exit %d", code)
				if ws.Signaled() {
					code = 128 + int(ws.Signal())
					in.rep.Ended = "signal " + unix.SignalName(ws.Signal())
				}
			}
			delete(in.tracees, pid)
		case !ws.Stopped():
		case in.tracees[pid] == nil:
			early[pid] = true // its parent's stop tells who it is
		default:
			signal, err := in.stopped(pid, ws, early)
			if err == nil {
				err = in.resume(pid, signal)
			}
			if err != nil && err != unix.ESRCH { // ESRCH: killed meanwhile
				return code, fmt.Errorf("thread %d: %w", pid, err)
			}
		}
	}
}

// stopped deals with one stop and returns the signal to go on with.
func (in *faulter) stopped(pid int, ws unix.WaitStatus, early map[int]bool) (signal int, err error) {
	t := in.tracees[pid]
	switch sig := ws.StopSignal(); {
	case sig == unix.SIGTRAP|0x80:
		return 0, in.syscallStop(pid, t)
	case sig == unix.SIGTRAP && ws.TrapCause() > 0:
		switch ws.TrapCause() {
		case unix.PTRACE_EVENT_CLONE, unix.PTRACE_EVENT_FORK, unix.PTRACE_EVENT_VFORK:
			msg, err := unix.PtraceGetEventMsg(pid)
			if err != nil {
				return 0, err
			}
			child := int(msg)
			nt := &tracee{tgid: tgidOf(child)}
			if nt.tgid == 0 {
				nt.tgid = t.tgid // gone already
			}
			in.tracees[child] = nt
			if in.groups[nt.tgid] == nil {
				g := *in.groups[t.tgid]
				// Until it runs its own program it is a copy of its parent.
				g.role = strings.TrimSuffix(g.role, "'s fork") + "'s fork"
				in.groups[nt.tgid] = &g
			}
			if early[child] {
				delete(early, child)
				return 0, ignoreGone(in.resume(child, 0))
			}
		case unix.PTRACE_EVENT_EXEC:
			in.executed(t.tgid)
			// The other threads are gone, and this one has the process's number.
			if msg, err := unix.PtraceGetEventMsg(pid); err == nil && int(msg) != pid {
				delete(in.tracees, int(msg))
			}
		}
		return 0, nil
	case sig == unix.SIGSTOP || sig == unix.SIGTRAP:
		// The first stop of a new thread, or the trap of an exec.
		return 0, nil
	default:
		return int(sig), nil
	}
}

// resume goes on with a thread: to its next system call if that may be the one
// that is ordered.
func (in *faulter) resume(pid, signal int) error {
	t := in.tracees[pid]
	if in.order.Role == "" || t.errno != 0 || !in.rep.Hit && in.groups[t.tgid].role == in.order.Role {
		return unix.PtraceSyscall(pid, signal)
	}
	return unix.PtraceCont(pid, signal)
}

func ignoreGone(err error) error {
	if err == unix.ESRCH {
		return nil
	}
	return err
}

func tgidOf(pid int) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, rest, _ := bytes.Cut(b, []byte("\nTgid:\t"))
	n := 0
	fmt.Sscanf(string(rest), "%d", &n)
	return n
}

// executed gives a process its role by what it runs now.
func (in *faulter) executed(pid int) {
	exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	args := strings.Split(string(line), "\x00")
	g := in.groups[pid]
	g.lines = in.ours(exe)
	switch {
	case g.lines == nil || filepath.Base(args[0]) == "fusermount3":
		g.role = "helper"
	case filepath.Base(exe) == publisherName:
		g.role = metricsRole
	case len(args) < 2:
		g.role = "oncefs"
	case args[1] == "internal-edit":
		g.role = "workshop"
	case strings.HasPrefix(args[1], "internal-"):
		g.role = strings.TrimPrefix(args[1], "internal-")
	case len(args) > 2 && strings.HasPrefix(args[2], "--role="):
		g.role = strings.TrimPrefix(args[2], "--role=")
	case slices.Contains(args, "--background"):
		g.role = "launcher"
	case args[1] == "mount":
		g.role = daemonRole
		in.daemon.Store(int64(pid))
	default:
		g.role = args[1]
	}
}

const (
	daemonRole  = "daemon"  // serves
	metricsRole = "metrics" // shows the counters of one that does
)

func callName(number int) string {
	if name, ok := arch.X86_64.SyscallNumbers[number]; ok {
		return name
	}
	return fmt.Sprintf("syscall-%d", number)
}

func (in *faulter) syscallStop(pid int, t *tracee) error {
	// struct ptrace_syscall_info of linux/ptrace.h: u8 op, u32 arch at 4, u64
	// instruction and stack pointer, then for an entry u64 number, u64 arguments.
	var info [88]byte
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, ptraceGetSyscallInfo, uintptr(pid), uintptr(len(info)), uintptr(unsafe.Pointer(&info)), 0, 0); errno != 0 {
		return errno
	}
	const entry, exit = 1, 2
	switch info[0] {
	case entry:
		t.errno = 0
		return in.entry(pid, t, int(binary.NativeEndian.Uint64(info[24:])), binary.NativeEndian.Uint64(info[32:]), binary.NativeEndian.Uint64(info[16:]))
	case exit:
		if t.errno == 0 {
			return nil
		}
		var regs unix.PtraceRegs
		if err := unix.PtraceGetRegs(pid, &regs); err != nil {
			return err
		}
		regs.Rax = uint64(-int64(t.errno))
		t.errno = 0
		return unix.PtraceSetRegs(pid, &regs)
	}
	return nil
}

const ptraceGetSyscallInfo = 0x420e // linux/ptrace.h

func (in *faulter) entry(pid int, t *tracee, number int, fd, sp uint64) error {
	g := in.groups[t.tgid]
	call := callName(number)
	if in.order.Role != "" && (in.rep.Hit || call != in.order.Call || g.role != in.order.Role) {
		return nil
	}
	site, where := in.site(pid, call, g, sp)
	on := ""
	if call == "read" || call == "write" {
		on = kindOf(t.tgid, fd)
	}
	own := site == theRuntime || strings.HasPrefix(where, "runtime.")
	if in.order.Role == "" {
		in.seen[sighting{Role: g.role, Call: call, Site: site, On: on, Own: own}]++
		return nil
	}
	if site != in.order.Site || on != in.order.On || own != in.order.Own {
		return nil
	}
	if in.count++; in.count != in.order.Nth {
		return nil
	}
	in.rep.Hit, in.rep.Where = true, where
	in.save() // for what comes of it may be a hang
	if in.order.Kill {
		if t.tgid <= 1 {
			return fmt.Errorf("thread %d has no process", pid)
		}
		return unix.Kill(t.tgid, unix.SIGKILL)
	}
	t.errno = in.order.Errno
	if in.order.After {
		return nil
	}
	var regs unix.PtraceRegs
	if err := unix.PtraceGetRegs(pid, &regs); err != nil {
		return err
	}
	regs.Orig_rax = unix.SYS_GETPID // allowed by every filter
	return unix.PtraceSetRegs(pid, &regs)
}

// kindOf tells what a descriptor is: what can go wrong with it depends on that.
func kindOf(pid int, fd uint64) string {
	if fd <= 2 {
		return "standard" // anything, at its user's
	}
	to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd))
	for _, kind := range []string{"pipe", "socket", "anon_inode", "/dev"} {
		if strings.HasPrefix(to, kind) {
			return kind
		}
	}
	return "file"
}

// theRuntime is the site of calls that the Go runtime makes for itself.
const theRuntime = "runtime"

// runtimeCalls are the runtime's, whoever it was called by.
var runtimeCalls = strings.Fields("futex nanosleep clock_nanosleep rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack sched_yield sched_getaffinity gettid epoll_create1 eventfd2 epoll_pwait")

// site is where in the source a call comes from: the innermost line that is
// neither the runtime's nor a wrapper's. Frame pointers lead there. For programs
// that are not ours it is "".
func (in *faulter) site(pid int, call string, g *group, sp uint64) (site, where string) {
	if g.lines == nil {
		return "", ""
	}
	if slices.Contains(runtimeCalls, call) {
		return theRuntime, call
	}
	var regs unix.PtraceRegs
	if unix.PtraceGetRegs(pid, &regs) != nil {
		return "", ""
	}
	word := func(at uint64) (uint64, bool) {
		var b [8]byte
		n, err := unix.ProcessVMReadv(pid, []unix.Iovec{{Base: &b[0], Len: 8}}, []unix.RemoteIovec{{Base: uintptr(at), Len: 8}}, 0)
		return binary.NativeEndian.Uint64(b[:]), err == nil && n == 8
	}
	pc, ok := word(sp)
	frame := regs.Rbp
	for depth := 0; ok && depth < 40; depth++ {
		file, line, fn := g.lines.PCToLine(pc - 1)
		if fn == nil {
			break
		}
		if where != "" {
			where += " < "
		}
		where += fmt.Sprintf("%s:%d", fn.Name, line)
		if site == "" && !wrapper(fn.Name) {
			site = fmt.Sprintf("%s %s:%d", fn.Name, filepath.Base(file), line)
		}
		if pc, ok = word(frame + 8); ok {
			frame, ok = word(frame)
		}
		if frame == 0 {
			break
		}
	}
	if site == "" {
		site = theRuntime
	}
	return site, where
}

// wrapper tells functions that make calls for others.
func wrapper(name string) bool {
	for _, prefix := range []string{"runtime.", "runtime/", "syscall.", "internal/", "os.", "os/exec.", "os/signal.", "golang.org/x/sys/", "sync.", "io.", "io/fs.", "bufio.",
		"path/filepath.", "context.", "time.", "log.", "log/slog.", "fmt.", "net.", "reflect.", "encoding/", "strings.", "bytes.", "_rt0", "main.ignoring",
		"oncefs/internal/secretmem.ignoringEINTR"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}
