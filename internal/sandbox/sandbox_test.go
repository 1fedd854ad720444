package sandbox

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	seccomp "github.com/elastic/go-seccomp-bpf"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// TestMain is also the process that puts a sandbox on and then acts: `act WHO
// ACT DIR`.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "act" {
		os.Exit(actor(os.Args[2], os.Args[3], os.Args[4]))
	}
	code := m.Run()
	if dir, _ := actorBinary(); dir != "" {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

// who can put what on; none is the control.
var sandboxes = map[string]func(dir *os.File) error{
	"none":           func(*os.File) error { return nil },
	"server":         func(dir *os.File) error { _, err := Server(dir); return err },
	"server-file":    func(*os.File) error { _, err := Server(nil); return err },
	"decryptor":      func(*os.File) error { return Decryptor(false) },
	"decryptor-asks": func(*os.File) error { return Decryptor(true) },
	"warden":         func(*os.File) error { return Warden(true) },
	"warden-helped":  func(*os.File) error { return Warden(false) },
	"publisher":      Publisher,
	"publisher-http": func(*os.File) error { return Publisher(nil) },
}

func actor(who, what, dir string) int {
	d, err := os.Open(dir)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	names := strings.Split(what, ",")
	code := i386(names)
	if err := sandboxes[who](d); err != nil {
		fmt.Println("sandbox:", err)
		return 1
	}
	for _, name := range names {
		err := acts[name](d, code)
		var errno unix.Errno
		switch {
		case err == nil:
			fmt.Println(name, "ok")
		case errors.As(err, &errno):
			fmt.Println(name, unix.ErrnoName(errno))
		default:
			fmt.Println(name, err)
		}
	}
	return 0
}

// i386 makes a function that asks for the process id by the numbers of another
// machine: mov eax, 20; int 0x80; ret. A sandbox lets no code be made, so it is
// made before.
func i386(names []string) func() uintptr {
	if !slices.Contains(names, "i386") || runtime.GOARCH != "amd64" {
		return nil
	}
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|0x40 /* MAP_32BIT */)
	if err != nil {
		return nil
	}
	copy(page, []byte{0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xc3})
	if err := unix.Mprotect(page, unix.PROT_READ|unix.PROT_EXEC); err != nil {
		return nil
	}
	entry := unsafe.Pointer(unsafe.SliceData(page))
	pointer := &entry
	return *(*func() uintptr)(unsafe.Pointer(&pointer))
}

func call(number uintptr, args ...uintptr) error {
	var a [6]uintptr
	copy(a[:], args)
	if _, _, errno := unix.Syscall6(number, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
		return errno
	}
	return nil
}

