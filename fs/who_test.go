package fs

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// byHand is a lookup whose answers the test gives.
type byHand struct {
	asked   []uint32 // processes; the id of a question is its place, from 1
	answers []byHandAnswer
	gone    bool
}

type byHandAnswer struct {
	id  uint64
	exe string
}

func (l *byHand) FD() int { return -1 }

func (l *byHand) Ask(id uint64, pid uint32) error {
	if l.gone {
		return unix.EPIPE
	}
	l.asked = append(l.asked, pid)
	return nil
}

func (l *byHand) Answer() (uint64, string, string, error) {
	switch {
	case len(l.answers) > 0:
		a := l.answers[0]
		l.answers = l.answers[1:]
		return a.id, a.exe, "", nil
	case l.gone:
		return 0, "", "", unix.EPIPE
	}
	return 0, "", "", unix.EAGAIN
}

// told collects what a question came to.
func told(to *[]string, name string) func(exe, cgroup string) {
	return func(exe, _ string) { *to = append(*to, name+":"+exe) }
}

func want(t *testing.T, got []string, want ...string) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// Each question has its own answer, and one that never came leaves nobody waiting.
func TestC20_AnswersFindTheirQuestions(t *testing.T) {
	l := &byHand{}
	a := asking{lookup: l}
	var got []string
	a.ask(7, told(&got, "a"))
	a.ask(8, told(&got, "b"))
	a.ask(9, told(&got, "c"))
	a.ask(0, told(&got, "outside"))
	a.hear()
	want(t, got, "outside:")
	l.answers = []byHandAnswer{{2, "two"}} // the first has none
	a.hear()
	want(t, got, "outside:", "a:", "b:two")
	l.answers = []byHandAnswer{{1, "late"}, {3, "three"}}
	a.hear()
	want(t, got, "outside:", "a:", "b:two", "c:three")
	if _, due := a.left(); due {
		t.Error("something is due")
	}
}

func TestC20_NobodyWaitsForEver(t *testing.T) {
	l := &byHand{}
	a := asking{lookup: l}
	var got []string
	a.ask(7, told(&got, "a"))
	a.hear()
	want(t, got)
	a.out[0].until = time.Now()
	a.hear()
	want(t, got, "a:")
	a.ask(7, told(&got, "b"))
	l.gone = true
	a.hear()
	want(t, got, "a:", "b:")
	a.ask(7, told(&got, "c"))
	want(t, got, "a:", "b:", "c:")
}

// A thread is asked about once as long as it cannot have become another program: not
// between the look-up and the open of one system call, nor while it goes on asking.
func TestC20_AThreadThatGoesOnIsTheSame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &byHand{}
		a := asking{lookup: l}
		var got []string
		asked := func(n int, what string) {
			t.Helper()
			if len(l.asked) != n {
				t.Fatalf("%s: asked %v, want %d questions", what, l.asked, n)
			}
		}
		answer := func() {
			l.answers = append(l.answers, byHandAnswer{uint64(len(l.asked)), fmt.Sprint("exe", len(l.asked))})
			a.take()
		}
		find := func(pid uint32) {
			a.see(pid)
			a.foresee(pid)
		}
		open := func(pid uint32) {
			a.see(pid)
			a.askOpener(pid, told(&got, fmt.Sprint(pid)))
		}

		find(7)
		open(7)
		asked(1, "an open by path")
		open(7)
		asked(1, "another open, before the answer")
		want(t, got)
		answer()
		want(t, got, "7:exe1", "7:exe1")
		time.Sleep(briefly)
		open(7)
		asked(1, "an open soon after")
		time.Sleep(briefly + 1)
		open(7)
		asked(2, "an open later")
		answer()
		find(8)
		answer()
		open(7)
		asked(4, "an open by another")
		answer()
		open(8)
		asked(5, "an open by one who was not the last")
		answer()
		want(t, got[2:], "7:exe1", "7:exe2", "7:exe4", "8:exe5")

		find(9)
		answer()
		time.Sleep(lasting)
		open(9)
		asked(6, "an open by path that took long")
		find(9)
		answer()
		time.Sleep(lasting + 1)
		open(9)
		asked(7, "an open long after the look-up")
		answer()
		time.Sleep(briefly + 1)
		find(9)
		asked(8, "a look-up by what may be another program")
		answer()
		time.Sleep(briefly + 1)
		find(9)
		asked(9, "another, and the first was not followed by an open")
		answer()
		want(t, got[6:], "9:exe6", "9:exe7")

		// What it reads is long in coming.
		a.see(9)
		time.Sleep(10 * briefly)
		a.stayed(9)
		time.Sleep(briefly)
		find(9)
		asked(9, "a look-up soon after a long answer")

		for range lasting / briefly {
			time.Sleep(briefly)
			find(9)
		}
		asked(10, "look-ups in a row")
		a.see(0)
		find(0)
		open(0)
		asked(10, "one who has no number here")
		want(t, got[8:], "0:")
	})
}
