package attack

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"oncefs/integration/rig"
)

// A scan is one secret's way from its file to its end, with root looking on.
type scan struct {
	t          testing.TB
	d          *rig.Dir
	bin        string // under a name of its own, so that its processes can be told from others
	content    []byte
	passphrase string
	ix         *index
	since      time.Time
	counted    bool // what shows the counters was told of the mount
	table      *scanTable
}

// The needles' names. The canary is what every process that belongs to the
// mount does hold: a method that does not see it has seen nothing.
const (
	aSecret     = "secret"
	aPassphrase = "passphrase"
	aCanary     = "canary"
)

func newScan(t testing.TB, bin string, size int, table *scanTable) *scan {
	t.Helper()
	s := &scan{t: t, bin: bin, content: random(t, size), passphrase: randomPassphrase(t), since: started(), table: table}
	s.d = rig.NewDir(t, nil)
	os.Mkdir(filepath.Join(s.d.Path, "tmp"), 0o700)
	s.d.Write("secrets.yaml.enc", rig.GPG(t, s.content, s.passphrase, "--symmetric", "--s2k-count", "65536"))
	s.d.Write("pw", []byte(s.passphrase+"\n"))
	s.ix = newIndex(part{aSecret, s.content}, part{aPassphrase, []byte(s.passphrase)}, part{aCanary, []byte(s.d.Conf)})
	return s
}

// command is a mount, with a working directory of its own.
func (s *scan) command(args ...string) *exec.Cmd {
	cmd := exec.Command(s.bin, append([]string{"mount", s.d.Conf, "--enc", s.d.Enc, "--passphrase-file", s.d.Pass}, args...)...)
	cmd.Dir, cmd.Env = s.d.Path, s.env()
	return cmd
}

func (s *scan) env(more ...string) []string {
	return append(append(os.Environ(), "TMPDIR="+filepath.Join(s.d.Path, "tmp")), more...)
}

// looking says what to look at beside memory.
type looking struct {
	// core lets a debugger write a core instead of reading memory. That takes a
	// second for each process, and leaves it a gigabyte of pages that it had
	// reserved and never touched, so nothing else is done with it afterwards.
	core  bool
	still bool // nothing is on its way through a pipe
	files bool
}

// look searches every process, and what else there is, in one state.
func (s *scan) look(state string, l looking) {
	s.t.Helper()
	procs := processes(s.t, s.bin)
	for _, p := range procs {
		looks := s.memory(p)
		if l.core {
			looks = []look{s.ix.core(s.t, p.pid)}
		}
		for _, k := range looks {
			// The helper is another program, and the decryptor need not know
			// where the mount goes.
			knows := p.role == "daemon" || p.role == "warden" || p.role == "publisher" && s.counted
			if knows && k.failed == "" && k.found.of(aCanary) == 0 {
				k.failed = "it did not see the canary, so it would not see a secret"
			}
			s.judge(state, p.role, k)
		}
		for _, k := range s.ix.words(p.pid) {
			s.judge(state, p.role, k)
		}
		if l.still {
			s.judge(state, p.role, s.ix.descriptors(s.t, p.pid))
		}
	}
	if l.files {
		s.files(state, "")
	}
}

func (s *scan) memory(p process) []look {
	return []look{s.ix.procMem(p.pid), s.ix.processVM(p.pid)}
}

func (s *scan) files(state, except string) {
	s.t.Helper()
	// Its own place for temporary files is in there. All other places are looked
	// at in the end.
	s.judge(state, "", s.ix.files(s.t, "working directory", time.Time{}, except, s.d.Path))
	s.judge(state, "", s.ix.files(s.t, "/dev/shm", s.since, except, "/dev/shm"))
}

// said searches what the program wrote.
func (s *scan) said(state string, text ...string) {
	s.t.Helper()
	k := look{method: "output and log", found: hits{}}
	for _, x := range text {
		k.read += int64(len(x))
		s.ix.search([]byte(x), k.found)
	}
	s.judge(state, "", k)
}

