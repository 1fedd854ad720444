package attack

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"oncefs/integration/rig"
)

// hostileSize is more than one reply holds, and no multiple of a page.
const hostileSize = 300_001

// patience is how long the mount may take to answer a stat on a machine that is
// busy with other things. What hangs, hangs for longer.
const patience = 20 * time.Second

// A target is a mount that is attacked, with all that attackers are told.
type target struct {
	*rig.Dir
	t    testing.TB
	m    *rig.Mount
	path string // what is mounted on
	temp string // for attackers
}

func newTarget(t testing.TB, over string, args ...string) *target {
	t.Helper()
	d := rig.NewDir(t, hostileContent(hostileSize))
	d.Write("config/other.txt", []byte("other"))
	os.Mkdir(filepath.Join(d.Conf, "sub"), 0o755)
	d.Write("config/sub/deep.txt", []byte("deep"))
	os.Symlink("other.txt", filepath.Join(d.Conf, "link"))
	h := &target{Dir: d, t: t, path: d.Conf, temp: filepath.Join(d.Path, "temp")}
	os.Mkdir(h.temp, 0o777)
	os.Chmod(h.temp, 0o777)
	if over == "file" {
		h.path = d.Secret()
	}
	args = append([]string{"mount", h.path, "--enc", d.Enc, "--passphrase-file", d.Pass}, args...)
	h.m = rig.Start(t, exec.Command(rig.Binary(t), args...), h.path)
	h.m.WaitReady()
	return h
}

func (h *target) command(j job) *exec.Cmd {
	h.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		h.t.Fatal(err)
	}
	j.Dir, j.Secret, j.Size, j.Temp = h.Conf, h.Secret(), hostileSize, h.temp
	text, _ := json.Marshal(j)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute) // who hangs, fails
	h.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, exe, "hostile", string(text))
	cmd.Stderr = os.Stderr
	cmd.Dir = h.temp // relative paths are attacked too
	return cmd
}

// attack runs one hostile process to its end.
func (h *target) attack(j job) verdict {
	h.t.Helper()
	cmd := h.command(j)
	out, err := cmd.Output()
	if err != nil {
		h.t.Errorf("%s: %v", j.Do, err)
	}
	return h.judge(j, out)
}

func (h *target) judge(j job, out []byte) (v verdict) {
	h.t.Helper()
	if err := json.Unmarshal(out, &v); err != nil {
		h.t.Errorf("%s (seed %d): %v: %.200q", j.Do, j.Seed, err, out)
	}
	if v.Wrong != "" {
		h.t.Errorf("%s (seed %d): %s", j.Do, j.Seed, v.Wrong)
	}
	return v
}

// A talker is a hostile process that is told what to do, a line each.
type talker struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func (h *target) talk(j job) *talker {
	h.t.Helper()
	w := &talker{t: h.t, cmd: h.command(j)}
	w.in, _ = w.cmd.StdinPipe()
	out, _ := w.cmd.StdoutPipe()
	w.out = bufio.NewReader(out)
	if err := w.cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(w.kill)
	return w
}

func (w *talker) hear() string {
	line, err := w.out.ReadString('\n')
	if err != nil {
		return err.Error()
	}
	return strings.TrimSuffix(line, "\n")
}

func (w *talker) say(line string) string {
	io.WriteString(w.in, line+"\n")
	return w.hear()
}

func (w *talker) want(want, line string) {
	w.t.Helper()
	if got := w.say(line); got != want {
		w.t.Errorf("%s: %s, want %s", line, got, want)
	}
}

func (w *talker) kill() {
	if w.cmd.ProcessState == nil {
		w.cmd.Process.Kill()
		w.cmd.Wait()
	}
}

// status is the exit status of oncefs status: 0 sealed, 90 claimed, 91 spent.
func (h *target) status() int { return rig.Run(h.t, "status", h.path).Code }

// settles waits until nobody has the secret any more.
func (h *target) settles(want int) {
	h.t.Helper()
	rig.WaitFor(h.t, fmt.Sprintf("status %d", want), func() bool { return h.status() == want })
}

// whole shows that the next reader gets all of it.
func (h *target) whole() {
	h.t.Helper()
	if got := rig.Cat(h.t, h.Secret()); got.Out != string(hostileContent(hostileSize)) {
		h.t.Errorf("a rightful reader got %d bytes of %d: %s", len(got.Out), hostileSize, got.Err)
	}
}

