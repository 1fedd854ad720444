// Package supervisor runs a command beside the process that serves its secrets.
//
//	front ──▶ supervisor ──┬─▶ server ──▶ warden, decryptor (as for mount)
//	                       └─▶ launcher, which becomes the command
//
// All are this binary in a role; none but the server's holds a secret, and none
// here a passphrase. The front is what the caller started. It stays in the
// caller's namespaces, passes signals on and returns the command's status. The
// supervisor is in a mount namespace of its own, where that can be had, and with
// it all that it starts: the mount is for the command and its children, and
// whoever enters the caller's namespaces later finds nothing. It is not the
// front, because a container's runtime lets others into the namespaces of the
// process that it started.
//
// The launcher waits, its privileges given up, until the server is ready; then
// it is the command. Each process sees by the end of its link that the one
// before it is gone, however it ended, and takes down what it had: the
// supervisor kills the command, the server unmounts and zeroes.
//
// All of them are reapers of orphans (PR_SET_CHILD_SUBREAPER), so that nothing
// that the command left behind outlives it.
package supervisor

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Role is what a process of ours is for.
type Role string

const (
	Supervisor Role = "supervisor"
	Serving    Role = "server"
	Launching  Role = "launcher"
)

// A Restart says after which end of the command it is started again.
type Restart string

const (
	Never     Restart = "no"
	OnFailure Restart = "on-failure"
	Always    Restart = "always"
)

// The pause before a restart is a kubelet's, which begins with 10 s: it doubles
// up to 5 min, and is the first again once the command ran for 10 min.
const (
	longestPause = 30
	forgivenPast = 60
)

// leftGrace is how long what the command left behind has between SIGTERM and
// SIGKILL, as long as Docker gives by half: it is no more than leftovers.
const leftGrace = 5 * time.Second

// Options say how to supervise.
type Options struct {
	Binary  string
	Args    func(r Role, control int) []string
	Control int // the front's link
	// Private makes mounts private, in a namespace that the front has made.
	Private func() error
	// Undump makes this process untraceable.
	Undump func() error
	// Restart says when the command is started again, Delay after what pause.
	Restart Restart
	Delay   time.Duration
	// Fatal is the status with which the server ends where the command is to be
	// ended too, and not started again; it is the status of Run then.
	Fatal int
	// Tell notes an event.
	Tell func(level slog.Level, name string, attrs ...slog.Attr)
}

type supervisor struct {
	Options
	reap     *reaper
	front    *link
	gone     bool // the front is
	server   *child
	ready    bool // the server is
	launcher *child
	prepared bool             // the launcher is
	failed   bool             // to exec
	starting bool             // it was told to be the command
	running  bool             // the launcher is the command now
	held     []syscall.Signal // came while it was starting
	stopping bool             // somebody wants it to end
	ended    time.Time        // when the command did
	cleared  bool             // nothing is left of it
	reply    string           // of the server to an order
	timer    <-chan time.Time
	rested   bool // the timer has fired
}

// Run is the supervisor. It returns the command's exit status, or that of a
// process that ended before the command ran and has said why.
func Run(o Options) (status int, err error) {
	// The command is to die with this thread.
	runtime.LockOSThread()
	// What is for us comes through the front. A terminal, or who signals the
	// whole group, must not end us before the command.
	signal.Notify(make(chan os.Signal, 1), relayed()...)
	s := &supervisor{Options: o}
	if s.reap, err = newReaper(); err != nil {
		return 0, err
	}
	if s.front, err = newLink(o.Control); err != nil {
		return 0, err
	}
	defer s.front.close()
	switch greeting := <-s.front.lines; {
	case greeting == "private":
		if err := o.Private(); err != nil {
			return 0, s.front.say("no " + err.Error())
		}
	case greeting == "shared":
	case strings.HasPrefix(greeting, "shared "):
		s.Tell(slog.LevelWarn, "no-private-mount", slog.String("why", strings.TrimPrefix(greeting, "shared ")),
			slog.String("hint", "others in this mount namespace can see the mount; --require private refuses"))
	default:
		return 0, cmp.Or(s.front.broken, errors.New("the process that started the supervisor is gone"))
	}
	if err := o.Undump(); err != nil {
		return 0, err
	}
	if err := s.front.say("up"); err != nil {
		return 0, err
	}
	status, err = s.run()
	s.end()
	if err == nil {
		// The server may have been about to end so when the command did.
		status = s.outcome(status)
	}
	return status, err
}

