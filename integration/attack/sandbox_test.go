package attack

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"text/tabwriter"

	"golang.org/x/sys/unix"

	"oncefs/integration/rig"
)

// An escape is what an intruder in a process of ours would try first.
type escape struct {
	name string
	do   func(in *injector) error
}

// escapes are made by system calls in the process itself. port is one that
// somebody listens at.
func escapes(port int) []escape {
	simple := func(number uintptr, args ...uintptr) func(*injector) error {
		return func(in *injector) error { _, err := in.call(number, args...); return err }
	}
	path := func(number uintptr, name string, at int, args ...uintptr) func(*injector) error {
		return func(in *injector) error {
			p, err := in.text(name)
			if err != nil {
				return err
			}
			args := slices.Clone(args)
			args[at] = p
			_, err = in.call(number, args...)
			return err
		}
	}
	cwd := int(unix.AT_FDCWD)
	at := uintptr(cwd)
	return []escape{
		{"openat /etc/passwd", path(unix.SYS_OPENAT, "/etc/passwd", 1, at, 0, unix.O_RDONLY)},
		{"openat /proc/self/mem", path(unix.SYS_OPENAT, "/proc/self/mem", 1, at, 0, unix.O_RDWR)},
		{"openat to write", path(unix.SYS_OPENAT, filepath.Join(os.TempDir(), rig.Prefix+"escaped"), 1, at, 0, unix.O_CREAT|unix.O_WRONLY, 0o600)},
		{"openat2 /etc/passwd", func(in *injector) error {
			p, err := in.text("/etc/passwd")
			if err != nil {
				return err
			}
			how, err := in.text(strings.Repeat("\x00", unix.SizeofOpenHow))
			if err != nil {
				return err
			}
			_, err = in.call(unix.SYS_OPENAT2, at, p, how, unix.SizeofOpenHow)
			return err
		}},
		{"stat", func(in *injector) error {
			p, err := in.text("/etc/passwd")
			if err != nil {
				return err
			}
			_, err = in.call(unix.SYS_NEWFSTATAT, at, p, in.page+4096, 0)
			return err
		}},
		{"unlink", path(unix.SYS_UNLINK, "/nonexistent", 0, 0)},
		{"socket, inet", simple(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM, 0)},
		{"socket, unix", simple(unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_STREAM, 0)},
		{"connect", func(in *injector) error {
			fd, err := in.call(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			address, err := in.text(string([]byte{2, 0, byte(port >> 8), byte(port), 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0}))
			if err != nil {
				return err
			}
			_, err = in.call(unix.SYS_CONNECT, fd, address, 16)
			return err
		}},
		{"fork", func(in *injector) error {
			pid, err := in.call(unix.SYS_CLONE, uintptr(unix.CLONE_UNTRACED)|uintptr(unix.SIGCHLD))
			if err != nil {
				return err
			}
			// The copy stands behind the call with another program's registers: away
			// with it, if that is what it is.
			if statusOf(int(pid))["PPid"] != statusOf(in.tid)["Tgid"] {
				return fmt.Errorf("%d is no child of it", pid)
			}
			return unix.Kill(int(pid), unix.SIGKILL)
		}},
		{"ptrace", func(in *injector) error {
			// The process that it asks about does not exist, which is for the call to
			// say.
			_, err := in.call(unix.SYS_PTRACE, unix.PTRACE_CONT, 1<<30)
			if err == unix.ESRCH {
				return nil
			}
			return err
		}},
		{"process_vm_readv", simple(unix.SYS_PROCESS_VM_READV, uintptr(os.Getpid()), 0, 0, 0, 0, 0)},
		{"kill another", simple(unix.SYS_KILL, uintptr(os.Getpid()), 0)},
		{"memory to execute", simple(unix.SYS_MMAP, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, ^uintptr(0), 0)},
		{"io_uring_setup", func(in *injector) error {
			p, err := in.text(strings.Repeat("\x00", 128))
			if err != nil {
				return err
			}
			_, err = in.call(unix.SYS_IO_URING_SETUP, 4, p)
			return err
		}},
		{"userfaultfd", simple(unix.SYS_USERFAULTFD, 1)},
		{"memfd_create", path(unix.SYS_MEMFD_CREATE, "x", 0, 0, 0)},
		{"unshare", simple(unix.SYS_UNSHARE, unix.CLONE_FS)},
		{"prctl: dumpable again", simple(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 1, 0, 0, 0)},
		{"prlimit: cores again", func(in *injector) error {
			p, err := in.text(strings.Repeat("\xff", 16))
			if err != nil {
				return err
			}
			_, err = in.call(unix.SYS_PRLIMIT64, 0, unix.RLIMIT_CORE, p, 0)
			return err
		}},
		// Last, for what succeeds does not come back.
		{"execve", func(in *injector) error {
			p, err := in.text("/bin/true")
			if err != nil {
				return err
			}
			_, err = in.call(unix.SYS_EXECVE, p, 0, 0)
			if errors.Is(err, errExited) || errors.Is(err, errElsewhere) {
				return nil // another program runs there now
			}
			return err
		}},
	}
}

// escapeTable is escapes × processes.
type escapeTable map[string]map[string]string

func (e escapeTable) add(escape, who string, err error) string {
	result := "ok"
	var errno unix.Errno
	switch {
	case errors.Is(err, errDied):
		result = "died"
	case errors.As(err, &errno):
		result = unix.ErrnoName(errno)
	case err != nil:
		result = err.Error()
	}
	if e[escape] == nil {
		e[escape] = map[string]string{}
	}
	e[escape][who] = result
	return result
}

func (e escapeTable) String() string {
	whos := []string{"control", "server", "server over a file", "decryptor", "warden"}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "escape\t%s\n", strings.Join(whos, "\t"))
	for _, name := range slices.Sorted(maps.Keys(e)) {
		fmt.Fprint(w, name)
		for _, who := range whos {
			fmt.Fprintf(w, "\t%s", e[name][who])
		}
		fmt.Fprintln(w)
	}
	w.Flush()
	return b.String()
}