// gone shows that nobody finds it.
func (h *target) gone() {
	h.t.Helper()
	if v := h.attack(job{Do: "whole"}); v.Outcomes["read"]["ENOENT"] != 1 {
		h.t.Errorf("after the end: %v", v.Outcomes)
	}
	if _, err := os.Lstat(h.Secret()); !errors.Is(err, os.ErrNotExist) {
		h.t.Errorf("after the end: stat: %v", err)
	}
}

// stops shows that the daemon ends as it should, at once, and leaves nothing.
func (h *target) stops() {
	h.t.Helper()
	if r := h.m.Stop(); r.Code != 0 || strings.Contains(r.Err, "panic") || strings.Contains(r.Err, "goroutine") {
		h.t.Errorf("end: %+v", r)
	}
	if rig.Mounted(h.t, h.path) {
		h.t.Error("still mounted")
	}
	if failures := h.m.Events("failure"); len(failures) > 0 {
		h.t.Errorf("failures: %v", failures)
	}
}

// usage is what the daemon and its warden take.
type usage struct{ memory, descriptors, threads int }

func (h *target) usage() (u usage) {
	h.t.Helper()
	pids := []int{h.m.Cmd.Process.Pid}
	if w := rig.Child(pids[0], "internal-warden"); w != 0 {
		pids = append(pids, w)
	}
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			h.t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			key, value, _ := strings.Cut(line, ":")
			n, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
			switch key {
			case "VmRSS":
				u.memory += n
			case "Threads":
				u.threads += n
			}
		}
		fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		u.descriptors += len(fds)
	}
	return u
}

// bounded compares what is taken after an attack with before. A file under the
// mount that is being read is open for a moment: that is waited for.
func (h *target) bounded(before usage) usage {
	h.t.Helper()
	var after usage
	rig.WaitFor(h.t, "descriptors to be closed", func() bool {
		after = h.usage()
		return after.descriptors <= before.descriptors+2
	})
	// Go keeps threads and gives memory back late: bounds, not equality.
	if after.threads > before.threads+100 || after.memory > before.memory+128<<10 {
		h.t.Errorf("it grew from %+v to %+v", before, after)
	}
	return after
}

// outcomes is a table: calls × states.
type outcomes struct {
	states []string
	rows   map[string]map[string]map[string]int
}

func (o *outcomes) add(state string, v verdict) {
	if o.rows == nil {
		o.rows = map[string]map[string]map[string]int{}
	}
	if !slices.Contains(o.states, state) {
		o.states = append(o.states, state)
	}
	for call, results := range v.Outcomes {
		if o.rows[call] == nil {
			o.rows[call] = map[string]map[string]int{}
		}
		if o.rows[call][state] == nil {
			o.rows[call][state] = map[string]int{}
		}
		for result, n := range results {
			o.rows[call][state][result] += n
		}
	}
}

func (o *outcomes) String() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "call\t%s\n", strings.Join(o.states, "\t"))
	for _, call := range slices.Sorted(maps.Keys(o.rows)) {
		fmt.Fprint(w, call)
		for _, state := range o.states {
			results := slices.Sorted(maps.Keys(o.rows[call][state]))
			if len(results) > 6 {
				results = append(results[:5], fmt.Sprintf("and %d more", len(results)-5))
			}
			fmt.Fprintf(w, "\t%s", strings.Join(results, " "))
		}
		fmt.Fprintln(w)
	}
	w.Flush()
	return b.String()
}

