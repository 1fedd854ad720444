package attack

import (
	"cmp"
	"context"
	"fmt"
	"hash/fnv"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"oncefs/integration/rig"
)

// errnos are what each call may plausibly fail with, by its manual page; calls
// that are not here get the last line's.
var errnos = []struct {
	calls  string
	errnos []syscall.Errno
}{
	{"open openat", []syscall.Errno{unix.EACCES, unix.EMFILE, unix.ENOENT}},
	{"read:file read:standard pread64 readv", []syscall.Errno{unix.EIO, unix.EINTR}},
	{"read:pipe read:anon_inode", []syscall.Errno{unix.EINTR}},
	{"read:socket", []syscall.Errno{unix.ECONNRESET, unix.EINTR}},
	{"read:/dev", []syscall.Errno{unix.EINTR, unix.ENODEV, unix.EIO}},
	{"write:file write:/dev writev pwrite64", []syscall.Errno{unix.EIO, unix.ENOSPC, unix.EDQUOT}},
	{"write:standard", []syscall.Errno{unix.EIO, unix.ENOSPC, unix.EPIPE}},
	{"write:pipe write:anon_inode", []syscall.Errno{unix.EPIPE, unix.EINTR}},
	{"write:socket", []syscall.Errno{unix.EPIPE, unix.ENOBUFS}},
	{"close", []syscall.Errno{unix.EIO, unix.EINTR}},
	{"fsync", []syscall.Errno{unix.EIO, unix.ENOSPC}},
	{"ftruncate", []syscall.Errno{unix.EIO, unix.EFBIG, unix.ENOMEM}},
	{"mmap mremap brk madvise mprotect", []syscall.Errno{unix.ENOMEM, unix.EAGAIN}},
	{"munmap", []syscall.Errno{unix.ENOMEM}},
	{"memfd_secret", []syscall.Errno{unix.ENOSYS, unix.EMFILE}},
	{"clone clone3 fork vfork", []syscall.Errno{unix.EAGAIN, unix.ENOMEM}},
	{"execve", []syscall.Errno{unix.ENOENT, unix.EACCES, unix.ENOMEM}},
	{"mount", []syscall.Errno{unix.EPERM, unix.ENODEV, unix.EBUSY}},
	{"umount2", []syscall.Errno{unix.EPERM, unix.EINVAL, unix.EBUSY}},
	{"unlink unlinkat rmdir", []syscall.Errno{unix.EACCES, unix.EROFS, unix.EIO}},
	{"rename renameat renameat2", []syscall.Errno{unix.EACCES, unix.ENOSPC, unix.EIO}},
	{"symlink symlinkat mkdirat", []syscall.Errno{unix.EACCES, unix.ENOSPC, unix.EEXIST}},
	{"splice tee", []syscall.Errno{unix.EINVAL, unix.EIO, unix.ENOENT}},
	{"pipe2 socketpair epoll_create1 eventfd2", []syscall.Errno{unix.EMFILE, unix.ENFILE}},
	{"prctl seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self", []syscall.Errno{unix.EINVAL, unix.EPERM, unix.ENOMEM}},
	{"capset capget setrlimit prlimit64", []syscall.Errno{unix.EPERM}},
	{"fcntl", []syscall.Errno{unix.EPERM, unix.EMFILE}},
	{"sendmsg recvmsg", []syscall.Errno{unix.ENOBUFS, unix.EMSGSIZE}},
	{"wait4 waitid", []syscall.Errno{unix.EINTR, unix.ECHILD}},
	{"fstat newfstatat lstat stat statx statfs fstatfs", []syscall.Errno{unix.EACCES, unix.EIO, unix.ENOENT}},
	{"faccessat faccessat2 access readlink readlinkat getdents64", []syscall.Errno{unix.EACCES, unix.ENOENT}},
	{"epoll_ctl", []syscall.Errno{unix.ENOSPC, unix.ENOMEM}},
	{"futex epoll_pwait epoll_wait nanosleep", []syscall.Errno{unix.EINTR}},
	{"fchmod fchown chmod", []syscall.Errno{unix.EPERM, unix.EROFS}},
	{"getrandom", []syscall.Errno{unix.EINTR, unix.ENOSYS}},
	{"tgkill", []syscall.Errno{unix.EAGAIN}},
	{"", []syscall.Errno{unix.EPERM, unix.ENOMEM}},
}