// System calls made by the processes themselves, as by an intruder in them: the
// server is refused them, the decryptor dies of them, the warden is refused all
// that its acts do not take. A process without a sandbox must be able to, or the
// test has shown nothing.
func TestM4_EscapesFail(t *testing.T) {
	rig.Root(t)
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	escaped := filepath.Join(os.TempDir(), rig.Prefix+"escaped")
	t.Cleanup(func() { os.Remove(escaped) })
	all := escapes(listener.Addr().(*net.TCPAddr).Port)
	table := escapeTable{}
	defer func() { t.Logf("escapes × processes:\n%s", table) }()

	// The control: the same acts in a process that gave up nothing. cat waits for
	// input in read(2).
	control := exec.Command("cat")
	control.Dir = tempDir(t, "") // it may leave a core: the acts end with another program's registers
	in, _ := control.StdinPipe()
	if err := control.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); control.Process.Kill(); control.Wait() }()
	for _, e := range all {
		var did error
		inject(t, control.Process.Pid, func(in *injector) { did = e.do(in) })
		want := "ok"
		if e.name == "unlink" {
			want = "ENOENT" // the kernel looked
		}
		if got := table.add(e.name, "control", did); got != want {
			t.Fatalf("control: %s: %s: the injector does not work, or the act is none", e.name, got)
		}
	}
	os.Remove(escaped)

	refused := func(who string, pid int, may ...string) {
		t.Helper()
		for _, e := range all {
			var did error
			inject(t, pid, func(in *injector) { did = e.do(in) })
			got := table.add(e.name, who, did)
			// By the filter; where that must let files below a directory through, by
			// Landlock. Each has to hold alone.
			want := "EPERM"
			if who == "server" && e.name == "openat2 /etc/passwd" {
				want = "EACCES"
			}
			if got != want && !slices.Contains(may, e.name) {
				t.Errorf("%s: %s: %s, want %s", who, e.name, got, want)
			}
		}
		if _, err := os.Lstat(escaped); err == nil && !slices.Contains(may, "openat to write") {
			t.Errorf("%s made a file", who)
		}
		os.Remove(escaped)
	}
	h := newTarget(t, "directory")
	server := h.m.Cmd.Process.Pid
	warden := rig.Child(server, "internal-warden")
	if warden == 0 {
		t.Fatal("no warden")
	}
	refused("server", server)
	refused("warden", warden, "openat /etc/passwd", "openat /proc/self/mem", "openat to write", "openat2 /etc/passwd", "stat", "unlink", "kill another", "prlimit: cores again")
	// Neither was harmed by it.
	h.whole()
	h.gone()
	h.stops()

	f := newTarget(t, "file")
	refused("server over a file", f.m.Cmd.Process.Pid)
	f.whole()
	f.m.Wait()

	// The decryptor waits for its passphrase, from a pipe.
	for _, e := range all {
		d := rig.NewDir(t, []byte("content"))
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", "/dev/fd/3")
		cmd.ExtraFiles = []*os.File{r}
		m := rig.Start(t, cmd, d.Conf)
		pid := waitForFilter(t, m)
		var did error
		inject(t, pid, func(in *injector) { did = e.do(in) })
		if got := table.add(e.name, "decryptor", did); got != "died" {
			t.Errorf("decryptor: %s: %s", e.name, got)
		}
		// The thread dies of it when it gets to run, and all others with it: until then
		// they could go on.
		rig.WaitFor(t, "the decryptor's end", func() bool { return rig.Child(m.Cmd.Process.Pid, "internal-decryptor") == 0 })
		io.WriteString(w, rig.Passphrase+"\n")
		w.Close()
		r.Close()
		// The decrypting process died; nothing was mounted.
		if end := m.Wait(); end.Code != 52 || rig.Mounted(t, d.Conf) {
			t.Errorf("decryptor: %s: the mount ended with %+v", e.name, end)
		}
		if testing.Short() {
			break
		}
	}
	os.Remove(escaped)
}

