package fs

import (
	"errors"
	"sync"
	"time"

	"bazil.org/fuse"
	"golang.org/x/sys/unix"

	"oncefs/internal/once"
	"oncefs/internal/wait"
)

// A Lookup tells who a process is. Another process knows that: the one that holds
// the secret may not look.
type Lookup interface {
	// Ask asks about a process and does not wait. It is not called by two
	// goroutines at once.
	Ask(id uint64, pid uint32) error
	// Answer is the next answer, in the order of the questions, and does not wait:
	// an error that is unix.EAGAIN says that there is none yet, and any other that
	// there will be none any more.
	Answer() (id uint64, exe, cgroup string, err error)
	// FD is readable when Answer has something to tell.
	FD() int
}

// patience is how long an answer to the kernel waits for who it is for. It
// takes a fraction of a millisecond.
const patience = 2 * time.Second

// Who a thread is holds as long as it goes on asking: between two questions of it that
// come within briefly of each other it has no time to become another program, whose C
// library alone takes longer to start. (A program that is made to be quicker could as
// well be loaded into the one that the log will name.) It holds for lasting at most,
// for a process can be moved to another control group.
const (
	briefly = 25 * time.Microsecond
	lasting = time.Millisecond
)

// asking is the questions that were put to a Lookup. All methods may be called by
// several goroutines, but only one may hear.
type asking struct {
	lookup Lookup // nil where nobody can be looked up

	mu     sync.Mutex
	last   uint64
	out    []question // in their order
	dead   bool       // nobody answers any more
	latest latest
}

type question struct {
	id    uint64
	until time.Time
	then  func(exe, cgroup string) // nil: nobody waits for the answer
}

// add adds somebody who waits for the answer.
func (q *question) add(then func(exe, cgroup string)) {
	before := q.then
	if before == nil {
		q.then, q.until = then, time.Now().Add(patience)
		return
	}
	q.then = func(exe, cgroup string) {
		before(exe, cgroup)
		then(exe, cgroup)
	}
}

// latest is the thread that was asked about last.
type latest struct {
	pid         uint32 // 0: nobody
	id          uint64 // of the question
	asked       time.Time
	seen        time.Time // when it was last known to be the one
	lost        bool      // it may be another program by now
	found       bool      // it has looked a secret up and not opened one since
	exe, cgroup string    // once the question has its answer
}

// is tells whether the thread of that number was asked about not long ago.
func (l *latest) is(pid uint32) bool {
	return pid != 0 && l.pid == pid && time.Since(l.asked) <= lasting
}

// ask asks and does not wait. then is called once: by the goroutine that hears,
// or at once where nothing can be known. It must not block.
func (a *asking) ask(pid uint32, then func(exe, cgroup string)) {
	a.mu.Lock()
	asked := a.send(pid, then)
	a.mu.Unlock()
	if !asked {
		then("", "")
	}
}

// send asks, for who holds the lock.
func (a *asking) send(pid uint32, then func(exe, cgroup string)) bool {
	if a.lookup == nil || a.dead || pid == 0 {
		return false
	}
	a.last++
	if a.lookup.Ask(a.last, pid) != nil {
		return false
	}
	a.out = append(a.out, question{a.last, time.Now().Add(patience), then})
	return true
}

// foresee asks about a thread that has found a secret and will most likely open it,
// so that the answer is there when its read waits for it. One such question at a
// time: many may look and never open. It is for who hears.
func (a *asking) foresee(pid uint32) {
	a.take()
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.latest.is(pid) || a.latest.lost {
		a.latest = latest{}
		if len(a.out) == 0 {
			a.meet(pid, nil)
		}
	}
	a.latest.found = true
}