func errnosOf(call, on string) []syscall.Errno {
	if on != "" {
		call += ":" + on
	}
	for _, row := range errnos {
		if slices.Contains(strings.Fields(row.calls), call) {
			return row.errnos
		}
	}
	return errnos[len(errnos)-1].errnos
}

// infallible calls do not fail, or do not come back. (The Go runtime crashes where
// one fails that changes its signals, and in a process that cannot be signalled it
// hangs.)
var infallible = strings.Fields("rt_sigprocmask rt_sigaction sigaltstack exit exit_group rt_sigreturn getpid gettid getuid geteuid getgid getegid getppid umask sched_yield restart_syscall set_tid_address arch_prctl setitimer timer_settime timer_delete")

// An exclusion is a fault that is not tried, and why.
type exclusion struct {
	what, why string
	is        func(order) bool
}

var exclusions = []exclusion{
	{"a failing tgkill by which the Go runtime signals its own threads",
		"only real-time signals can be refused (tgkill(2)); the runtime sends one, to have every thread make a call, does not look, and would wait for ever: so it is sent once before, and that one is tried",
		func(o order) bool {
			return o.Call == "tgkill" && !o.Kill && !strings.Contains(o.Site, "sandbox.signalable")
		}},
	{"a lie: ENOENT for a reply that was waited for, or for a placeholder that is there, EPIPE for a command that reads",
		"the kernel says it where the reader was killed, the placeholder removed, the command is gone; then it is so, and those are tried by tests of their own",
		func(o order) bool {
			switch syscall.Errno(o.Errno) {
			case unix.ENOENT:
				return o.Call == "splice" && strings.Contains(o.Site, "secretmem.(*Pipe).send") || strings.Contains(o.Site, "isPlaceholder")
			case unix.EPIPE:
				return o.Role == "alarm" && o.On == "pipe"
			}
			return false
		}},
	{"a failing fstat of a temporary file that the library renameio has made",
		"it leaves the file, which is empty",
		func(o order) bool { return o.Call == "fstat" && strings.Contains(o.Site, "renameio") && !o.Kill }},
	{"a fault in a program that is not ours: the editor, the command, cat",
		"what fails there is its own affair; that it fails or is killed has tests of its own",
		func(o order) bool { return o.Site == "" }},
}

// orders are all faults of a scenario: for each call that a run without faults
// makes, at each line that makes it, each errno and the moment of death, at the
// first and the last time.
func (f *faults) orders() (all []order) {
	seen := map[sighting]int{}
	tr := f.try(order{})
	if len(tr.wrong) > 0 {
		f.t.Fatalf("%s without a fault: exit %d: %v\n%s", f.name, tr.code, tr.wrong, tr.stderr)
	}
	for _, s := range tr.rep.Seen {
		n := s.Count
		s.Count = 0
		seen[s] = max(seen[s], n)
	}
	for s, n := range seen {
		times := []int{1}
		if n > 1 {
			times = append(times, n)
		}
		for _, nth := range times {
			o := order{Role: s.Role, Call: s.Call, Site: s.Site, On: s.On, Own: s.Own, Nth: nth}
			o.Kill = true
			all = append(all, o)
			o.Kill = false
			if slices.Contains(infallible, s.Call) {
				continue
			}
			o.After = s.Call == "close" // it closes, whatever it says
			list := errnosOf(s.Call, s.On)
			if s.Call == "write" && strings.Contains(s.Site, "writeToKernel") {
				// The kernel takes every answer; that nobody waits for it any more is
				// all that it may say.
				o.After, list = true, []syscall.Errno{unix.ENOENT}
			}
			if s.Site == theRuntime || s.Site == "" {
				list = list[:1] // the runtime's own, and the loader's
			}
			for _, errno := range list {
				o.Errno = int(errno)
				all = append(all, o)
			}
		}
	}
	slices.SortFunc(all, func(a, b order) int { return strings.Compare(a.String(), b.String()) })
	return all
}

// place is a line of a process's source, and the call that it makes.
func (o order) place() order { return order{Role: o.Role, Call: o.Call, Site: o.Site} }

// kind is what two scenarios have in common that have the same call of the same line
// fail in the same way, the first time or a later one.
func (o order) kind() order {
	o.Nth, o.Own, o.After = min(o.Nth, 2), false, false
	return o
}