// waitForFilter waits until the decryptor has put its sandbox on and waits for
// the passphrase.
func waitForFilter(t *testing.T, m *rig.Mount) (pid int) {
	t.Helper()
	rig.WaitFor(t, "the decryptor", func() bool {
		pid = rig.Child(m.Cmd.Process.Pid, "internal-decryptor")
		return pid != 0 && statusOf(pid)["Seccomp"] == "2"
	})
	return pid
}

// statusOf is /proc/PID/status; of a thread, /proc/TID/status.
func statusOf(pid int) map[string]string {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	all := map[string]string{}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		all[key] = strings.TrimSpace(value)
	}
	return all
}

// What the kernel says of each process and each of its threads: no core, no
// capability beyond need, no new privileges, a filter; and its files in /proc
// belong to root, whoever runs it, which is what not being dumpable looks like.
func TestM4_TheKernelSaysSo(t *testing.T) {
	rig.Root(t)
	for _, who := range []string{"root", "nobody"} {
		t.Run(who, func(t *testing.T) {
			d := rig.NewDir(t, []byte("content"))
			cmd := exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass)
			if who == "nobody" {
				if st, err := os.Stat("/dev/fuse"); err != nil || st.Mode()&0o006 != 0o006 {
					t.Skip("SKIPPED: /dev/fuse is for root only on this machine")
				}
				rig.Need(t, "fusermount3", "fuse3")
				for _, path := range []string{d.Path, d.Conf, d.Enc, d.Pass} {
					os.Chown(path, 65534, 65534)
				}
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			}
			m := rig.Start(t, cmd, d.Conf)
			m.WaitReady()
			server := cmd.Process.Pid
			warden := rig.Child(server, "internal-warden")
			if warden == 0 {
				t.Fatal("no warden")
			}
			zero := "0000000000000000"
			for name, pid := range map[string]int{"server": server, "warden": warden} {
				limits, _ := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
				for line := range strings.Lines(string(limits)) {
					if strings.HasPrefix(line, "Max core file size") && !slices.Equal(strings.Fields(line)[4:6], []string{"0", "0"}) {
						t.Errorf("%s: %s", name, line)
					}
				}
				var st unix.Stat_t
				if err := unix.Stat(fmt.Sprintf("/proc/%d/environ", pid), &st); err != nil || st.Uid != 0 {
					t.Errorf("%s: /proc/PID/environ belongs to %d, %v: it can be dumped", name, st.Uid, err)
				}
				// The kernel's own word on traces by the same user.
				if who == "nobody" {
					peek := exec.Command("cat", fmt.Sprintf("/proc/%d/maps", pid))
					peek.SysProcAttr = cmd.SysProcAttr
					if r := rig.Exec(t, peek); r.Code == 0 {
						t.Errorf("%s: its own user reads its maps", name)
					}
				}
				tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
				if len(tasks) == 0 {
					t.Errorf("%s: no threads", name)
				}
				for _, task := range tasks {
					var tid int
					fmt.Sscan(task.Name(), &tid)
					status := statusOf(tid)
					want := map[string]string{"CapInh": zero, "CapAmb": zero, "NoNewPrivs": "1", "Seccomp": "2"}
					switch {
					case name == "server":
						want["CapEff"], want["CapPrm"] = zero, zero
					case who == "nobody":
						// fusermount3 must be started, and get its privilege.
						want["CapEff"], want["NoNewPrivs"], want["Seccomp"] = zero, "0", "0"
					default:
						// CAP_SYS_ADMIN, SYS_PTRACE, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER.
						want["CapEff"] = fmt.Sprintf("%016x", 1<<21|1<<19|1<<1|1<<2|1<<3)
					}
					for key, value := range want {
						if status[key] != value {
							t.Errorf("%s, thread %d: %s is %s, want %s", name, tid, key, status[key], value)
						}
					}
				}
			}
			// The status tells the same.
			if r := rig.Run(t, "status", d.Conf); !strings.Contains(r.Out, "sandbox undumpable noprivileges landlock seccomp") {
				t.Errorf("status: %+v", r)
			}
			// A crash leaves no core anywhere near.
			m.Signal(syscall.SIGQUIT)
			m.Wait()
			if cores, _ := filepath.Glob(filepath.Join(d.Path, "*core*")); len(cores) > 0 {
				t.Errorf("cores: %v", cores)
			}
		})
	}
}
