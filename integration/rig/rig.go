// Package rig drives the built oncefs binary for tests: it builds it, encrypts
// with the real gpg, mounts, and waits for events. It uses none of the project's
// packages: what a test sees here is what a user sees.
package rig

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Passphrase is what the rig encrypts with unless told otherwise.
const Passphrase = "correct horse battery staple"

// Prefix begins the name of every directory that this run of tests makes. Other
// runs on the same machine have theirs.
var Prefix = fmt.Sprintf("oncefs-test-%d-", os.Getpid())

// patience is how long an event may take on a noisy machine before a test
// fails. It is never waited for as such.
const patience = 60 * time.Second

var build struct {
	sync.Once
	path string
	err  error
}

// Binary is the program under test: $ONCEFS_BIN, or built once for the test
// binary.
func Binary(t testing.TB) string {
	t.Helper()
	if path := os.Getenv("ONCEFS_BIN"); path != "" {
		return path
	}
	build.Do(func() {
		dir, err := os.MkdirTemp("", "oncefs-bin-")
		if err != nil {
			build.err = err
			return
		}
		os.Chmod(dir, 0o755)
		build.path = filepath.Join(dir, "oncefs")
		cmd := exec.Command("go", "build", "-trimpath", "-o", dir, "oncefs/cmd/oncefs", "oncefs/cmd/oncefs-metrics")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			build.err = fmt.Errorf("build: %w\n%s", err, out)
		}
	})
	if build.err != nil {
		t.Fatal(build.err)
	}
	return build.path
}

// RemoveBinary removes what Binary built; for TestMain.
func RemoveBinary() {
	if build.path != "" {
		os.RemoveAll(filepath.Dir(build.path))
	}
}

// Need finds a program that a test cannot do without. In CI its absence is a
// failure, elsewhere a loud skip.
func Need(t testing.TB, program, debianPackage string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err == nil {
		return path
	}
	// Debian keeps servers where a plain user's PATH does not look.
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return path
		}
	}
	if os.Getenv("CI") != "" {
		t.Fatalf("%s is not installed: apt-get install %s", program, debianPackage)
	}
	t.Skipf("SKIPPED: %s is not installed: apt-get install %s", program, debianPackage)
	return ""
}

// Root skips a test that only root can make.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: this one needs root; the run as root makes it")
	}
}

// A Dir is a test's own directory with a mount target, an encrypted file and a
// passphrase file in it.
type Dir struct {
	T    testing.TB
	Path string
	Pass string // passphrase file
	Enc  string // encrypted file, secrets.yaml.enc
	Conf string // empty directory to mount over
}

// NewDir makes the directory and encrypts content into it with gpg. Any user
// may enter it, so that tests can read as others.
func NewDir(t testing.TB, content []byte) *Dir {
	t.Helper()
	path, err := os.MkdirTemp("", Prefix)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(path) })
	os.Chmod(path, 0o755)
	d := &Dir{T: t, Path: path, Pass: filepath.Join(path, "pw"), Enc: filepath.Join(path, "secrets.yaml.enc"), Conf: filepath.Join(path, "config")}
	d.WritePass()
	if err := os.Mkdir(d.Conf, 0o755); err != nil {
		t.Fatal(err)
	}
	d.Write(filepath.Base(d.Enc), GPG(t, content, Passphrase, "--symmetric", "--s2k-count", "65536"))
	return d
}

// WritePass writes the passphrase file anew.
func (d *Dir) WritePass() { d.T.Helper(); d.Write("pw", []byte(Passphrase+"\n")) }

// Write writes a file of mode 0600 below the directory and returns its path.
func (d *Dir) Write(name string, content []byte) string {
	d.T.Helper()
	path := filepath.Join(d.Path, name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		d.T.Fatal(err)
	}
	return path
}

// Secret is where the secret is served when the directory is mounted over.
func (d *Dir) Secret() string { return filepath.Join(d.Conf, "secrets.yaml") }