func open(path string, flags int) error {
	fd, err := unix.Open(path, flags, 0o600)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

func socket(domain int) error {
	fd, err := unix.Socket(domain, unix.SOCK_STREAM, 0)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

type act = func(dir *os.File, code func() uintptr) error

// acts are what a process that was taken over would try.
var acts = map[string]act{
	"open":        func(*os.File, func() uintptr) error { return open("/etc/passwd", unix.O_RDONLY) },
	"open-self":   func(*os.File, func() uintptr) error { return open("/proc/self/mem", unix.O_RDWR) },
	"open-dir":    func(*os.File, func() uintptr) error { return open("/", unix.O_RDONLY|unix.O_DIRECTORY) },
	"create":      func(d *os.File, _ func() uintptr) error { return open(d.Name()+"/new", unix.O_CREAT|unix.O_WRONLY) },
	"openat2":     func(*os.File, func() uintptr) error { return openat2(unix.AT_FDCWD, "/etc/passwd", unix.O_RDONLY) },
	"openat2-dir": func(*os.File, func() uintptr) error { return openat2(unix.AT_FDCWD, "/etc", unix.O_DIRECTORY) },
	"openat2-new": func(d *os.File, _ func() uintptr) error { return openat2(int(d.Fd()), "new", unix.O_CREAT|unix.O_RDWR) },
	"openat2-rw":  func(d *os.File, _ func() uintptr) error { return openat2(int(d.Fd()), "file", unix.O_RDWR) },
	"stat":        func(*os.File, func() uintptr) error { return unix.Stat("/etc/passwd", new(unix.Stat_t)) },
	"unlink":      func(d *os.File, _ func() uintptr) error { return unix.Unlink(d.Name() + "/unlink") },
	"rename":      func(d *os.File, _ func() uintptr) error { return unix.Rename(d.Name()+"/rename", d.Name()+"/other") },
	"chmod":       func(d *os.File, _ func() uintptr) error { return unix.Chmod(d.Name()+"/file", 0o777) },
	"truncate":    func(d *os.File, _ func() uintptr) error { return unix.Truncate(d.Name()+"/file", 0) },
	"chdir":       func(*os.File, func() uintptr) error { return unix.Chdir("/") },
	"socket":      func(*os.File, func() uintptr) error { return socket(unix.AF_INET) },
	"socket-unix": func(*os.File, func() uintptr) error { return socket(unix.AF_UNIX) },
	"socketpair": func(*os.File, func() uintptr) error {
		_, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		return err
	},
	"exec": func(*os.File, func() uintptr) error {
		return unix.Exec("/bin/echo", []string{"echo", "exec", "ok"}, nil)
	},
	"fork": func(*os.File, func() uintptr) error { return fork(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0) },
	"fork-3": func(*os.File, func() uintptr) error {
		a := [8]uint64{4: uint64(unix.SIGCHLD)}
		return fork(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&a)), 64)
	},
	"ptrace":     func(*os.File, func() uintptr) error { return nobody(call(unix.SYS_PTRACE, unix.PTRACE_CONT, 1<<30)) },
	"vm-read":    func(*os.File, func() uintptr) error { return vmRead() },
	"kill":       func(*os.File, func() uintptr) error { return unix.Kill(os.Getppid(), 0) },
	"tgkill":     func(*os.File, func() uintptr) error { return unix.Tgkill(parent, parent, 0) },
	"pidfd":      func(*os.File, func() uintptr) error { _, err := unix.PidfdOpen(parent, 0); return err },
	"code":       func(*os.File, func() uintptr) error { return code() },
	"code-later": func(*os.File, func() uintptr) error { return codeLater() },
	"io-uring": func(*os.File, func() uintptr) error {
		var p [120]byte
		return call(unix.SYS_IO_URING_SETUP, 4, uintptr(unsafe.Pointer(&p)))
	},
	"userfaultfd": func(*os.File, func() uintptr) error { return call(unix.SYS_USERFAULTFD, 1 /* UFFD_USER_MODE_ONLY */) },
	"memfd":       func(*os.File, func() uintptr) error { _, err := unix.MemfdCreate("x", 0); return err },
	"keyctl": func(*os.File, func() uintptr) error {
		_, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_PROCESS_KEYRING, true)
		return err
	},
	"unshare":      func(*os.File, func() uintptr) error { return call(unix.SYS_UNSHARE, unix.CLONE_FS) },
	"dumpable":     func(*os.File, func() uintptr) error { return unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0) },
	"core-limit":   func(*os.File, func() uintptr) error { return unix.Prlimit(0, unix.RLIMIT_CORE, &unix.Rlimit{}, nil) },
	"type-ahead":   func(d *os.File, _ func() uintptr) error { return ioctl(unix.TIOCSTI) },
	"terminal":     func(d *os.File, _ func() uintptr) error { return ioctl(unix.TCGETS) },
	"x32":          func(*os.File, func() uintptr) error { return call(0x40000000 | 39) },
	"i386":         func(_ *os.File, f func() uintptr) error { return viaI386(f) },
	"go-on":        func(*os.File, func() uintptr) error { return goOn() },
	"read-under":   func(d *os.File, _ func() uintptr) error { return openat2(int(d.Fd()), "file", unix.O_RDONLY) },
	"wait-on-line": func(*os.File, func() uintptr) error { return waitOnLine() },
}

// parent is looked up before any sandbox.
var parent = os.Getppid()