// judge fails on any hit, but for the one process that decrypts: that it is
// seen there shows that it would be seen elsewhere.
func (s *scan) judge(state, role string, k look) {
	s.t.Helper()
	unspent := state == "mounting" || strings.HasPrefix(state, "ready") || strings.HasPrefix(state, "reading")
	if role == "decryptor" {
		state += " (the decryptor itself)"
	} else if role == "daemon" && unspent && !s.table.secretMemory && k.found.of(aPassphrase) == 0 {
		state += " (ordinary memory)"
	} else if n := k.found.of(aSecret) + k.found.of(aPassphrase); n > 0 {
		s.t.Errorf("%s, %d bytes: %s %s: %v", state, len(s.content), role, k.method, k.found)
	}
	if k.failed != "" {
		s.t.Errorf("%s, %d bytes: %s %s: %s", state, len(s.content), role, k.method, k.failed)
	}
	if k.unread != k.secret {
		// Everything but secret memory and the kernel's clock page can be read.
		if k.unread-k.secret > 16<<10 {
			s.t.Errorf("%s, %d bytes: %s %s: %d bytes that are not secret memory could not be read", state, len(s.content), role, k.method, k.unread-k.secret)
		}
	}
	// Nobody can see whether secret memory was zeroed, but all that it can be after
	// that is unmapped.
	if k.secret > 0 && (state == "spent" || state == "expired") {
		s.t.Errorf("%s, %d bytes: %s %s: %d bytes of secret memory are still there", state, len(s.content), role, k.method, k.secret)
	}
	if k.secret == 0 && role == "daemon" && unspent && state != "mounting" && (k.method == "/proc/PID/mem" || k.method == "process_vm_readv") && s.table.secretMemory {
		s.t.Errorf("%s, %d bytes: %s has no secret memory", state, len(s.content), k.method)
	}
	s.table.add(state, role, k)
}

// nothing shows that no process is left.
func (s *scan) nothing(state string) {
	s.t.Helper()
	ended(s.t, s.bin)
	s.table.add(state, "", look{method: "processes left: 0", found: hits{}})
}

func (s *scan) failedStarts() {
	s.t.Helper()
	fails := func(state string, code int) {
		s.t.Helper()
		r := rig.Exec(s.t, s.command())
		if r.Code != code {
			s.t.Errorf("%s: exit %d, want %d\n%s", state, r.Code, code, r.Err)
		}
		s.nothing(state)
		s.said(state, r.Out, r.Err)
		s.files(state, s.d.Pass)
	}
	whole, err := os.ReadFile(s.d.Enc)
	if err != nil {
		s.t.Fatal(err)
	}
	damaged := slices.Clone(whole)
	damaged[len(damaged)-1] ^= 1 // everything before it is decrypted first
	s.d.Write("secrets.yaml.enc", damaged)
	fails("failed: damaged file", 40)
	s.d.Write("secrets.yaml.enc", whole)
	good := s.passphrase
	s.passphrase = randomPassphrase(s.t)
	s.ix = newIndex(part{aSecret, s.content}, part{aPassphrase, []byte(s.passphrase)}, part{aCanary, []byte(s.d.Conf)})
	s.d.Write("pw", []byte(s.passphrase+"\n"))
	fails("failed: wrong passphrase", 31)
	s.passphrase = good
	s.ix = newIndex(part{aSecret, s.content}, part{aPassphrase, []byte(s.passphrase)}, part{aCanary, []byte(s.d.Conf)})
	s.d.Write("pw", []byte(s.passphrase+"\n"))
}