// Programs that try everything, in every state, over a directory and over a
// file: once each what takes skill, then random system calls. All the while
// another file under the mount is asked for, and must answer.
func TestC2_HostileReaders(t *testing.T) {
	rig.Root(t)
	seed, n := uint64(1), 60_000
	if testing.Short() {
		n = 3000
	}
	if s := os.Getenv("ONCEFS_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d, %d random calls for each state (others with ONCEFS_SEED=N)", seed, n)
	table := &outcomes{}
	var grew strings.Builder
	for _, over := range []string{"directory", "file"} {
		for _, state := range []string{"sealed", "another's", "its own", "spent"} {
			if over == "file" && (state == "spent" || testing.Short() && state != "another's") {
				continue // spent, there is neither a mount nor a daemon
			}
			t.Run(over+"/"+state, func(t *testing.T) {
				line := hostileState(t, over, state, seed, n, table)
				fmt.Fprintln(&grew, line)
			})
		}
	}
	t.Logf("system calls × states:\n%s\n%s", table, grew.String())
	for _, call := range []string{"open", "mmap", "ioctl", "io_uring read", "bind mount", "fanotify_mark"} {
		if table.rows[call] == nil {
			t.Errorf("%s was never tried", call)
		}
	}
	// The control: who has the claim must have got the content, by each way in.
	own := "directory/its own"
	if !testing.Short() {
		own = "file/its own"
	}
	for _, call := range []string{"read", "mmap private", "sendfile", "splice", "io_uring read"} {
		if table.rows[call][own]["whole"] == 0 {
			t.Errorf("%s by the reader who has it: %v", call, table.rows[call][own])
		}
	}
}

func hostileState(t *testing.T, over, state string, seed uint64, n int, table *outcomes) string {
	args := []string{"--reads", "1000000"}
	if state == "spent" {
		args = nil
	}
	h := newTarget(t, over, args...)
	var holder *talker
	j := job{}
	switch state {
	case "another's":
		holder = h.talk(job{Do: "holder"})
		holder.want("ok", "open")
		holder.want("ok", "byte")
		j.Holder = holder.cmd.Process.Pid
		j.Fd, _ = strconv.Atoi(holder.say("fd"))
	case "its own":
		j.Claim = true
	case "spent":
		h.whole()
		h.settles(91)
	}
	watch := h.talk(job{Do: "watch"})
	if got := watch.hear(); got != "watching" {
		t.Fatal(got)
	}
	before := h.usage()
	column := over + "/" + state
	for _, do := range []string{"acts", "mounts", "fuzz"} {
		j.Do, j.Seed, j.N = do, seed, n
		if do == "mounts" && j.Claim {
			continue // the same as another's
		}
		v := h.attack(j)
		table.add(column, v)
		if v.Seen && (state == "another's" || state == "spent") {
			t.Errorf("%s (seed %d): a piece of the content was seen", do, seed)
		}
		switch state {
		case "sealed", "its own":
			h.settles(0)
		case "another's":
			if got := h.status(); got != 90 {
				t.Errorf("%s: status %d", do, got)
			}
		case "spent":
			h.gone()
		}
	}
	io.WriteString(watch.in, "\n")
	out, _ := io.ReadAll(watch.out)
	watch.cmd.Wait()
	v := h.judge(job{Do: "watch"}, out)
	if v.Slowest > patience {
		t.Errorf("a stat took %v", v.Slowest)
	}
	after := h.bounded(before)
	switch state {
	case "another's":
		holder.want("whole", "whole")
		holder.want("ok", "close-all")
		h.settles(0)
		h.whole()
	case "sealed", "its own":
		h.whole()
	}
	h.stops()
	return fmt.Sprintf("%-22s slowest stat %8v   memory %6d → %6d KiB   descriptors %d → %d   threads %d → %d",
		column, v.Slowest.Round(time.Microsecond), before.memory, after.memory, before.descriptors, after.descriptors, before.threads, after.threads)
}

// Many open at once and read nothing: each has it or is told that it is not
// there, and at the end it is there.
func TestC4_OpenStorm(t *testing.T) {
	rig.Root(t)
	n := 2000
	if testing.Short() {
		n = 200
	}
	for _, over := range []string{"directory", "file"} {
		t.Run(over, func(t *testing.T) {
			h := newTarget(t, over)
			before := h.usage()
			var all []*exec.Cmd
			var outs []*strings.Builder
			for range 8 {
				c, out := h.command(job{Do: "storm", N: n}), &strings.Builder{}
				c.Stdout = out
				if err := c.Start(); err != nil {
					t.Fatal(err)
				}
				all, outs = append(all, c), append(outs, out)
			}
			got := map[string]int{}
			for i, c := range all {
				c.Wait()
				for outcome, n := range h.judge(job{Do: "storm"}, []byte(outs[i].String())).Outcomes["open"] {
					got[outcome] += n
				}
			}
			if got["ok"] == 0 || got["ok"]+got["ENOENT"] != 8*n {
				t.Errorf("opens: %v", got)
			}
			h.settles(0)
			h.bounded(before)
			h.whole()
			h.gone()
			if over == "file" {
				h.m.Wait() // ended by itself
				return
			}
			h.stops()
		})
	}
}