func (s *supervisor) run() (int, error) {
	if err := s.launch(); err != nil {
		return 0, err
	}
	if !s.prepared {
		return s.unready()
	}
	server, err := s.start(Serving)
	if err != nil {
		return 0, err
	}
	s.server = server
	if s.until(func() bool { return s.ready || s.server.ended || s.server.lines == nil }); !s.ready {
		s.server.close() // one that could not tell that it is ready ends by it
		s.until(func() bool { return s.server.ended })
		return s.unready()
	}
	for pause := time.Duration(0); ; {
		began := time.Now()
		if err := s.command(); err != nil {
			return 0, err
		}
		if s.launcher.lost != nil {
			return 0, s.launcher.lost
		}
		ran := s.ended.Sub(began)
		status := code(s.launcher.status)
		if !s.again() {
			return s.outcome(status), nil
		}
		pause = next(pause, s.Delay, ran)
		if !s.rest(pause) {
			return s.outcome(status), nil
		}
		if err := s.launch(); err != nil {
			return 0, err
		}
		if s.prepared && !s.order(Arm) {
			// Expired, held too long, or the server is gone: no start without it.
			s.Tell(slog.LevelError, "secret-lost", slog.String("why", s.reply))
			return s.outcome(status), nil
		}
	}
}

// command lets the launcher be the command and waits for its end, and for that
// of all that it leaves.
func (s *supervisor) command() error {
	if s.prepared {
		if err := s.launcher.say("go"); err != nil {
			return err
		}
		s.starting = true
		for s.launcher.lines != nil { // until the exec, or its failure
			s.step()
		}
		s.starting, s.running = false, !s.failed
	}
	if s.running {
		s.Tell(slog.LevelInfo, "command-started", slog.Int("pid", s.launcher.pid))
		if err := s.front.say("started"); err != nil {
			s.Tell(slog.LevelError, "not-announced", slog.String("error", err.Error()))
		}
		for _, n := range s.held {
			s.pass(n)
		}
		s.until(s.fatal)
	}
	s.held = nil
	s.ended = time.Now()
	if s.Restart != Never {
		// Until it is armed again nobody has it, whatever is running still.
		s.order(Disarm)
	}
	if s.launcher.ended {
		s.tellEnd()
	}
	s.clear()
	return nil
}

// next is the pause after one that was last, 0 for none, and a command that ran
// for so long.
func next(last, first, ran time.Duration) time.Duration {
	if last == 0 || ran >= forgivenPast*first {
		return first
	}
	return min(2*last, longestPause*first)
}

// fatal tells whether the server ended in the way that ends the command.
func (s *supervisor) fatal() bool {
	return s.Fatal != 0 && s.server != nil && s.server.ended && code(s.server.status) == s.Fatal
}

// outcome is the status of Run after a command that ended with that status.
func (s *supervisor) outcome(status int) int {
	if s.fatal() {
		return s.Fatal
	}
	return status
}

// again tells whether the command is to be started again.
func (s *supervisor) again() bool {
	// What is left of one start must not get what the next is served.
	if s.stopping || s.gone || s.server.ended || !s.cleared {
		return false
	}
	return s.Restart == Always || s.Restart == OnFailure && code(s.launcher.status) != 0
}

// rest waits before a restart, and returns false if there is to be none.
func (s *supervisor) rest(pause time.Duration) bool {
	s.Tell(slog.LevelWarn, "restart", slog.String("in", pause.String()))
	s.timer, s.rested = time.After(pause), false
	for !s.rested {
		if s.stopping || s.gone || s.server.ended {
			return false
		}
		s.step()
	}
	return true
}

// An Order is what the supervisor wants of the server.
type Order string

const (
	Arm    Order = "arm"    // serve the secrets once more
	Disarm Order = "disarm" // serve them to nobody
)

const done = "done"