// slowly starts a mount that stands still twice: in the middle of decrypting,
// for the encrypted file is a pipe that is filled only in part, and before
// mounting, for the mount helper waits. It looks at both, and returns with the
// mount ready.
func (s *scan) slowly(args ...string) *rig.Mount {
	s.t.Helper()
	whole, err := os.ReadFile(s.d.Enc)
	if err != nil {
		s.t.Fatal(err)
	}
	dir := filepath.Join(s.d.Path, "slow")
	os.RemoveAll(dir) // of an earlier one
	os.Mkdir(dir, 0o700)
	fifo, gate := filepath.Join(dir, "secrets.yaml.enc"), filepath.Join(dir, "gate")
	for _, p := range []string{fifo, gate} {
		if err := syscall.Mkfifo(p, 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
	helper := filepath.Join(dir, "fusermount3")
	os.WriteFile(helper, fmt.Appendf(nil, "#!/bin/sh\nread -r go <%s\nexec %s \"$@\"\n", gate, rig.Need(s.t, "fusermount3", "fuse3")), 0o700)
	cmd := exec.Command(s.bin, append([]string{"mount", s.d.Conf, "--enc", fifo, "--passphrase-file", s.d.Pass}, args...)...)
	cmd.Dir = s.d.Path
	cmd.Env = s.env("PATH=" + dir + ":" + os.Getenv("PATH"))
	m := rig.Start(s.t, cmd, s.d.Conf)
	feed, err := os.OpenFile(fifo, os.O_WRONLY, 0) // waits for the daemon
	if err != nil {
		s.t.Fatal(err)
	}
	defer feed.Close()
	most := len(whole) - max(1, len(whole)/4)
	if _, err := feed.Write(whole[:most]); err != nil {
		s.t.Fatal(err)
	}
	role := func(role string) (pid int) {
		for _, p := range processes(s.t, s.bin) {
			if p.role == role {
				return p.pid
			}
		}
		return 0
	}
	rig.WaitFor(s.t, "somebody to have the passphrase", func() bool {
		return slices.ContainsFunc(processes(s.t, s.bin), func(p process) bool { return s.ix.procMem(p.pid).found.of(aPassphrase) > 0 })
	})
	s.look("decrypting", looking{})
	if _, err := feed.Write(whole[most:]); err != nil {
		s.t.Fatal(err)
	}
	feed.Close()
	rig.WaitFor(s.t, "the mount helper", func() bool { return role("helper") != 0 })
	// The passphrase file is still there, and open in both.
	s.look("mounting", looking{})
	if err := os.WriteFile(gate, []byte("go\n"), 0); err != nil {
		s.t.Fatal(err)
	}
	m.WaitReady()
	return m
}

// read reads the secret in some parts, and all the while root looks.
func (s *scan) read(path string, parts int) {
	s.t.Helper()
	reader := newSipper(s.t)
	reader.want("ok", "open "+path)
	passes := make(chan struct{})
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			for _, p := range processes(s.t, s.bin) {
				for _, k := range s.memory(p) {
					if k.failed == "" {
						s.judge("reading, all the while", p.role, k)
					}
				}
			}
			select {
			case passes <- struct{}{}:
			default:
			}
		}
	})
	chunk := (len(s.content) + parts - 1) / parts
	var read int
	for n := range parts {
		reader.do(fmt.Sprintf("read %d", chunk))
		read++
		<-passes // one that may have begun before
		if n == parts/2 {
			<-passes // one that began after the read
		}
	}
	reader.want("0", "cached")
	stop.Store(true)
	wg.Wait()
	s.look("reading, held open", looking{still: true})
	reader.want(sumOf(s.content), "close")
}

func (s *scan) run(full bool) {
	s.t.Helper()
	all := looking{still: true, files: true}
	s.failedStarts()
	var m *rig.Mount
	if len(s.content) <= 128<<10+1 { // what it is told does not grow with the secret
		counters := filepath.Join(s.d.Path, "counters")
		os.Mkdir(counters, 0o700)
		m = s.slowly("--metrics", "127.0.0.1:0", "--metrics-textfile", counters)
		rig.WaitFor(s.t, "the counters", func() bool {
			shown, _ := filepath.Glob(filepath.Join(counters, "*.prom"))
			return len(shown) == 1
		})
		s.counted = true
	} else {
		m = s.slowly()
	}
	s.look("ready", all)
	parts := 4
	if full {
		parts = 16
	}
	s.read(s.d.Secret(), parts)
	m.WaitEvent("delivery", 1)
	s.look("spent", all)
	if got := rig.Cat(s.t, s.d.Secret()); got.Code == 0 || got.Out != "" {
		s.t.Errorf("a second reader: %d bytes, exit %d", len(got.Out), got.Code)
	}
	m.WaitEvent("late", 1)
	if s.counted && !slices.ContainsFunc(processes(s.t, s.bin), func(p process) bool { return p.role == "publisher" }) {
		s.t.Error("what shows the counters was not there to be looked at")
	}
	r := m.Stop()
	s.counted = false
	s.nothing("ended")
	s.said("ended", r.Out, r.Err, fmt.Sprint(m.Events("")))
	s.files("ended", "")
}

// expires is a mount that nobody reads.
func (s *scan) expires(core bool) {
	s.t.Helper()
	s.d.Write("pw", []byte(s.passphrase+"\n"))
	m := rig.Start(s.t, s.command("--expire", "5s"), s.d.Conf)
	m.WaitReady()
	m.WaitEvent("expiry", 1)
	s.look("expired", looking{still: true, files: true})
	if core {
		s.look("expired", looking{core: true})
	}
	m.Stop()
	s.nothing("ended")
}