// A reader that is stopped while it has the secret stops nobody else, and not
// the daemon's end.
func TestC2_StoppedReaderStopsNobody(t *testing.T) {
	rig.Root(t)
	for _, over := range []string{"directory", "file"} {
		for _, begun := range []bool{false, true} {
			t.Run(fmt.Sprint(over, " begun=", begun), func(t *testing.T) {
				h := newTarget(t, over, "--reads", "2")
				holder := h.talk(job{Do: "holder"})
				holder.want("ok", "open")
				if begun {
					holder.want("ok", "byte")
				}
				holder.cmd.Process.Signal(syscall.SIGSTOP)
				defer holder.cmd.Process.Signal(syscall.SIGCONT)
				began := time.Now()
				for range 20 {
					if v := h.attack(job{Do: "storm", N: 20}); v.Outcomes["open"]["ENOENT"] != 20 {
						t.Errorf("opens: %v", v.Outcomes)
					}
				}
				if took := time.Since(began); took > patience {
					t.Errorf("others took %v", took)
				}
				if got := h.status(); got != 90 {
					t.Errorf("status %d", got)
				}
				h.stops()
				h.m.T = t
			})
		}
	}
}

// Thousands of copies of one descriptor, also in another process that got them
// over a socket, are one claim: the last close spends it.
func TestC5_ThousandsOfDescriptors(t *testing.T) {
	rig.Root(t)
	h := newTarget(t, "directory")
	before := h.usage()
	receiver := h.talk(job{Do: "receiver", N: 100})
	if got := receiver.hear(); got != "listening" {
		t.Fatal(got)
	}
	holder := h.talk(job{Do: "holder"})
	holder.want("ok", "open")
	holder.want("ok", "byte")
	holder.want("ok", "dup 3000")
	holder.want("ok", "pass "+filepath.Join(h.temp, "socket"))
	if got := receiver.hear(); got != "received" {
		t.Fatal(got)
	}
	h.bounded(before)
	holder.want("ok", "close-all")
	if got := h.status(); got != 90 {
		t.Errorf("3001 of 3101 descriptors are closed, and the status is %d", got)
	}
	receiver.want("whole", "go on")
	if n := len(h.m.Events("delivery")); n != 0 {
		t.Error("spent while 100 descriptors are open")
	}
	receiver.kill()
	h.m.WaitEvent("delivery", 1)
	h.settles(91)
	h.gone()
	h.stops()
}

// Threads that race on one descriptor each get what is at their offset.
func TestC6_ThreadsRaceOnOneDescriptor(t *testing.T) {
	rig.Root(t)
	n := 500
	if testing.Short() {
		n = 30
	}
	for _, over := range []string{"directory", "file"} {
		t.Run(over, func(t *testing.T) {
			h := newTarget(t, over)
			v := h.attack(job{Do: "threads", Claim: true, Seed: 1, N: n})
			if len(v.Outcomes["pread64"]) != 1 || v.Outcomes["pread64"]["ok"] != 16*n {
				t.Errorf("%v", v.Outcomes)
			}
			h.m.WaitEvent("delivery", 1)
			h.gone()
			if over == "directory" {
				h.stops()
			}
		})
	}
}

// Readers that are interrupted and killed at any moment lose only their own
// read.
func TestC5_SignalsAtBadMoments(t *testing.T) {
	rig.Root(t)
	rounds := 60
	if testing.Short() {
		rounds = 8
	}
	h := newTarget(t, "directory", "--reads", "1000000")
	before := h.usage()
	rng := rand.New(rand.NewPCG(3, 4))
	for range rounds {
		holder := h.talk(job{Do: "holder"})
		holder.want("ok", "open")
		for range rng.IntN(3) {
			io.WriteString(holder.in, "bytes 300\n")
			for range 20 {
				holder.cmd.Process.Signal(syscall.SIGUSR1)
			}
			if got := holder.hear(); got != "ok" && got != "interrupted system call" {
				t.Errorf("read under signals: %s", got)
			}
		}
		io.WriteString(holder.in, "bytes 100000\n")
		holder.kill()
		h.settles(0)
	}
	h.bounded(before)
	h.whole()
	h.stops()
}