func (o order) fault() string {
	if o.Kill {
		return "SIGKILL"
	}
	return unix.ErrnoName(syscall.Errno(o.Errno))
}

func (o order) String() string {
	return fmt.Sprintf("%s %s number %d at %s: %s", o.Role, o.Call, o.Nth, o.Site, o.fault())
}

// deal puts the faults into the order in which they are tried while there is
// time: one of each place, then another of each, the runtime's own last. Which
// comes first is the seed's to say, and stays so when lines move.
func deal(all []order, seed uint64) []order {
	type ranked struct {
		order
		hash  uint64
		round int
	}
	var list []ranked
	for _, o := range all {
		still := o
		still.Site, _, _ = strings.Cut(o.Site, ":")
		h := fnv.New64a()
		fmt.Fprint(h, seed, still)
		list = append(list, ranked{order: o, hash: h.Sum64()})
	}
	slices.SortStableFunc(list, func(a, b ranked) int { return cmp.Compare(a.hash, b.hash) })
	taken := map[order]int{}
	for i, o := range list {
		list[i].round = taken[o.place()]
		if o.Site == theRuntime {
			list[i].round += 3
		}
		taken[o.place()]++
	}
	slices.SortStableFunc(list, func(a, b ranked) int { return cmp.Compare(a.round, b.round) })
	for i, r := range list {
		all[i] = r.order
	}
	return all
}

// attempt makes trials, several at a time, until all were made or the time is over.
func (f *faults) attempt(orders []order, limit time.Duration) (all []*trial) {
	var mu sync.Mutex
	queue := make(chan order)
	var wg sync.WaitGroup
	for range runtime.NumCPU() + 1 {
		wg.Go(func() {
			for o := range queue {
				tr := f.try(o)
				for _, w := range tr.wrong {
					f.t.Errorf("%s: %s: %s\n\twhere %s\n\tended %s, ready %v\n\tsaid %s", f.name, tr.order, w, tr.rep.Where, tr.rep.Ended, tr.ready, strings.TrimSpace(tr.stderr))
				}
				mu.Lock()
				all = append(all, tr)
				mu.Unlock()
			}
		})
	}
	end := time.Now().Add(limit)
	for _, o := range orders {
		if time.Now().After(end) {
			break
		}
		queue <- o
	}
	close(queue)
	wg.Wait()
	ended(f.t, f.bin)
	return all
}

// faultTable is calls × errors × outcomes.
func faultTable(all []*trial) string {
	classes := []string{unharmed, refused, told, gaveUp, wasKilled, notMet, "wrong"}
	rows := map[[2]string]map[string]int{}
	total := map[string]int{}
	for _, tr := range all {
		key := [2]string{tr.order.Call, tr.order.fault()}
		if rows[key] == nil {
			rows[key] = map[string]int{}
		}
		names := []string{tr.class()}
		if len(tr.wrong) > 0 {
			names = append(names, "wrong")
		}
		for _, name := range names {
			rows[key][name]++
			total[name]++
		}
	}
	var keys [][2]string
	for k := range rows {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b [2]string) int { return slices.Compare(a[:], b[:]) })
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	line := func(call, fault string, m map[string]int) {
		fmt.Fprintf(w, "%s\t%s\t", call, fault)
		for _, c := range classes {
			if m[c] == 0 {
				fmt.Fprint(w, ".\t")
			} else {
				fmt.Fprintf(w, "%d\t", m[c])
			}
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "CALL\tERROR\t%s\t\n", strings.ToUpper(strings.Join(classes, "\t")))
	for _, k := range keys {
		line(k[0], k[1], rows[k])
	}
	line("all", "", total)
	w.Flush()
	return b.String()
}

func places(orders []order) int {
	seen := map[order]bool{}
	for _, o := range orders {
		seen[o.place()] = true
	}
	return len(seen)
}