// GPG runs gpg with a passphrase and input, in a home of its own that is empty.
func GPG(t testing.TB, in []byte, passphrase string, args ...string) []byte {
	t.Helper()
	Need(t, "gpg", "gnupg")
	home, err := os.MkdirTemp("", "gpg-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(home)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	go func() { io.WriteString(w, passphrase+"\n"); w.Close() }()
	defer r.Close()
	cmd := exec.Command("gpg", append([]string{"--homedir", home, "--batch", "--quiet", "--no-autostart", "--pinentry-mode", "loopback", "--passphrase-fd", "3"}, args...)...)
	cmd.Stdin, cmd.ExtraFiles = bytes.NewReader(in), []*os.File{r}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("gpg %v: %v\n%s", args, err, errs.Bytes())
	}
	return out
}

// A Result is how a command ended.
type Result struct {
	Code   int // exit status; -1 if a signal ended it
	Signal syscall.Signal
	Out    string
	Err    string
}

// Run runs the program under test to its end.
func Run(t testing.TB, args ...string) Result {
	t.Helper()
	return Exec(t, exec.Command(Binary(t), args...))
}

// Exec runs any command to its end.
func Exec(t testing.TB, cmd *exec.Cmd) Result {
	t.Helper()
	var out, errs bytes.Buffer
	if cmd.Stdout == nil {
		cmd.Stdout = &out
	}
	if cmd.Stderr == nil {
		cmd.Stderr = &errs
	}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%v: %v", cmd.Args, err)
	}
	r := Result{Code: cmd.ProcessState.ExitCode(), Out: out.String(), Err: errs.String()}
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		r.Signal = ws.Signal()
	}
	return r
}

// An Event is one line of the event log.
type Event map[string]any

// Name is what happened.
func (e Event) Name() string { s, _ := e["msg"].(string); return s }

// A Mount is a running `oncefs mount`.
type Mount struct {
	T      testing.TB
	Cmd    *exec.Cmd
	Target string

	mu     sync.Mutex
	cond   *sync.Cond
	events []Event
	stderr []string // lines that are no events
	stdout bytes.Buffer
	ended  bool
	exited chan struct{}
	read   sync.WaitGroup
}

// MountOver starts `oncefs mount` on the directory's target with its encrypted
// file and passphrase file, waits until it is ready, and unmounts at the test's
// end.
func (d *Dir) MountOver(args ...string) *Mount {
	d.T.Helper()
	m := d.Start(args...)
	m.WaitReady()
	return m
}