// order gives an order and waits until it is done.
func (s *supervisor) order(o Order) bool {
	s.reply = ""
	if err := s.server.say(string(o)); err != nil {
		s.reply = err.Error()
		return false
	}
	for s.reply == "" && !s.server.ended && s.server.lines != nil {
		s.step()
	}
	return s.reply == done
}

// start starts this binary in a role.
func (s *supervisor) start(r Role) (*child, error) {
	return start(s.Binary, func(control int) []string { return s.Args(r, control) }, os.Environ(), nil)
}

// launch starts a launcher and waits until it is prepared, or ended.
func (s *supervisor) launch() (err error) {
	if s.launcher != nil {
		s.launcher.close()
	}
	s.prepared, s.failed, s.running = false, false, false
	if s.launcher, err = s.start(Launching); err != nil {
		return err
	}
	if s.until(func() bool { return s.prepared || s.launcher.lines == nil }); !s.prepared {
		s.launcher.close() // one that could not tell that it is prepared ends by it
		s.until(func() bool { return false })
	}
	return nil
}

// unready is the status where the command was never started: that of the process
// that failed and has said why.
func (s *supervisor) unready() (int, error) {
	for _, c := range []*child{s.server, s.launcher} {
		if c != nil && c.lost != nil {
			return 0, c.lost
		}
		if c != nil && c.lines == nil && c.broken != nil {
			return 0, c.broken
		}
	}
	for _, c := range []*child{s.server, s.launcher} {
		if c != nil && c.ended && c.status.Exited() && c.status.ExitStatus() != 0 {
			return c.status.ExitStatus(), nil
		}
	}
	for _, c := range []*child{s.server, s.launcher} {
		if c != nil && c.ended && !s.stopping && !(c.status.Signaled() && stops(int(c.status.Signal()))) {
			return 0, fmt.Errorf("a process ended before the command was started: status %d", code(c.status))
		}
	}
	return 0, ErrStopped
}

// ErrStopped says that somebody wanted it to end before the command ran.
var ErrStopped = fmt.Errorf("stopped before the command was started")

func stops(n int) bool {
	switch syscall.Signal(n) {
	case unix.SIGTERM, unix.SIGINT, unix.SIGQUIT:
		return true
	}
	return false
}

// until waits for what f tells, or the end of the launcher or command, or the
// front's end.
func (s *supervisor) until(f func() bool) {
	for !f() && !s.launcher.ended && !s.gone {
		s.step()
	}
}

// step waits for one thing to happen and notes it.
func (s *supervisor) step() {
	var server, launcher <-chan string
	if s.server != nil {
		server = s.server.lines
	}
	if s.launcher != nil {
		launcher = s.launcher.lines
	}
	select {
	case line, ok := <-s.front.lines:
		if !ok {
			s.front.lines, s.gone = nil, true
			return
		}
		s.signal(line)
	case line, ok := <-server:
		if !ok {
			s.server.lines = nil
		}
		s.answer(line)
	case line, ok := <-launcher:
		switch {
		case !ok:
			s.launcher.lines = nil
		case line == "prepared":
			s.prepared = true
		case line == "failed":
			s.failed = true
		}
	case <-s.reap.wake:
		before := s.server == nil || s.server.ended
		s.reap.reap(s.server, s.launcher)
		if s.ready && !before && s.server.ended {
			s.serverEnded()
		}
	case <-s.timer:
		s.timer, s.rested = nil, true
	}
}

// answer is what the server says: that it is ready, or what came of an order.
func (s *supervisor) answer(line string) {
	if line == "ready" {
		s.ready = true
		return
	}
	s.reply = line
}

// serverEnded notes that there is no more to be read: as it should be for a
// mount over a file, else for the worse. The command may have had it all.
func (s *supervisor) serverEnded() {
	level := slog.LevelInfo
	if code(s.server.status) != 0 {
		level = slog.LevelError
	}
	s.Tell(level, "server-ended", slog.Int("status", code(s.server.status)))
}