// cores is a mount that a debugger is attached to in each of its states.
func (s *scan) cores() {
	s.t.Helper()
	s.d.Write("pw", []byte(s.passphrase+"\n"))
	m := rig.Start(s.t, s.command(), s.d.Conf)
	m.WaitReady()
	s.look("ready", looking{core: true})
	r := newSipper(s.t)
	r.want("ok", "open "+s.d.Secret())
	r.do(fmt.Sprintf("read %d", len(s.content)/2))
	s.look("reading, held open", looking{core: true})
	r.do("close")
	m.WaitEvent("delivery", 1)
	s.look("spent", looking{core: true})
	m.Stop()
	s.nothing("ended")
}

// inBackground is a mount with a launcher and a log.
func (s *scan) inBackground() {
	s.t.Helper()
	s.d.Write("pw", []byte(s.passphrase+"\n"))
	log := filepath.Join(s.d.Path, "log")
	s.slowly("--background", "--log", log).Wait() // for the launcher to end
	s.look("ready, in the background", looking{still: true, files: true})
	s.read(s.d.Secret(), 2)
	if r := rig.Exec(s.t, exec.Command(s.bin, "umount", s.d.Conf)); r.Code != 0 {
		s.t.Errorf("umount: %+v", r)
	}
	s.nothing("ended")
	b, err := os.ReadFile(log)
	if err != nil || !strings.Contains(string(b), `"delivery"`) {
		s.t.Errorf("no log: %v %s", err, b)
	}
	s.said("ended", string(b))
}

// overAFile is a mount that goes with what it serves.
func (s *scan) overAFile() {
	s.t.Helper()
	s.d.Write("pw", []byte(s.passphrase+"\n"))
	cmd := exec.Command(s.bin, "mount", s.d.Secret(), "--enc", s.d.Enc, "--passphrase-file", s.d.Pass)
	cmd.Dir, cmd.Env = s.d.Path, s.env()
	m := rig.Start(s.t, cmd, s.d.Secret())
	m.WaitReady()
	s.look("ready, over a file", looking{still: true, files: true})
	s.read(s.d.Secret(), 2)
	m.Wait()
	s.nothing("ended")
}

// inABundle is a mount of an archive of two files, of which one is read. Nobody
// has either of them, or what else is in the archive.
func (s *scan) inABundle() {
	s.t.Helper()
	second, user := random(s.t, 10_000), randomPassphrase(s.t)[:24]
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, f := range []struct {
		name    string
		content []byte
	}{{"keys/first", s.content}, {"keys/second", second}} {
		if err := w.WriteHeader(&tar.Header{Name: f.name, Typeflag: tar.TypeReg, Mode: 0o600, Size: int64(len(f.content)), Uname: user}); err != nil {
			s.t.Fatal(err)
		}
		w.Write(f.content)
	}
	w.Close()
	s.d.Write("secrets.yaml.enc", rig.GPG(s.t, archive.Bytes(), s.passphrase, "--symmetric", "--s2k-count", "65536"))
	s.d.Write("pw", []byte(s.passphrase+"\n"))
	s.ix = newIndex(part{aSecret, s.content}, part{aSecret, second}, part{aSecret, []byte(user)},
		part{aPassphrase, []byte(s.passphrase)}, part{aCanary, []byte(s.d.Conf)})
	m := s.slowly("--name", "certs.tar")
	s.look("ready, a bundle", looking{still: true, files: true})
	s.read(filepath.Join(s.d.Conf, "keys/first"), 2)
	m.WaitEvent("delivery", 1)
	s.look("ready, one of a bundle is spent", looking{still: true, files: true})
	if got := rig.Cat(s.t, filepath.Join(s.d.Conf, "keys/second")); got.Out != string(second) {
		s.t.Errorf("the second file: %d bytes", len(got.Out))
	}
	m.WaitEvent("delivery", 2)
	s.look("spent", looking{still: true, files: true})
	r := m.Stop()
	s.nothing("ended")
	s.said("ended", r.Out, r.Err, fmt.Sprint(m.Events("")))
}