// Start is MountOver without waiting for ready.
func (d *Dir) Start(args ...string) *Mount {
	d.T.Helper()
	return Start(d.T, exec.Command(Binary(d.T), append([]string{"mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass}, args...)...), d.Conf)
}

// Start starts any command line of `oncefs mount` and collects what it says.
func Start(t testing.TB, cmd *exec.Cmd, target string) *Mount {
	t.Helper()
	m := &Mount{T: t, Cmd: cmd, Target: target, exited: make(chan struct{})}
	m.cond = sync.NewCond(&m.mu)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m.read.Add(2)
	go m.collect(stdout, func(line string) { m.stdout.WriteString(line + "\n") })
	go m.collect(stderr, func(line string) {
		var e Event
		if json.Unmarshal([]byte(line), &e) == nil && e.Name() != "" {
			m.events = append(m.events, e)
		} else {
			m.stderr = append(m.stderr, line)
		}
	})
	go func() {
		m.read.Wait()
		cmd.Wait()
		m.mu.Lock()
		m.ended = true
		m.cond.Broadcast()
		m.mu.Unlock()
		close(m.exited)
	}()
	t.Cleanup(func() {
		m.Cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-m.exited:
		case <-time.After(10 * time.Second):
			m.Cmd.Process.Kill()
			<-m.exited
			t.Errorf("oncefs did not end after SIGTERM")
		}
		detach(m.Target)
		if t.Failed() {
			t.Logf("stdout: %s\nstderr: %s\nevents: %v", m.stdout.String(), strings.Join(m.stderr, "\n"), m.events)
		}
	})
	return m
}

// detach takes off what a test has left, dead or alive: a user who is not root
// needs fusermount3 for it.
func detach(path string) {
	if err := syscall.Unmount(path, 2 /* MNT_DETACH */); errors.Is(err, syscall.EPERM) {
		exec.Command("fusermount3", "-u", "-z", "--", path).Run()
	}
}

func (m *Mount) collect(r io.Reader, f func(string)) {
	defer m.read.Done()
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		m.mu.Lock()
		f(lines.Text())
		m.cond.Broadcast()
		m.mu.Unlock()
	}
}

// wait waits until f, called with the lock held, says so.
func (m *Mount) wait(what string, f func() bool) {
	m.T.Helper()
	timeout := time.AfterFunc(patience, func() { m.mu.Lock(); m.cond.Broadcast(); m.mu.Unlock() })
	defer timeout.Stop()
	deadline := time.Now().Add(patience)
	m.mu.Lock()
	defer m.mu.Unlock()
	for !f() {
		if m.ended || time.Now().After(deadline) {
			m.T.Fatalf("waiting for %s: ended=%v\nstdout: %s\nstderr: %s\nevents: %v", what, m.ended, m.stdout.String(), strings.Join(m.stderr, "\n"), m.events)
		}
		m.cond.Wait()
	}
}

// WaitReady waits for the ready line.
func (m *Mount) WaitReady() {
	m.T.Helper()
	m.wait("ready", func() bool { return strings.Contains(m.stdout.String(), "oncefs: ready:") })
}

// WaitEvent waits for the n-th event of that name, counted from 1, and returns
// it.
func (m *Mount) WaitEvent(name string, n int) Event {
	m.T.Helper()
	var found Event
	m.wait(fmt.Sprintf("event %s number %d", name, n), func() bool {
		left := n
		for _, e := range m.events {
			if e.Name() == name {
				if left--; left == 0 {
					found = e
					return true
				}
			}
		}
		return false
	})
	return found
}

// Events returns the events of that name so far; all of them for "".
func (m *Mount) Events(name string) []Event {
	m.mu.Lock()
	defer m.mu.Unlock()
	var found []Event
	for _, e := range m.events {
		if name == "" || e.Name() == name {
			found = append(found, e)
		}
	}
	return found
}

// Signal sends a signal to the daemon.
func (m *Mount) Signal(s syscall.Signal) { m.Cmd.Process.Signal(s) }

// Wait waits for the daemon's end and returns how it ended.
func (m *Mount) Wait() Result {
	m.T.Helper()
	select {
	case <-m.exited:
	case <-time.After(patience):
		m.T.Fatalf("oncefs did not end\nevents: %v", m.Events(""))
	}
	r := Result{Code: m.Cmd.ProcessState.ExitCode(), Out: m.stdout.String(), Err: strings.Join(m.stderr, "\n")}
	if ws, ok := m.Cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		r.Signal = ws.Signal()
	}
	return r
}

// Stop ends the daemon with SIGTERM and returns how it ended.
func (m *Mount) Stop() Result {
	m.T.Helper()
	m.Signal(syscall.SIGTERM)
	return m.Wait()
}

// Mounted tells whether an oncefs mount is on exactly that path.
func Mounted(t testing.TB, path string) bool {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	real, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return false
	}
	real = filepath.Join(real, filepath.Base(path))
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) > 2 && f[1] == real && f[2] == "fuse.oncefs" {
			return true
		}
	}
	return false
}

// Cat reads a path with cat, in a process of its own.
func Cat(t testing.TB, path string) Result {
	t.Helper()
	return Exec(t, exec.Command("cat", path))
}

// Child finds the child of a process that has a word in its command line, or 0.
func Child(pid int, word string) int {
	list, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, path := range list {
		text, _ := os.ReadFile(path)
		for _, child := range strings.Fields(string(text)) {
			line, _ := os.ReadFile("/proc/" + child + "/cmdline")
			if slices.Contains(strings.Split(string(line), "\x00"), word) {
				n, _ := strconv.Atoi(child)
				return n
			}
		}
	}
	return 0
}

