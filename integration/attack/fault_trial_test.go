package attack

import (
	"archive/tar"
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"oncefs/integration/rig"
)

// A scenario is one way in which the program is run, from its start to its exit.
type scenario struct {
	name string
	// arguments of the run in which the fault is.
	arguments func(*trial) []string
	// run does it, with whatever has to happen meanwhile, and looks afterwards
	// that all holds that must.
	run func(*trial)
	// code is the exit status where nothing goes wrong.
	code   int
	bundle bool // what is mounted is a bundle of two files
	short  bool // it is part of the short form
	// share of the time, to those of the others.
	share int
}

func mountArguments(tr *trial) []string {
	return []string{"mount", tr.target, "--enc", tr.path(tr.enc), "--passphrase-file", tr.path("pw")}
}

var scenarios = []*scenario{
	{name: "mount over a directory", arguments: mountArguments, run: (*trial).mount, short: true, share: 20},
	{name: "mount over a file", arguments: mountArguments, run: (*trial).mountOverFile, short: true, share: 4},
	{name: "mount in the background", arguments: func(tr *trial) []string { return append(mountArguments(tr), "--background") }, run: (*trial).mount, share: 4},
	{name: "a bundle", arguments: mountArguments, run: (*trial).mount, bundle: true, share: 1},
	{name: "an intrusion ends it", arguments: func(tr *trial) []string { return append(mountArguments(tr), "--on-intrusion", "exit") }, run: (*trial).mountIntruded, code: 70, share: 1},
	{name: "an intrusion starts a command", arguments: func(tr *trial) []string {
		return append(mountArguments(tr), "--on-intrusion", "exec:"+tr.path("tmp/command"))
	}, run: (*trial).mountAlarmed, share: 5},
	{name: "its counters are shown", arguments: func(tr *trial) []string {
		return append(mountArguments(tr), "--metrics", "127.0.0.1:0", "--metrics-textfile", tr.path("tmp"))
	}, run: (*trial).mount, share: 8},
	{name: "wrong passphrase", arguments: mountArguments, run: (*trial).wrongPassphrase, code: 31, share: 1},
	{name: "run", arguments: func(tr *trial) []string {
		return append(append([]string{"run"}, mountArguments(tr)[1:]...), "--", "cat", tr.secret())
	}, run: (*trial).command, short: true, share: 24},
	{name: "encrypt", arguments: func(tr *trial) []string {
		return []string{"encrypt", tr.path("secrets.yaml"), "--passphrase-file", tr.path("pw"), "--remove-plaintext"}
	}, run: (*trial).encrypt, short: true, share: 6},
	{name: "encrypt a bundle", arguments: func(tr *trial) []string {
		return []string{"encrypt", tr.path("plain"), "--passphrase-file", tr.path("pw")}
	}, run: (*trial).encryptBundle, share: 3},
	{name: "rekey", arguments: func(tr *trial) []string {
		return []string{"rekey", tr.path(tr.enc), "--passphrase-file", tr.path("pw"), "--new-passphrase-file", tr.path("new")}
	}, run: (*trial).rekey, share: 10},
	{name: "edit", arguments: func(tr *trial) []string {
		return []string{"edit", tr.path("binary.enc"), "--passphrase-file", tr.path("pw")}
	}, run: (*trial).edit, short: true, share: 14},
	{name: "umount", arguments: func(tr *trial) []string { return []string{"umount", tr.target} }, run: (*trial).umount, short: true, share: 3},
}

// faults is what all trials of one scenario share.
type faults struct {
	*scenario
	t          testing.TB
	bin        string
	base       string // directory of all trials
	content    []byte
	second     []byte // of the second file in a bundle
	passphrase string
	other      string // another passphrase
	enc        string // name of the encrypted file
	encrypted  []byte
	older      []byte // another message, that was there before
	ix         *index
}