func TestScan_NobodyElseHasIt(t *testing.T) {
	rig.Root(t)
	rig.Need(t, "gdb", "gdb")
	bin := copyOf(t, rig.Binary(t))
	table := &scanTable{}
	if fd, err := unix.MemfdSecret(0); err == nil {
		unix.Close(fd)
		table.secretMemory = true
	} else {
		t.Logf("this kernel has no memfd_secret (%v): until the spend the secret may be found in the serving process", err)
	}
	sizes := []int{32, 4 << 10, 128<<10 + 1, 1 << 20, 8 << 20}
	if testing.Short() {
		sizes = []int{128<<10 + 1}
	}
	var needles []part
	since := started()
	for _, size := range sizes {
		s := newScan(t, bin, size, table)
		needles = append(needles, part{aSecret, s.content}, part{aPassphrase, []byte(s.passphrase)})
		s.run(!testing.Short())
		// A debugger's core is a gigabyte of pages that were reserved and never
		// touched: the long form makes them.
		if last := sizes[len(sizes)-1]; size == last || size == 32 {
			if !testing.Short() {
				s.cores()
			}
			s.expires(!testing.Short())
		}
		if size == 128<<10+1 {
			s.inABundle()
		}
		if size == 4<<10 {
			s.inBackground()
			s.overAFile()
		}
		// What the test made is not what it looks for.
		os.RemoveAll(s.d.Path)
	}
	if !testing.Short() {
		begin := time.Now()
		k := newSparseIndex(window, needles...).files(t, "every changed file here", since, "", "/")
		t.Logf("%d MiB of files in %s", k.read>>20, time.Since(begin).Round(time.Second))
		table.add("at the end", "", k)
	}
	for _, row := range table.rows {
		if row.state == "at the end" && (row.hits > 0 || row.failed != "") {
			t.Errorf("%s: %d hits %s", row.method, row.hits, row.failed)
		}
	}
	t.Logf("states × methods × hits\n%s", table)
}

// copyOf gives the program a path that no other process runs, with what shows its
// counters beside it.
func copyOf(t testing.TB, program string) string {
	t.Helper()
	dir := tempDir(t, "")
	for _, name := range []string{"oncefs", publisherName} {
		from := program
		if name == publisherName {
			from = filepath.Join(filepath.Dir(program), name)
		}
		in, err := os.Open(from)
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		out, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_WRONLY, 0o755)
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		if _, err := io.Copy(out, in); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "oncefs")
}

// Of a file that was read through a mapping no page stays in the page cache.
func TestScan_PageCacheIsDropped(t *testing.T) {
	content := random(t, 300_000)
	d := rig.NewDir(t, content)
	m := d.MountOver("--reads", "3")
	s := newSipper(t)
	for n := range 2 {
		s.want("ok", "open "+d.Secret())
		s.want("0", "cached")
		s.want("74", "map")
		s.want("74", "cached") // as long as it is open it is there: the method sees it
		s.want(sumOf(content), "close")
		m.WaitEvent("delivery", n+1)
	}
	s.want("ok", "open "+d.Secret())
	s.want("0", "cached")
	s.want("74", "map")
	s.do("close")
	m.WaitEvent("delivery", 3)
	// Caches are kept, and there is nothing in them to be had.
	s.want("error no such file or directory", "open "+d.Secret())
}

// A scanTable is states × methods, over all sizes and processes.
type scanTable struct {
	mu   sync.Mutex
	rows []*scanRow
	// secretMemory: the kernel has it, so that is where a secret must be.
	secretMemory bool
}

type scanRow struct {
	state, method      string
	looks              int
	read, secret, hits int64
	failed             string
	roles              []string
}

func (s *scanTable) add(state, role string, k look) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var row *scanRow
	for _, r := range s.rows {
		if r.state == state && r.method == k.method {
			row = r
		}
	}
	if row == nil {
		row = &scanRow{state: state, method: k.method}
		s.rows = append(s.rows, row)
	}
	row.looks++
	row.read += k.read
	row.secret += k.unread
	row.hits += int64(k.found.of(aSecret) + k.found.of(aPassphrase))
	row.failed += k.failed
	if role != "" && !slices.Contains(row.roles, role) {
		row.roles = append(row.roles, role)
	}
}

func (s *scanTable) String() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "STATE\tMETHOD\tLOOKS\tMiB READ\tKiB NOT READABLE\tHITS\tPROCESSES")
	for _, r := range s.rows {
		fmt.Fprintf(w, "%s\t%s\t%d\t%.1f\t%d\t%d\t%s\n", r.state, r.method, r.looks, float64(r.read)/(1<<20), r.secret>>10, r.hits, strings.Join(r.roles, " "))
	}
	w.Flush()
	return b.String()
}