// signal passes on what the front got: "signal N", or "saw N" where the command
// has had it too.
func (s *supervisor) signal(line string) {
	verb, number, _ := strings.Cut(line, " ")
	n, err := strconv.Atoi(number)
	if err != nil {
		return
	}
	if stops(n) {
		s.stopping = true
	}
	if verb != "signal" {
		return
	}
	switch {
	case s.running && !s.launcher.ended:
		s.pass(syscall.Signal(n))
	case s.starting && !stops(n):
		// It may be the command already, and have said so to whoever signals; or not
		// yet, and would end by it.
		s.held = append(s.held, syscall.Signal(n))
	case s.ready: // between two starts, or about to
		if stops(n) {
			s.pass(syscall.Signal(n))
		}
	case s.server != nil && !s.server.ended && (stops(n) || n == int(unix.SIGHUP)):
		unix.Kill(s.server.pid, unix.SIGTERM)
	case stops(n):
		s.pass(unix.SIGTERM)
	}
}

// pass passes a signal on to the command, or to the launcher.
func (s *supervisor) pass(n syscall.Signal) {
	if !s.launcher.ended {
		unix.Kill(s.launcher.pid, n)
	}
}

func (s *supervisor) tellEnd() {
	ws := s.launcher.status
	attrs := []slog.Attr{slog.Int("pid", s.launcher.pid), slog.Int("status", code(ws))}
	if ws.Signaled() {
		attrs = append(attrs, slog.String("signal", unix.SignalName(ws.Signal())))
	}
	s.Tell(slog.LevelInfo, "command-ended", attrs...)
}

// clear ends whatever the command left behind, and the command if it still is.
func (s *supervisor) clear() {
	except := 0
	if s.server != nil {
		except = s.server.pid
	}
	n, gone := killAll(s.reap, except, leftGrace, s.server, s.launcher)
	if n > 0 && s.running {
		s.Tell(slog.LevelWarn, "leftovers-ended", slog.Int("count", n))
	}
	if !gone {
		s.Tell(slog.LevelError, "leftovers-remain")
	}
	s.cleared = gone
}

// end takes everything down.
func (s *supervisor) end() {
	if s.launcher != nil {
		s.launcher.close() // one that waits ends by it
	}
	s.clear()
	if s.server == nil {
		return
	}
	s.server.close() // it unmounts, zeroes and ends
	for timeout := time.After(leftGrace); !s.server.ended; {
		select {
		case <-s.reap.wake:
			s.reap.reap(s.server)
		case <-timeout:
			unix.Kill(s.server.pid, unix.SIGKILL)
			return
		}
	}
}

// killAll ends all children but one: SIGTERM, and after the grace SIGKILL. What
// they leave comes to us and is ended too. It returns how many there were, and
// whether all are gone: one may hang in the kernel, or they may be too many.
func killAll(r *reaper, except int, grace time.Duration, known ...*child) (n int, gone bool) {
	asked := map[int]bool{}
	kill, giveUp := time.After(grace), time.After(2*grace)
	force := false
	for {
		r.reap(known...)
		left := ownChildren(except)
		if len(left) == 0 {
			return len(asked), true
		}
		for _, pid := range left {
			if force {
				unix.Kill(pid, unix.SIGKILL)
			} else if !asked[pid] {
				unix.Kill(pid, unix.SIGTERM)
			}
			asked[pid] = true
		}
		select {
		case <-r.wake:
		case <-kill:
			force = true
		case <-giveUp:
			return len(asked), false
		}
	}
}

// A Served is the server's link to its supervisor.
type Served struct{ link *link }

// NewServed takes the inherited descriptor.
func NewServed(control int) (*Served, error) {
	l, err := newLink(control)
	return &Served{l}, err
}

// Ready says that the mount is ready. If that cannot be said, nobody will want it.
func (s *Served) Ready() error { return s.link.say("ready") }

// Obey does what the supervisor orders, and returns when the supervisor is gone
// or wants the server to be.
func (s *Served) Obey(do func(Order) error) {
	for line := range s.link.lines {
		reply := done
		if err := do(Order(line)); err != nil {
			reply = "not done: " + strings.ReplaceAll(err.Error(), "\n", "; ")
		}
		if s.link.say(reply) != nil {
			return // the supervisor sees it by the end of our lines
		}
	}
}