func openat2(dir int, path string, flags uint64) error {
	how := unix.OpenHow{Flags: flags, Mode: 0}
	if flags&unix.O_CREAT != 0 {
		how.Mode = 0o600
	}
	fd, err := unix.Openat2(dir, path, &how)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// fork makes a process, which ends at once.
func fork(number, a, b uintptr) error {
	pid, _, errno := unix.RawSyscall6(number, a, b, 0, 0, 0, 0)
	if errno != 0 {
		return errno
	}
	if pid == 0 {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
	return nil
}

func vmRead() error {
	var from, to [8]byte
	local := []unix.Iovec{{Base: &to[0], Len: 8}}
	remote := []unix.RemoteIovec{{Base: uintptr(unsafe.Pointer(&from)), Len: 8}}
	_, err := unix.ProcessVMReadv(os.Getpid(), local, remote, 0)
	return err
}

func code() error {
	_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	return err
}

func codeLater() error {
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("plain memory: %v", err)
	}
	return unix.Mprotect(page, unix.PROT_READ|unix.PROT_EXEC)
}

// ioctl on what is no terminal fails with ENOTTY, if the kernel gets to see it.
func ioctl(request uintptr) error {
	var b [64]byte
	if err := call(unix.SYS_IOCTL, 0, request, uintptr(unsafe.Pointer(&b))); err != unix.ENOTTY {
		return err
	}
	return nil
}

// nobody takes "no such process" for an answer.
func nobody(err error) error {
	if err == unix.ESRCH {
		return nil
	}
	return err
}

func viaI386(f func() uintptr) error {
	if f == nil {
		return errors.New("no code")
	}
	runtime.LockOSThread()
	if got := int64(int32(f())); got != int64(os.Getpid()) {
		return unix.Errno(-got)
	}
	return nil
}

// goOn is what a Go program does all the time: it allocates, collects, starts
// threads, waits, and talks through a pipe.
func goOn() error {
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			runtime.LockOSThread()
			b := make([]byte, 4<<20)
			for i := range b {
				b[i] = byte(i)
			}
			<-time.After(time.Millisecond)
		})
	}
	wg.Wait()
	runtime.GC()
	return nil
}

// waitOnLine tells that the sandbox is on and stays until its input ends.
func waitOnLine() error {
	fmt.Println("waiting")
	bufio.NewReader(os.Stdin).ReadString('\n')
	return nil
}

// actorBinary is this test binary without C, as the product is: threads that C
// made would not be reached.
var actorBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "oncefs-actor-")
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "test", "-c", "-o", dir+"/actor", ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return dir, fmt.Errorf("build: %w\n%s", err, out)
	}
	return dir, nil
})

func actCommand(t *testing.T, who, what string) *exec.Cmd {
	t.Helper()
	bin, err := actorBinary()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, name := range []string{"file", "unlink", "rename"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return exec.Command(bin+"/actor", "act", who, what, dir)
}

// run puts a sandbox on a process, makes it act, and returns what came of each
// act; where a signal ended it, that is what came of the rest.
func run(t *testing.T, who string, what ...string) map[string]string {
	t.Helper()
	cmd := actCommand(t, who, strings.Join(what, ","))
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	got := map[string]string{}
	for line := range strings.Lines(string(out)) {
		name, result, _ := strings.Cut(strings.TrimSpace(line), " ")
		got[name] = result
	}
	for _, name := range what {
		if got[name] != "" {
			continue
		}
		if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
			got[name] = ws.Signal().String()
		} else {
			got[name] = fmt.Sprintf("status %d, %.60q", ws.ExitStatus(), out)
		}
	}
	return got
}

func needLayers(t *testing.T) {
	t.Helper()
	version, err := ll.LandlockGetABIVersion()
	if !seccomp.Supported() || err != nil || version < 1 {
		t.Skip("SKIPPED: this kernel has no seccomp or no Landlock")
	}
}

