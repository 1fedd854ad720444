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

// foresight is for how long it holds who looked a secret up.
const foresight = time.Millisecond

// asking is the questions that were put to a Lookup. All methods may be called by
// several goroutines, but only one may hear.
type asking struct {
	lookup Lookup // nil where nobody can be looked up

	mu       sync.Mutex
	last     uint64
	out      []question // in their order
	dead     bool       // nobody answers any more
	foreseen foreseen
}

type question struct {
	id    uint64
	until time.Time
	then  func(exe, cgroup string) // nil: nobody waits for the answer
}

// foreseen is who looked a secret up last.
type foreseen struct {
	pid         uint32 // 0: nobody
	id          uint64 // of the question
	at          time.Time
	exe, cgroup string // once the question has its answer
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

// foresee asks about a process that has found a secret and will most likely open
// it, so that the answer is there when its read waits for it. One such question
// at a time: many may look and never open. It is for who hears.
func (a *asking) foresee(pid uint32) {
	a.take()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.foreseen = foreseen{}
	if len(a.out) == 0 && a.send(pid, nil) {
		a.foreseen = foreseen{pid: pid, id: a.last, at: time.Now()}
	}
}

// askOpener is ask about who opens a secret. What was foreseen of the thread holds:
// an open by path looks the secret up just before, in the same system call, and the
// latest look-up counts. (An open through /proc/self/fd does not; there a thread
// could have become another program within that millisecond. Who arranges that
// could as well load code into the program that the log will name.)
func (a *asking) askOpener(pid uint32, then func(exe, cgroup string)) {
	a.mu.Lock()
	f := a.foreseen
	a.foreseen = foreseen{}
	if f.pid == 0 || f.pid != pid || time.Since(f.at) > foresight {
		a.mu.Unlock()
		a.ask(pid, then)
		return
	}
	for i := range a.out {
		if q := &a.out[i]; q.id == f.id {
			q.then, q.until = then, time.Now().Add(patience)
			a.mu.Unlock()
			return
		}
	}
	a.mu.Unlock()
	then(f.exe, f.cgroup)
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
		if a.foreseen.id == q.id {
			a.foreseen.exe, a.foreseen.cgroup = e, c
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