// askOpener is ask about who opens a secret. It asks nothing of a thread that is known,
// nor of one that has just found the secret: an open by path does that in the same
// system call. (An open through /proc/self/fd does not; there a thread could have
// become another program since. Who arranges that could as well load code into the
// program that the log will name.)
func (a *asking) askOpener(pid uint32, then func(exe, cgroup string)) {
	a.mu.Lock()
	l := &a.latest
	if !l.is(pid) || l.lost && !l.found {
		asked := a.meet(pid, then)
		a.mu.Unlock()
		if !asked {
			then("", "")
		}
		return
	}
	l.seen, l.lost, l.found = time.Now(), false, false
	for i := range a.out {
		if q := &a.out[i]; q.id == l.id {
			q.add(then)
			a.mu.Unlock()
			return
		}
	}
	exe, cgroup := l.exe, l.cgroup
	a.mu.Unlock()
	then(exe, cgroup)
}

// meet asks about a thread and remembers it, for who holds the lock.
func (a *asking) meet(pid uint32, then func(exe, cgroup string)) bool {
	a.latest = latest{}
	if !a.send(pid, then) {
		return false
	}
	now := time.Now()
	a.latest = latest{pid: pid, id: a.last, asked: now, seen: now}
	return true
}

// see is told of each request before it is answered: until then the thread that sent
// it does nothing else.
func (a *asking) see(pid uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if l := &a.latest; pid != 0 && l.pid == pid && !l.lost {
		now := time.Now()
		l.lost = now.Sub(l.seen) > briefly
		l.seen = now
	}
}

// stayed is told that a thread has been waiting since see was told of its request.
func (a *asking) stayed(pid uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.latest.pid == pid {
		a.latest.seen = time.Now()
	}
}

// left tells whether somebody waits for an answer, and how long it may still take.
func (a *asking) left() (time.Duration, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, q := range a.out {
		if q.then != nil {
			return max(0, time.Until(q.until)), true
		}
	}
	return 0, false
}

// hear takes the answers that somebody waits for, if they are there, and gives up
// those that took too long.
func (a *asking) hear() {
	if _, due := a.left(); !due {
		return
	}
	a.take()
	if left, due := a.left(); due && left == 0 {
		a.mu.Lock()
		q := a.out[0]
		a.mu.Unlock()
		a.settle(q.id, "", "")
	}
}

// take takes the answers that are there.
func (a *asking) take() {
	for {
		a.mu.Lock()
		out := len(a.out)
		a.mu.Unlock()
		if out == 0 {
			return
		}
		id, exe, cgroup, err := a.lookup.Answer()
		switch {
		case err == nil:
			a.settle(id, exe, cgroup)
		case errors.Is(err, unix.EAGAIN):
			return
		default:
			a.mu.Lock()
			a.dead = true
			last := a.last
			a.mu.Unlock()
			a.settle(last, "", "")
			return
		}
	}
}

// settle ends the question of that id, and those before it: they will have no
// answer any more.
func (a *asking) settle(id uint64, exe, cgroup string) {
	for {
		a.mu.Lock()
		if len(a.out) == 0 || a.out[0].id > id {
			a.mu.Unlock()
			return
		}
		q := a.out[0]
		a.out = a.out[1:]
		e, c := "", ""
		if q.id == id {
			e, c = exe, cgroup
		}
		if a.latest.id == q.id {
			a.latest.exe, a.latest.cgroup = e, c
		}
		a.mu.Unlock()
		if q.then != nil {
			q.then(e, c)
		}
	}
}

// hearOut waits until nobody waits for an answer.
func (a *asking) hearOut() {
	for w := (wait.Waiter{}); ; {
		left, due := a.left()
		if !due {
			return
		}
		_ = w.Poll([]unix.PollFd{{Fd: int32(a.lookup.FD()), Events: unix.POLLIN}}, left) // or nothing is left soon
		a.hear()
	}
}

// reader finds out who sent a request. It is to be called before the answer, or
// before the first byte where there is a later one: until then the kernel keeps
// the process, and so its number. then is called as that of ask is.
func (s *Server) reader(h *fuse.Header, ask func(uint32, func(exe, cgroup string)), then func(once.Reader)) {
	r := once.Reader{PID: h.Pid, UID: h.Uid, GID: h.Gid}
	ask(h.Pid, func(exe, cgroup string) {
		r.Exe, r.Cgroup = exe, cgroup
		then(r)
	})
}