// escapes are the acts that no process of ours has a use for, with the exception
// of those that a test names.
func escapes() (all []string) {
	for name := range acts {
		if !slices.Contains([]string{"go-on", "read-under", "wait-on-line", "terminal", "exec", "i386"}, name) {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	return all
}

// all makes every act, those that may be the process's last in one of its own.
func all(t *testing.T, who string) map[string]string {
	t.Helper()
	got := run(t, who, append(escapes(), "go-on", "read-under", "exec")...)
	if run(t, "none", "i386")["i386"] == "ok" {
		got["i386"] = run(t, who, "i386")["i386"]
	} else {
		t.Log("this kernel takes no calls by the numbers of i386 at all")
	}
	return got
}

func wants(t *testing.T, who string, got map[string]string, want func(what string) string) {
	t.Helper()
	for what, result := range got {
		if want := want(what); result != want {
			t.Errorf("%s: %s: %s, want %s", who, what, result, want)
		}
	}
}

// Without a sandbox every act works, so that a refusal means something.
func TestM4_ControlCanDoAll(t *testing.T) {
	wants(t, "none", all(t, "none"), func(what string) string {
		if what == "x32" {
			return "ENOSYS" // unless the kernel is built with it
		}
		return "ok"
	})
}

func TestM4_ServerCanDoNothingElse(t *testing.T) {
	needLayers(t)
	for _, who := range []string{"server", "server-file"} {
		wants(t, who, all(t, who), func(what string) string {
			switch {
			case what == "go-on", what == "read-under" && who == "server":
				return "ok"
			case who == "server" && strings.HasPrefix(what, "openat2"):
				return "EACCES" // Landlock: the call as such is needed
			case what == "x32":
				return "ENOSYS"
			}
			return "EPERM" // over a file there is nothing under the mount
		})
	}
}

func TestM4_DecryptorDies(t *testing.T) {
	needLayers(t)
	for _, what := range append(escapes(), "exec", "read-under", "terminal") {
		want := unix.SIGSYS.String()
		if what == "x32" {
			want = "ENOSYS"
		}
		if got := run(t, "decryptor", what)[what]; got != want {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
	}
	for what, want := range map[string]string{"terminal": "ok", "type-ahead": unix.SIGSYS.String(), "open": unix.SIGSYS.String()} {
		if got := run(t, "decryptor-asks", what)[what]; got != want {
			t.Errorf("that asks at a terminal: %s: %s, want %s", what, got, want)
		}
	}
	if got := run(t, "decryptor", "go-on")["go-on"]; got != "ok" {
		t.Errorf("it cannot go on: %s", got)
	}
}

// The warden keeps what unmounting, removing and looking up take.
func TestM4_WardenGivesUpTheRest(t *testing.T) {
	needLayers(t)
	keeps := []string{"open", "open-self", "open-dir", "create", "openat2", "openat2-dir", "openat2-new", "openat2-rw", "stat", "unlink", "rename", "chmod", "truncate", "chdir",
		"kill", "pidfd", "core-limit", "type-ahead", "go-on", "read-under"}
	wants(t, "warden", all(t, "warden"), func(what string) string {
		switch {
		case slices.Contains(keeps, what):
			return "ok"
		case what == "x32":
			return "ENOSYS"
		}
		return "EPERM"
	})
	// A helper must be able to start, with its privilege.
	if got := run(t, "warden-helped", "exec")["exec"]; got != "ok" {
		t.Errorf("fusermount3 could not be started: %s", got)
	}
}

// What speaks to the network has files in one directory, if any.
func TestM4_PublisherGivesUpTheRest(t *testing.T) {
	needLayers(t)
	keeps := []string{"create", "unlink", "rename", "go-on"}
	for _, who := range []string{"publisher", "publisher-http"} {
		wants(t, who, all(t, who), func(what string) string {
			switch {
			case what == "go-on", who == "publisher" && slices.Contains(keeps, what):
				return "ok"
			case who == "publisher" && slices.Contains([]string{"open", "open-self", "open-dir"}, what):
				return "EACCES" // Landlock: the call as such is needed
			case what == "x32":
				return "ENOSYS"
			}
			return "EPERM"
		})
	}
}

// What the kernel says of every thread.
func TestM4_TheKernelSaysSo(t *testing.T) {
	needLayers(t)
	zero := "0000000000000000"
	for who, want := range map[string]map[string]string{
		"none":          {"NoNewPrivs": "0", "Seccomp": "0"},
		"server":        {"NoNewPrivs": "1", "Seccomp": "2", "CapEff": zero, "CapPrm": zero, "CapInh": zero, "CapAmb": zero},
		"decryptor":     {"NoNewPrivs": "1", "Seccomp": "2", "CapEff": zero, "CapPrm": zero, "CapInh": zero, "CapAmb": zero},
		"warden":        {"NoNewPrivs": "1", "Seccomp": "2", "CapInh": zero, "CapAmb": zero},
		"warden-helped": {"NoNewPrivs": "0", "Seccomp": "0"},
	} {
		cmd := actCommand(t, who, "wait-on-line")
		in, _ := cmd.StdinPipe()
		out, _ := cmd.StdoutPipe()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if line, _ := bufio.NewReader(out).ReadString('\n'); line != "waiting\n" {
			t.Errorf("%s: %q", who, line)
		}
		threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", cmd.Process.Pid))
		if len(threads) == 0 {
			t.Errorf("%s: no threads", who)
		}
		for _, path := range threads {
			status := fields(t, path)
			for key, value := range want {
				if status[key] != value {
					t.Errorf("%s: %s is %s, want %s", who, key, status[key], value)
				}
			}
			if who == "warden" && os.Geteuid() == 0 && (status["CapEff"] == zero || status["CapEff"] == fields(t, "/proc/self/status")["CapEff"]) {
				t.Errorf("the warden's capabilities: %s", status["CapEff"])
			}
		}
		in.Close()
		cmd.Wait()
	}
}

func fields(t *testing.T, path string) map[string]string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		all[key] = strings.TrimSpace(value)
	}
	return all
}