func newFaults(t testing.TB, s *scenario) *faults {
	t.Helper()
	f := &faults{scenario: s, t: t, bin: copyOf(t, rig.Binary(t)), base: tempDir(t, ""), content: random(t, 150_000), second: random(t, 5_000),
		passphrase: randomPassphrase(t), other: randomPassphrase(t), enc: "secrets.yaml.enc"}
	message := f.content
	if s.bundle {
		f.enc, message = "secrets.tar.enc", f.archive(t)
	}
	f.encrypted = rig.GPG(t, message, f.passphrase, "--symmetric", "--s2k-count", "65536")
	f.older = rig.GPG(t, []byte("older"), f.passphrase, "--symmetric", "--s2k-count", "65536")
	f.ix = newIndex(part{aSecret, f.content}, part{aSecret, f.second}, part{aPassphrase, []byte(f.passphrase)}, part{aPassphrase, []byte(f.other)})
	return f
}

// secondName is the second file in a bundle.
const secondName = "keys/second"

// archive is the bundle.
func (f *faults) archive(t testing.TB) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, file := range f.inBundle() {
		err := w.WriteHeader(&tar.Header{Name: file.name, Mode: 0o400, Size: int64(len(file.bytes)), Format: tar.FormatUSTAR})
		if err == nil {
			_, err = w.Write(file.bytes)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func (f *faults) inBundle() []part {
	return []part{{"secrets.yaml", f.content}, {secondName, f.second}}
}

// A trial is one run with one fault.
type trial struct {
	*faults
	order  order
	dir    string
	target string // what is mounted over
	rep    report

	private   bool                        // the mount is in a namespace of its own
	byItself  bool                        // it ends when it was read
	afterRead func(ended <-chan struct{}) // what happens then, or nil

	mu     sync.Mutex // guards stdout and stderr while they are written
	stdout string
	stderr string
	told   chan struct{} // closed when it said that no command was started
	code   int
	ready  bool     // it said so
	failed bool     // a reader was told that something is wrong
	wrong  []string // what must not be
}

// What came of a trial.
const (
	unharmed  = "unharmed" // it went on and did all
	refused   = "refused"  // it said no, and all is as it was
	told      = "told"     // it was done, or ready, and then somebody was told
	gaveUp    = "runtime"  // the Go runtime gave up
	wasKilled = "killed"
	notMet    = "not met"
)

func (tr *trial) class() string {
	switch {
	case !tr.rep.Hit:
		return notMet
	case tr.order.Kill:
		return wasKilled
	case tr.crashed():
		return gaveUp
	case tr.code == tr.scenario.code && !tr.failed:
		return unharmed
	case tr.ready || tr.code == tr.scenario.code:
		return told
	}
	return refused
}

func (tr *trial) complain(format string, args ...any) {
	tr.wrong = append(tr.wrong, fmt.Sprintf(format, args...))
}

func (tr *trial) path(name string) string { return filepath.Join(tr.dir, name) }

func (tr *trial) secret() string { return tr.path("config/secrets.yaml") }

// trialPatience is how long a trial may stand still before it counts as hung.
// Nothing depends on it otherwise.
const trialPatience = 90 * time.Second

// try makes one trial in a directory of its own.
func (f *faults) try(o order) *trial {
	tr := &trial{faults: f, order: o}
	var err error
	if tr.dir, err = os.MkdirTemp(f.base, ""); err != nil {
		tr.complain("%v", err)
		return tr
	}
	defer os.RemoveAll(tr.dir)
	tr.target = tr.path("config")
	os.Mkdir(tr.path("config"), 0o755)
	os.Mkdir(tr.path("tmp"), 0o755)
	tr.write("pw", f.passphrase+"\n")
	tr.write("config/other", "other")
	tr.write(f.enc, string(f.encrypted))
	f.run(tr)
	tr.nothingSaid()
	tr.search()
	if !tr.rep.Hit && tr.code != f.code {
		tr.complain("exit %d without a fault", tr.code)
	}
	if tr.crashed() && !tr.order.Own {
		tr.complain("it crashed")
	}
	return tr
}

func (tr *trial) write(name, content string) {
	if err := os.WriteFile(tr.path(name), []byte(content), 0o600); err != nil {
		tr.complain("%v", err)
	}
}

// start starts the program. ready is closed when it says that it is, on either
// output; ended at its end.
func (tr *trial) start(cmd *exec.Cmd) (ready, ended <-chan struct{}) {
	said, end := make(chan struct{}), make(chan struct{})
	cmd.Dir = tr.dir
	cmd.Env = append(os.Environ(), "TMPDIR="+tr.path("tmp"), "VISUAL=", `EDITOR=sh -c 'echo changed >>"$1" && echo edited' sh`)
	out, err1 := cmd.StdoutPipe()
	errs, err2 := cmd.StderrPipe()
	if err := errors.Join(err1, err2); err != nil {
		tr.complain("%v", err)
	}
	if err := cmd.Start(); err != nil {
		tr.complain("start: %v", err)
		close(end)
		return said, end
	}
	tr.told = make(chan struct{})
	isReady, noCommand := sync.OnceFunc(func() { close(said) }), sync.OnceFunc(func() { close(tr.told) })
	var both sync.WaitGroup
	collect := func(r io.Reader, to *string, sign string) {
		both.Go(func() {
			for lines := bufio.NewReader(r); ; {
				line, err := lines.ReadString('\n')
				tr.mu.Lock()
				*to += line
				tr.mu.Unlock()
				if strings.Contains(line, sign) {
					isReady()
				}
				if strings.Contains(line, `"msg":"intrusion-command"`) {
					noCommand()
				}
				if err != nil {
					return
				}
			}
		})
	}
	collect(out, &tr.stdout, "oncefs: ready:")
	collect(errs, &tr.stderr, `"msg":"ready"`)
	go func() {
		both.Wait()
		cmd.Wait()
		close(end)
	}()
	return said, end
}

// injected is the run with the fault.
func (tr *trial) injected() *exec.Cmd {
	text, _ := json.Marshal(tr.order)
	exe, _ := os.Executable()
	cmd := exec.Command(exe, append([]string{"fault", tr.dir + ".report", string(text), "--", tr.bin}, tr.arguments(tr)...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no terminal: there is nobody to be asked
	return cmd
}

// wait waits for the end; a program that does not end is ended, and that is a
// fault of its own.
func (tr *trial) wait(cmd *exec.Cmd, ended <-chan struct{}, what string) {
	select {
	case <-ended:
	case <-time.After(trialPatience):
		tr.complain("hung: %s", what)
		cmd.Process.Kill() // and with it all that it traces
		select {
		case <-ended:
		case <-time.After(trialPatience / 9):
			tr.complain("it cannot be killed")
			unix.Unmount(tr.target, unix.MNT_FORCE) // who waits for its own answer ends now
			<-ended
		}
	}
	if cmd.ProcessState != nil {
		tr.code = cmd.ProcessState.ExitCode()
	}
}

// finish is wait for the run with the fault.
func (tr *trial) finish(cmd *exec.Cmd, ended <-chan struct{}) {
	tr.wait(cmd, ended, fmt.Sprintf("ready %v", tr.ready))
	if b, err := os.ReadFile(tr.dir + ".report"); err == nil {
		json.Unmarshal(b, &tr.rep)
		os.Remove(tr.dir + ".report")
	}
	if tr.rep.Problem != "" {
		tr.complain("the faulter failed: %s", tr.rep.Problem)
	}
}

// toEnd makes the run with the fault where nothing has to happen meanwhile.
func (tr *trial) toEnd() {
	cmd := tr.injected()
	_, ended := tr.start(cmd)
	tr.finish(cmd, ended)
}

// crashed tells that the Go runtime of the first process, or of the one in the
// background, gave up. SIGPIPE is how a command ends whose output nobody reads.
func (tr *trial) crashed() bool {
	return tr.rep.Hit && !tr.order.Kill && (tr.rep.Ended == "exit 2" || strings.HasPrefix(tr.rep.Ended, "signal ") && tr.rep.Ended != "signal SIGPIPE" ||
		strings.Contains(tr.stderr, "fatal error: ") || strings.Contains(tr.stderr, "panic: "))
}

// violent tells that a process had no chance to tidy up.
func (tr *trial) violent() bool {
	return tr.rep.Hit && (tr.order.Kill || tr.order.Own && tr.order.Role == metricsRole) || tr.crashed()
}

// An act is what an error must name, beside what the kernel said.
var act = regexp.MustCompile(`(?:\b|/)(open|read|write|stat|lstat|fstat|chmod|chown|fcntl|epoll|dup3|seek|readlink|access|flock|sync|fsync|close|pipe2?|socketpair|start|exec|fork/exec|` +
	`openat|removeat|mount|unmount|umount|fsopen|fsconfig|fsmount|move_mount|mount_setattr|statfs|editor|mkdirtemp|mkdir|symlink|rename|remove|removed|overwritten|replaced|changed|wait4|directory|decrypt|encrypt|decrypting|inspecting|comparison|lock|memfd_secret|` +
	`prctl|tgkill|close_range|capset|capabilities|setrlimit|landlock\w*|seccomp|privileges|warden|passphrase|device|dev/fuse|metrics|listen|mountinfo|fusermount3|terminal|getwd|getcwd|executable|process|encrypted file|private place|supervisor|extended attributes|access control list|owner)\b`)

// speaks looks that a failure says what failed, in its lines that are no hints.
func (tr *trial) speaks() {
	var line, before string
	for _, l := range strings.Split(tr.stderr, "\n") {
		switch rest, found := strings.CutPrefix(l, "oncefs: error: "); {
		case found:
			line += rest + "\n"
		case strings.HasPrefix(l, "oncefs: ") && !strings.HasPrefix(l, "oncefs: hint: "):
			before = l
		}
	}
	if line == "" || strings.Contains(line, "the edit was not accepted") {
		line += before // which says why
	}
	line = strings.TrimSpace(line)
	switch {
	case line == "" && tr.order.Call == "write" && tr.order.On == "standard":
		return // it is the word that could not be said
	case tr.order.On == "socket" && (tr.order.Errno == int(unix.EPIPE) || tr.order.Errno == int(unix.ECONNRESET)):
		return // the process at the other end is gone, it says: who sees that tells why, and here nobody does
	case line == "":
		tr.complain("exit %d without a word", tr.code)
		return
	}
	if !act.MatchString(strings.ReplaceAll(line, tr.dir, "")) {
		tr.complain("exit %d, and the error names no act: %s", tr.code, line)
	}
}

func (tr *trial) mountOverFile() {
	tr.target, tr.byItself = tr.secret(), true
	tr.mount()
}

// intrude is somebody who comes late and is not the reader.
func (tr *trial) intrude() {
	if got := tr.reader(&exec.Cmd{}, "head", "-c1", tr.secret()); got.Code == 0 || got.Out != "" {
		tr.complain("who came late got %d bytes", len(got.Out))
	}
}

// mountIntruded is a mount that an intrusion ends.
func (tr *trial) mountIntruded() {
	intruded := false
	tr.byItself = true
	tr.afterRead = func(<-chan struct{}) {
		tr.intrude()
		intruded = true
	}
	tr.mount()
	if intruded && tr.code == 0 {
		tr.complain("exit 0 after an intrusion")
	}
}

// mountAlarmed is a mount that starts a command at an intrusion.
func (tr *trial) mountAlarmed() {
	fifo := tr.path("tmp/alarm")
	tr.write("tmp/command", "#!/bin/sh\nexec cat >"+fifo+"\n")
	err := errors.Join(os.Chmod(tr.path("tmp/command"), 0o700), unix.Mkfifo(fifo, 0o600))
	alarm, openErr := os.OpenFile(fifo, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err = errors.Join(err, openErr); err != nil {
		tr.complain("%v", err)
		return
	}
	defer alarm.Close()
	atIntrusion := false // it ended
	tr.afterRead = func(ended <-chan struct{}) {
		tr.intrude()
		raised := make(chan struct{})
		go func() {
			defer close(raised)
			line, err := bufio.NewReader(alarm).ReadString('\n')
			if err == nil && !strings.Contains(line, `"msg":"late"`) {
				tr.complain("the command was told %q", line)
			}
		}()
		select {
		case <-raised:
		case <-tr.told:
		case <-ended:
			atIntrusion = true
		case <-time.After(trialPatience / 2):
			tr.complain("no command was started at an intrusion, and nobody was told")
		}
		alarm.SetReadDeadline(time.Now())
		<-raised
	}
	tr.mount()
	if atIntrusion && !tr.violent() {
		tr.complain("it ended at an intrusion")
	}
}

// mount is a mount that becomes ready, is read, and ends.
func (tr *trial) mount() {
	cmd := tr.injected()
	ready, ended := tr.start(cmd)
	defer unix.Unmount(tr.target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	select {
	case <-ready:
		tr.read(cmd, ended)
	case <-ended:
	case <-time.After(trialPatience):
	}
	select {
	case <-ready:
		tr.ready = true
	default:
	}
	tr.finish(cmd, ended)
	tr.afterMount()
}

// read is what readers see of a mount that said it is ready, and how it is
// ended.
func (tr *trial) read(cmd *exec.Cmd, ended <-chan struct{}) {
	if _, err := os.Lstat(tr.path("pw")); err == nil {
		tr.complain("ready, and the passphrase file is there")
	}
	whole := tr.readTwice(cmd, tr.secret(), tr.content)
	if tr.bundle {
		tr.readTwice(cmd, tr.path("config/"+secondName), tr.second)
	}
	tr.failed = !whole
	if whole && tr.afterRead != nil {
		tr.afterRead(ended)
	}
	if whole && tr.byItself {
		// It ends by itself, or something was told and it waits to be ended.
		select {
		case <-ended:
			return
		case <-time.After(2 * time.Second):
		}
	}
	cmd.Process.Signal(unix.SIGTERM) // the faulter passes it on
}

// readTwice lets two readers try, one after another, and tells whether one of them
// got all of it.
func (tr *trial) readTwice(mount *exec.Cmd, path string, content []byte) bool {
	first, second := tr.reader(mount, "cat", path), tr.reader(mount, "cat", path)
	whole := 0
	for _, got := range []rig.Result{first, second} {
		switch {
		case got.Code == 0 && got.Out != string(content):
			tr.complain("a reader got %d bytes of %d and no error", len(got.Out), len(content))
		case got.Code == 0:
			whole++
		}
	}
	if whole > 1 {
		tr.complain("two readers got it")
	}
	if len(first.Out) > 0 && len(second.Out) > 0 {
		tr.complain("the second reader got %d bytes after the first got %d", len(second.Out), len(first.Out))
	}
	return whole == 1
}

// cat reads the secret.
func (tr *trial) cat(mount *exec.Cmd) rig.Result { return tr.reader(mount, "cat", tr.secret()) }

// reader reads in a process of its own. One that waits for an answer that never
// comes cannot even be killed: then the mount has to go.
func (tr *trial) reader(mount *exec.Cmd, program ...string) rig.Result {
	cmd := exec.Command(program[0], program[1:]...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	hung := time.AfterFunc(trialPatience/2, func() { mount.Process.Kill() })
	cmd.Run()
	if !hung.Stop() {
		tr.complain("a reader hung")
	}
	return rig.Result{Code: cmd.ProcessState.ExitCode(), Out: out.String(), Err: errs.String()}
}

// afterMount checks what must hold when every process is gone.
func (tr *trial) afterMount() {
	mounted := tr.mounted()
	if mounted {
		var st unix.Stat_t
		if err := unix.Lstat(tr.target, &st); err != unix.ENOTCONN {
			tr.complain("a mount is there, half alive: stat says %v", err)
		}
		if !tr.violent() && !strings.Contains(tr.stderr, "unmount") {
			tr.complain("a dead mount is left, and nobody was told")
		}
	}
	tr.keeps(tr.enc, tr.encrypted)
	tr.passphraseFile(mounted)
	if !tr.ready && !tr.violent() {
		if tr.code == 0 {
			tr.complain("it was never ready, and exits with 0")
		} else {
			tr.speaks()
		}
	}
	if mounted || tr.exists("config/secrets.yaml") || tr.isMount(tr.aside()) {
		tr.heal()
	}
	if !mounted {
		tr.keeps("config/other", []byte("other"))
	}
	tr.left("config/other")
}

func (tr *trial) exists(name string) bool { _, err := os.Lstat(tr.path(name)); return err == nil }

func (tr *trial) mounted() bool { return tr.isMount(tr.target) }

// aside is the name that a mount over a file has for the instant before it goes.
func (tr *trial) aside() string { return tr.path("config/.secrets.yaml.oncefs-spent") }

func (tr *trial) isMount(path string) bool {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		tr.complain("%v", err)
	}
	return strings.Contains(string(b), " "+path+" ")
}

// keeps looks that a file is what it was.
func (tr *trial) keeps(name string, want []byte) {
	info, err := os.Lstat(tr.path(name))
	b, readErr := os.ReadFile(tr.path(name))
	if err = errors.Join(err, readErr); err != nil || !bytes.Equal(b, want) || info.Mode() != 0o600 {
		tr.complain("%s is not what it was: %d bytes, %v", name, len(b), err)
	}
}

// passphraseFile: whole, or gone with the mount ready; never both lost.
func (tr *trial) passphraseFile(mounted bool) {
	if tr.exists("pw") {
		tr.keeps("pw", []byte(tr.passphrase+"\n"))
		return
	}
	// Killed itself, between the removal and the word: that is the death of a ready
	// mount. Its readers see that it is dead.
	between := tr.violent() && mounted && (tr.order.Role == daemonRole || tr.crashed())
	if tr.private {
		// With the processes that it is for, the mount goes.
		between = tr.violent() && (slices.Contains([]string{"run", "supervisor", "server"}, tr.order.Role) || tr.crashed())
	}
	if !tr.ready && !between {
		tr.complain("the passphrase file is gone and the mount never was ready")
	}
}

// left looks for files of ours that should not be there.
func (tr *trial) left(known ...string) {
	known = append(known, "config", "tmp", "pw", tr.enc, "tmp/command", "tmp/alarm")
	var names []string
	for _, dir := range []string{"config", "tmp", "."} {
		entries, _ := os.ReadDir(tr.path(dir))
		for _, e := range entries {
			if name := filepath.Join(dir, e.Name()); !slices.Contains(known, name) && filepath.Ext(name) != ".prom" { // which stays
				names = append(names, name)
			}
		}
	}
	// What cannot be removed is there; then it must have been said.
	if len(names) > 0 && !tr.violent() && !strings.Contains(tr.stderr, "remove") && !strings.Contains(tr.stderr, "unmount") {
		tr.complain("left behind: %v", names)
	}
}

// search looks for plaintext where none may be.
func (tr *trial) search() {
	filepath.WalkDir(tr.dir, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, unix.ENOTCONN) {
			return fs.SkipDir // a dead mount
		}
		if err != nil || !e.Type().IsRegular() {
			return nil
		}
		name, _ := filepath.Rel(tr.dir, path)
		if name == "pw" || name == "new" || name == "secrets.yaml" || strings.HasPrefix(name, "plain/") {
			return nil
		}
		_, found, err := tr.ix.file(path)
		if err != nil {
			tr.complain("search %s: %v", name, err)
		}
		if len(found) > 0 {
			tr.complain("a secret is in %s: %v", name, found)
		}
		return nil
	})
}

func (tr *trial) nothingSaid() {
	found := hits{}
	tr.ix.search([]byte(tr.stdout+tr.stderr), found)
	if len(found) > 0 {
		tr.complain("a secret was said: %v", found)
	}
}

// plainly is a run of the program without a fault.
func (tr *trial) plainly(args ...string) (next *trial, cmd *exec.Cmd, ready, ended <-chan struct{}) {
	next = &trial{faults: tr.faults, dir: tr.dir, target: tr.target}
	cmd = exec.Command(tr.bin, args...)
	ready, ended = next.start(cmd)
	return next, cmd, ready, ended
}

// heal shows that the next mount clears away whatever was left.
func (tr *trial) heal() {
	tr.write("pw", tr.passphrase+"\n")
	next, cmd, ready, ended := tr.plainly(mountArguments(tr)...)
	select {
	case <-ready:
		if got := next.cat(cmd); got.Out != string(tr.content) {
			tr.complain("after healing the reader got %d bytes: %s", len(got.Out), got.Err)
		}
		cmd.Process.Signal(unix.SIGTERM)
	case <-ended:
	case <-time.After(trialPatience):
	}
	next.wait(cmd, ended, "the next mount")
	if next.code != 0 || !strings.Contains(next.stdout, "ready") {
		tr.complain("the next mount did not heal it: exit %d: %s", next.code, strings.TrimSpace(next.stderr))
	}
	if next.mounted() || next.isMount(next.aside()) {
		tr.complain("the next mount is left")
	}
	tr.wrong = append(tr.wrong, next.wrong...)
}

// wrongPassphrase is a start that fails and leaves all as it was.
func (tr *trial) wrongPassphrase() {
	tr.write("pw", tr.other+"\n")
	tr.toEnd()
	if tr.mounted() || strings.Contains(tr.stdout, "ready") {
		tr.complain("it mounted something")
		unix.Unmount(tr.target, unix.MNT_DETACH)
	}
	if tr.code == 0 {
		tr.complain("exit 0 with a wrong passphrase")
	} else if !tr.violent() {
		tr.speaks()
	}
	tr.keeps("pw", []byte(tr.other+"\n"))
	tr.keeps(tr.enc, tr.encrypted)
	tr.left("config/other")
}

// opens tells whether a passphrase opens a message, by decrypting it, and whether
// the content is inside.
func (tr *trial) opens(name, passphraseFile, content string) bool {
	r := tr.decrypted(name, passphraseFile)
	return r.Code == 0 && r.Out == content
}

func (tr *trial) decrypted(name, passphraseFile string) rig.Result {
	return rig.Exec(tr.t, exec.Command(tr.bin, "decrypt", tr.path(name), "--passphrase-file", tr.path(passphraseFile)))
}

// encrypt encrypts over another message, and removes the plaintext.
func (tr *trial) encrypt() {
	tr.write("secrets.yaml", string(tr.content))
	tr.write("secrets.yaml.enc", string(tr.older))
	tr.toEnd()
	gone := !tr.exists("secrets.yaml")
	if !gone {
		tr.keeps("secrets.yaml", tr.content)
	}
	out, err := os.ReadFile(tr.path("secrets.yaml.enc"))
	replaced := err == nil && !bytes.Equal(out, tr.older)
	switch {
	case err != nil:
		tr.complain("the output that was there is lost: %v", err)
	case replaced && !tr.opens("secrets.yaml.enc", "pw", string(tr.content)):
		tr.complain("the output is not a whole message")
	case gone && !replaced:
		tr.complain("the plaintext is gone and there is no output")
	case tr.code == 0 && (!gone || !replaced):
		tr.complain("exit 0, and not all was done: gone %v, output %v", gone, replaced)
	case tr.code != 0 && !tr.violent():
		tr.speaks()
	}
	tr.ready = replaced
	tr.keeps("pw", []byte(tr.passphrase+"\n"))
	tr.left("config/other", "secrets.yaml")
}

// encryptBundle encrypts a directory over another message.
func (tr *trial) encryptBundle() {
	os.Mkdir(tr.path("plain"), 0o700)
	os.Mkdir(tr.path("plain/keys"), 0o700)
	for _, file := range tr.inBundle() {
		tr.write("plain/"+file.name, string(file.bytes))
	}
	tr.write("plain.tar.enc", string(tr.older))
	tr.toEnd()
	for _, file := range tr.inBundle() {
		tr.keeps("plain/"+file.name, file.bytes)
	}
	out, err := os.ReadFile(tr.path("plain.tar.enc"))
	replaced := err == nil && !bytes.Equal(out, tr.older)
	switch {
	case err != nil:
		tr.complain("the output that was there is lost: %v", err)
	case replaced && !tr.unpacks("plain.tar.enc"):
		tr.complain("the output is not a whole bundle")
	case tr.code == 0 && !replaced:
		tr.complain("exit 0, and there is no output")
	case tr.code != 0 && !tr.violent():
		tr.speaks()
	}
	tr.ready = replaced
	tr.keeps("pw", []byte(tr.passphrase+"\n"))
	tr.left("config/other", "plain", "plain.tar.enc")
}

// unpacks tells whether a message holds the bundle's files, and is whole.
func (tr *trial) unpacks(name string) bool {
	files := map[string]string{}
	for r := tar.NewReader(strings.NewReader(tr.decrypted(name, "pw").Out)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return false
		}
		b, err := io.ReadAll(r)
		if err != nil {
			return false
		}
		if h.Typeflag == tar.TypeReg {
			files[strings.TrimPrefix(h.Name, "./")] = string(b)
		}
	}
	for _, file := range tr.inBundle() {
		if files[file.name] != string(file.bytes) {
			return false
		}
	}
	return len(files) == len(tr.inBundle())
}

// edit has a line put at the end. The encrypted file is the old one or the new
// one, and what was edited is not lost without a word.
func (tr *trial) edit() {
	const name, beside = "binary.enc", "binary.enc.edited"
	tr.write(name, string(tr.encrypted))
	tr.toEnd()
	edited := string(tr.content) + "changed\n"
	b, err := os.ReadFile(tr.path(name))
	replaced := err == nil && !bytes.Equal(b, tr.encrypted)
	kept := tr.exists(beside)
	switch {
	case err != nil:
		tr.complain("the encrypted file is lost: %v", err)
	case replaced && !tr.opens(name, "pw", edited):
		tr.complain("what replaced it does not hold what was edited")
	case kept && !tr.opens(beside, "pw", edited):
		tr.complain("what is beside it does not hold what was edited")
	case tr.code == 0 && (!replaced || kept):
		tr.complain("exit 0, and replaced %v, another beside it %v", replaced, kept)
	case tr.code != 0 && !tr.violent():
		tr.speaks()
		if strings.Contains(tr.stdout, "edited") && !replaced && !kept && !strings.Contains(tr.stderr, "lost") && !strings.Contains(tr.stderr, "the edit was not accepted") {
			tr.complain("what was edited is lost, and nobody was told")
		}
	}
	tr.ready = replaced || kept
	tr.keeps("pw", []byte(tr.passphrase+"\n"))
	tr.left("config/other", name, beside)
}

// command is a command that reads the secret, in a mount that only it sees.
func (tr *trial) command() {
	tr.private = true
	defer unix.Unmount(tr.target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) // where no private one could be had
	tr.toEnd()
	got := tr.stdout
	tr.stdout = "" // the command's
	tr.ready = strings.Contains(tr.stderr, `"msg":"ready"`) || got != ""
	tr.failed = got != string(tr.content)
	switch {
	case tr.code == 0 && tr.failed:
		tr.complain("exit 0, and the command got %d bytes", len(got))
	case !strings.HasPrefix(string(tr.content), got):
		tr.complain("the command got %d bytes of something else", len(got))
	case tr.code != 0 && !tr.violent() && !strings.Contains(tr.stderr, "cat: "):
		tr.speaks()
	}
	tr.afterMount()
}

// rekey replaces the message by one with another passphrase.
func (tr *trial) rekey() {
	tr.write("new", tr.other+"\n")
	tr.toEnd()
	b, err := os.ReadFile(tr.path("secrets.yaml.enc"))
	replaced := err == nil && !bytes.Equal(b, tr.encrypted)
	switch {
	case err != nil:
		tr.complain("the encrypted file is lost: %v", err)
	case replaced && !tr.opens("secrets.yaml.enc", "new", string(tr.content)):
		tr.complain("what replaced it does not open")
	case tr.code == 0 && !replaced:
		tr.complain("exit 0, and it was not replaced")
	case tr.code != 0 && !tr.violent():
		tr.speaks()
	}
	tr.ready = replaced
	tr.keeps("pw", []byte(tr.passphrase+"\n"))
	tr.keeps("new", []byte(tr.other+"\n"))
	tr.left("config/other", "new")
}

// umount takes off the mount of another process, in which there is no fault.
func (tr *trial) umount() {
	next, cmd, ready, ended := tr.plainly(mountArguments(tr)...)
	defer unix.Unmount(tr.target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	select {
	case <-ready:
	case <-ended:
		tr.complain("no mount: %s", next.stderr)
		return
	case <-time.After(trialPatience):
		tr.complain("no mount in time")
		cmd.Process.Kill()
		<-ended
		return
	}
	tr.toEnd()
	switch mounted := tr.mounted(); {
	case tr.code == 0 && mounted:
		tr.complain("exit 0, and it is mounted")
	case tr.code != 0 && !tr.violent():
		tr.speaks()
		fallthrough
	default:
		tr.ready = !mounted
		if mounted {
			// As it was: it serves, once.
			if got := next.cat(cmd); got.Out != string(tr.content) {
				tr.complain("the mount that stayed gave %d bytes: %s", len(got.Out), got.Err)
			}
			cmd.Process.Signal(syscall.SIGTERM)
		}
	}
	next.wait(cmd, ended, "the mount that was to end")
	if next.code != 0 || tr.mounted() {
		tr.complain("the mount's end: exit %d, mounted %v: %s", next.code, tr.mounted(), next.stderr)
	}
	tr.wrong = append(tr.wrong, next.wrong...)
	tr.keeps(tr.enc, tr.encrypted)
	tr.keeps("config/other", []byte("other"))
	tr.left("config/other")
}