// WaitFor waits until f says so; it is for what tells no event, such as
// another process's start. It asks often, and leaves the processor to those it
// waits for.
func WaitFor(t testing.TB, what string, f func() bool) {
	t.Helper()
	again := time.NewTicker(time.Millisecond)
	defer again.Stop()
	for deadline := time.After(patience); !f(); {
		select {
		case <-again.C:
		case <-deadline:
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// Leftovers lists what tests may leave on the machine: mounts, processes and
// directories that carry the rig's names.
func Leftovers() []string {
	var all []string
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && strings.Contains(f[1], "/"+Prefix) {
			all = append(all, "mount "+f[1])
		}
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range procs {
		line, _ := os.ReadFile(path)
		if strings.Contains(string(line), "/"+Prefix) {
			all = append(all, "process "+filepath.Base(filepath.Dir(path))+" "+strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), Prefix+"*"))
	return append(all, dirs...)
}

// Calm is called first by each process of the tests. None of them lives long enough
// to need its garbage collected, and in Go 1.26 a collection that begins while a
// thread enters a long system call, as waiting for a child is one, can hold
// everything up for a minute: see internal/wait.
func Calm() {
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(2 << 30)
}

// Main runs the tests of a package and returns its exit status, which is not 0 if
// they left something behind.
func Main(m *testing.M) int {
	before := Leftovers()
	code := m.Run()
	if left := newLeftovers(before); len(left) > 0 && code == 0 {
		for _, l := range left {
			println("left behind:", l)
		}
		code = 1
	}
	RemoveBinary()
	return code
}

// newLeftovers lists what there is now and was not before. Processes that are
// about to end are given the time to.
func newLeftovers(before []string) []string {
	deadline := time.Now().Add(10 * time.Second)
	for {
		var left []string
		for _, l := range Leftovers() {
			if !slices.Contains(before, l) {
				left = append(left, l)
			}
		}
		if len(left) == 0 || time.Now().After(deadline) {
			return left
		}
		runtime.Gosched()
	}
}

// A Reader is a process of the test binary that does file operations one by
// one, as its test tells it, so that what happens between two of them is the
// test's choice.
type Reader struct {
	T   testing.TB
	Cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// NewReader starts a reader; cred may make it another user's.
func NewReader(t testing.TB, cred *syscall.Credential) *Reader {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if cred != nil {
		exe = readable(t, exe)
	}
	cmd := exec.Command(exe, "reader")
	if cred != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	}
	cmd.Stderr = os.Stderr
	return StartReader(t, cmd)
}

// StartReader starts a reader by a command line that ends in the test binary and
// "reader".
func StartReader(t testing.TB, cmd *exec.Cmd) *Reader {
	t.Helper()
	r := &Reader{T: t, Cmd: cmd}
	var err error
	if r.in, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.out = bufio.NewReader(out)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.End)
	return r
}

// readable copies a program to where any user may run it.
func readable(t testing.TB, exe string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", Prefix)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "reader")
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// Do makes the reader do one operation and returns its answer: what came of it,
// or the name of the error.
func (r *Reader) Do(op ...string) string {
	r.T.Helper()
	if _, err := io.WriteString(r.in, strings.Join(op, "\t")+"\n"); err != nil {
		r.T.Fatalf("reader: %v: %v", op, err)
	}
	line, err := r.out.ReadString('\n')
	if err != nil {
		r.T.Fatalf("reader: %v: %v", op, err)
	}
	return strings.TrimSuffix(line, "\n")
}

// Want makes the reader do one operation and fails unless the answer is as
// wanted.
func (r *Reader) Want(want string, op ...string) {
	r.T.Helper()
	if got := r.Do(op...); got != want {
		r.T.Errorf("%v: got %.200q, want %.200q", op, got, want)
	}
}

// End ends the reader and waits for it.
func (r *Reader) End() {
	r.in.Close()
	r.Cmd.Wait()
}

// Kill kills the reader and waits for its end.
func (r *Reader) Kill() {
	r.Cmd.Process.Kill()
	r.Cmd.Wait()
}
