package fs

import (
	"fmt"
	"testing"
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

// Who looked the secret up opens it: asked once. Anybody else, and anybody later, is
// asked about anew.
func TestC20_WhoLookedItUpOpensIt(t *testing.T) {
	l := &byHand{}
	a := asking{lookup: l}
	var got []string
	open := func(pid uint32, asked ...uint32) {
		t.Helper()
		a.askOpener(pid, told(&got, "open"))
		if fmt.Sprint(l.asked) != fmt.Sprint(asked) {
			t.Fatalf("asked %v, want %v", l.asked, asked)
		}
		l.answers = append(l.answers, byHandAnswer{uint64(len(asked)), fmt.Sprint("exe", len(asked))})
		a.take()
	}
	soon := func() { a.foreseen.at = time.Now().Add(time.Hour) } // whatever the machine does meanwhile
	a.foresee(7)
	soon()
	open(7, 7)
	open(7, 7, 7)
	a.foresee(7)
	soon()
	open(8, 7, 7, 7, 8)
	a.foresee(9)
	a.foreseen.at = time.Now().Add(-2 * foresight)
	open(9, 7, 7, 7, 8, 9, 9)
	want(t, got, "open:exe1", "open:exe2", "open:exe4", "open:exe6")

	// The answer came before the open.
	a.foresee(5)
	soon()
	l.answers = []byHandAnswer{{7, "exe7"}}
	a.take()
	open(5, 7, 7, 7, 8, 9, 9, 5)
	// It looked twice, and meant the second time.
	a.foresee(5)
	a.foresee(5)
	open(5, 7, 7, 7, 8, 9, 9, 5, 5, 5)
	want(t, got[4:], "open:exe7", "open:exe9")
}