// Every system call that the program makes, from its start to its exit, fails
// once, and is once the moment of death. After each: no plaintext on a disk, no
// mount that is half alive, the encrypted file as it was, the passphrase file
// whole, or gone with the mount ready; and an error that says what failed, or
// everything done.
//
// What fails in the same way at the same line is tried in one scenario only. Where
// that is still more than there is time for, the seed says which are tried.
func TestFaults(t *testing.T) {
	rig.Root(t)
	if runtime.GOARCH != "amd64" {
		t.Skip("SKIPPED: the faulter knows the registers of x86-64 only")
	}
	rig.Need(t, "fusermount3", "fuse3")
	seed, limit := uint64(1), 15*time.Minute
	if testing.Short() {
		limit = 7 * time.Second
	}
	var err error
	if s := os.Getenv("ONCEFS_SEED"); s != "" {
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	if s := os.Getenv("ONCEFS_FAULT_TIME"); s != "" {
		if limit, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d, at most %s (others with ONCEFS_SEED=N, ONCEFS_FAULT_TIME=TIME)", seed, limit)
	var all []*trial
	var summary strings.Builder
	kinds := map[order]bool{} // that a scenario before had
	excluded := make([]int, len(exclusions))
	left, shares := limit, 0 // of the time for trials, and of who shares it
	due := slices.DeleteFunc(slices.Clone(scenarios), func(s *scenario) bool { return testing.Short() && !s.short })
	for _, s := range due {
		shares += s.share
	}
	for _, s := range due {
		t.Run(s.name, func(t *testing.T) {
			begin := time.Now()
			f := newFaults(t, s)
			orders := f.orders()
			orders = slices.DeleteFunc(orders, func(o order) bool {
				i := slices.IndexFunc(exclusions, func(e exclusion) bool { return e.is(o) })
				if i >= 0 {
					excluded[i]++
				}
				return i >= 0
			})
			met := len(orders)
			orders = slices.DeleteFunc(orders, func(o order) bool { return kinds[o.kind()] })
			for _, o := range orders {
				kinds[o.kind()] = true
			}
			n, at := len(orders), places(orders)
			orders = deal(orders, seed)
			mine, started := left*time.Duration(s.share)/time.Duration(shares), time.Now()
			done := f.attempt(orders, mine)
			left -= min(mine, time.Since(started)) // what is not needed is the others'
			shares -= s.share
			all = append(all, done...)
			fmt.Fprintf(&summary, "%s: %d of %d faults, at %d places, in %s; %d are those of a scenario above\n", s.name, len(done), n, at, time.Since(begin).Round(time.Second), met-n)
		})
	}
	for i, e := range exclusions {
		if excluded[i] > 0 {
			fmt.Fprintf(&summary, "not tried: %d × %s: %s\n", excluded[i], e.what, e.why)
		}
	}
	t.Logf("%d of %d faults: calls × errors × outcomes\n%s\n%s", len(all), len(kinds), faultTable(all), &summary)
}

// Where a user has too many signals waiting, a start fails and does not hang.
func TestFaults_NoRoomForSignals(t *testing.T) {
	rig.Root(t)
	d := rig.NewDir(t, []byte("secret"))
	ctx, cancel := context.WithTimeout(t.Context(), trialPatience)
	defer cancel()
	r := rig.Exec(t, exec.CommandContext(ctx, "prlimit", "--sigpending=0:0", rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass))
	if r.Code != 1 || !strings.Contains(r.Err, "RLIMIT_SIGPENDING") {
		t.Errorf("exit %d: %s", r.Code, r.Err)
	}
}

// Killed before any of its answers, the server ends, and whoever waits for the
// answer with it: a server that waited for itself could not.
func TestFaults_KilledBeforeEachAnswer(t *testing.T) {
	rig.Root(t)
	if runtime.GOARCH != "amd64" {
		t.Skip("SKIPPED: the faulter knows the registers of x86-64 only")
	}
	for _, s := range scenarios[:2] { // over a directory and over a file
		t.Run(s.name, func(t *testing.T) {
			f := newFaults(t, s)
			var answers []order
			for _, o := range f.orders() {
				if !o.Kill || o.Call != "write" || !strings.Contains(o.Site, "writeToKernel") {
					continue
				}
				for ; o.Nth > 0; o.Nth-- {
					if !slices.Contains(answers, o) {
						answers = append(answers, o)
					}
				}
			}
			if len(answers) < 5 {
				t.Fatalf("only %d answers were seen: %v", len(answers), answers)
			}
			for _, tr := range f.attempt(answers, time.Minute) {
				t.Logf("%v: %s", tr.order, tr.class())
			}
		})
	}
}
