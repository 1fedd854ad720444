package once

import (
	"encoding/json"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// fake is bytes that look when they are wiped.
type fake struct {
	size  int64
	wiped atomic.Int32
	onto  func() // called by Wipe
	err   error
}

// deliver passes bytes on that all go out.
func deliver(c *Claim, off, n int64) error {
	return c.Deliver(off, n, func() (bool, error) { return true, nil })
}

func (f *fake) Size() int64 { return f.size }
func (f *fake) Wipe() error {
	f.wiped.Add(1)
	if f.onto != nil {
		f.onto()
	}
	return f.err
}

var cat = Reader{PID: 7, UID: 1000, GID: 1000, Exe: "/bin/cat"}

// record collects events.
type record struct {
	mu     sync.Mutex
	events []Event
}

func (r *record) observe(e Event) { r.mu.Lock(); r.events = append(r.events, e); r.mu.Unlock() }

func (r *record) kinds() (k []Kind) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		k = append(k, e.Kind)
	}
	return k
}

func (r *record) want(t *testing.T, want ...Kind) {
	t.Helper()
	if got := r.kinds(); !slices.Equal(got, want) {
		t.Fatalf("events %v, want %v", got, want)
	}
}

func mustClaim(t *testing.T, s *Secret) *Claim {
	t.Helper()
	c, err := s.Claim()
	if err != nil {
		t.Fatal(err)
	}
	c.Opened(cat)
	return c
}

func wantState(t *testing.T, s *Secret, f *fake, want State) {
	t.Helper()
	if got := s.State(); got != want {
		t.Fatalf("state %v, want %v", got, want)
	}
	if (f.wiped.Load() == 1) != (want == Spent) {
		t.Fatalf("%v and wiped %d times", want, f.wiped.Load())
	}
}

func TestC2_OneClaimAtATime(t *testing.T) {
	f := &fake{size: 10}
	s := New(f, Options{Reads: 2})
	c := mustClaim(t, s)
	if _, err := s.Claim(); err != ErrClaimed {
		t.Fatal(err)
	}
	deliver(c, 0, 10)
	c.Close()
	c2 := mustClaim(t, s)
	if c.Valid() == nil || c2.Valid() != nil {
		t.Fatal("the wrong claim is valid")
	}
}

func TestC4_GivenBack(t *testing.T) {
	f, r := &fake{size: 10}, &record{}
	s := New(f, Options{Observe: r.observe})
	for range 3 {
		if got := mustClaim(t, s).Close(); got != Sealed {
			t.Fatal(got)
		}
		wantState(t, s, f, Sealed)
	}
	c := mustClaim(t, s)
	deliver(c, 5, 0) // a read that got nothing is no delivery
	c.Close()
	wantState(t, s, f, Sealed)
	r.want(t, Claiming, GiveBack, Claiming, GiveBack, Claiming, GiveBack, Claiming, GiveBack)
}

func TestC5_SpentByOneByte(t *testing.T) {
	f, r := &fake{size: 10}, &record{}
	s := New(f, Options{Observe: r.observe})
	c := mustClaim(t, s)
	deliver(c, 3, 1)
	wantState(t, s, f, Claimed)
	if got := c.Close(); got != Spent {
		t.Fatal(got)
	}
	wantState(t, s, f, Spent)
	if c.Close(); f.wiped.Load() != 1 {
		t.Fatal("closing twice wiped twice")
	}
	if _, err := s.Claim(); err != ErrSpent {
		t.Fatal(err)
	}
	e := r.events[1]
	if e.Kind != Delivery || e.Sent != 1 || e.Size != 10 || e.Whole || e.Reader == nil || *e.Reader != cat {
		t.Fatalf("%+v", e)
	}
}

func TestC5_EmptyIsSpentByReading(t *testing.T) {
	f, r := &fake{}, &record{}
	s := New(f, Options{Observe: r.observe})
	mustClaim(t, s).Close()
	wantState(t, s, f, Sealed)
	c := mustClaim(t, s)
	deliver(c, 0, 0)
	c.Close()
	wantState(t, s, f, Spent)
	if !r.events[3].Whole {
		t.Fatal("an empty secret was read, and not whole")
	}
}

func TestC5_WholeMeansInOrder(t *testing.T) {
	for name, c := range map[string]struct {
		reads [][2]int64
		whole bool
	}{
		"in order":  {[][2]int64{{0, 4}, {4, 6}}, true},
		"again":     {[][2]int64{{0, 4}, {0, 10}}, true},
		"half":      {[][2]int64{{0, 4}}, false},
		"backwards": {[][2]int64{{4, 6}, {0, 4}}, false},
		"end only":  {[][2]int64{{9, 1}}, false},
	} {
		s := New(&fake{size: 10}, Options{})
		claim := mustClaim(t, s)
		for _, r := range c.reads {
			deliver(claim, r[0], r[1])
		}
		if got := s.Status().Whole; got != c.whole {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestM3_ZeroedBeforeSpentCanBeSeen(t *testing.T) {
	for name, end := range map[string]func(*Secret, *Claim){
		"close":   func(_ *Secret, c *Claim) { deliver(c, 0, 1); c.Close() },
		"destroy": func(s *Secret, _ *Claim) { s.Destroy() },
	} {
		f := &fake{size: 1}
		s := New(f, Options{})
		f.onto = func() {
			// Wipe is called with the secret locked; its state is read as it is.
			if s.state == Spent {
				t.Errorf("%s: spent before it was zeroed", name)
			}
		}
		end(s, mustClaim(t, s))
		wantState(t, s, f, Spent)
	}
}

func TestM3_FailedWipeIsTold(t *testing.T) {
	r := &record{}
	f := &fake{size: 1, err: errors.New("munmap: invalid argument")}
	s := New(f, Options{Observe: r.observe})
	c := mustClaim(t, s)
	deliver(c, 0, 1)
	c.Close()
	if r.events[1].Err != f.err {
		t.Fatalf("%+v", r.events[1])
	}
	if err := New(f, Options{}).Destroy(); err != f.err {
		t.Fatal(err)
	}
}

func TestC10_Reads(t *testing.T) {
	f, r := &fake{size: 4}, &record{}
	s := New(f, Options{Reads: 3, Observe: r.observe})
	for left := 3; left > 0; left-- {
		if got := s.Status().Left; got != left {
			t.Fatalf("%d left, want %d", got, left)
		}
		c := mustClaim(t, s)
		if c.Last() != (left == 1) {
			t.Fatalf("with %d left, last is %v", left, c.Last())
		}
		mustStayClaimed(t, s)
		deliver(c, 0, 4)
		c.Close()
	}
	wantState(t, s, f, Spent)
	r.want(t, Claiming, Delivery, Claiming, Delivery, Claiming, Delivery)
}

func mustStayClaimed(t *testing.T, s *Secret) {
	t.Helper()
	if _, err := s.Claim(); err != ErrClaimed {
		t.Fatal(err)
	}
}

func TestRestart_ServedAgainOnlyWhenArmed(t *testing.T) {
	f, r := &fake{size: 4}, &record{}
	s := New(f, Options{Keep: true, Observe: r.observe})
	for range 3 {
		c := mustClaim(t, s)
		if c.Last() {
			t.Fatal("no claim takes a secret with it that is kept")
		}
		deliver(c, 0, 4)
		if got := c.Close(); got != Kept {
			t.Fatal(got)
		}
		if _, err := s.Claim(); err != ErrSpent {
			t.Fatal(err)
		}
		wantState(t, s, f, Kept)
		if err := s.Rearm(); err != nil {
			t.Fatal(err)
		}
		if c.Valid() != ErrRevoked || s.Status().Left != 1 {
			t.Fatal("the old claim is valid, or the new one cannot be")
		}
	}
	r.want(t, Claiming, Delivery, Rearmed, Claiming, Delivery, Rearmed, Claiming, Delivery, Rearmed)
	s.Destroy()
	wantState(t, s, f, Spent)
	if err := s.Rearm(); err != ErrSpent {
		t.Fatal(err)
	}
}

func TestRestart_DisarmTakesItBack(t *testing.T) {
	f, r := &fake{size: 4}, &record{}
	s := New(f, Options{Keep: true, Observe: r.observe})
	c := mustClaim(t, s)
	deliver(c, 0, 2)
	s.Disarm()
	wantState(t, s, f, Kept)
	if c.Valid() != ErrRevoked || c.Close() != Kept {
		t.Fatal("the claim survived")
	}
	s.Disarm()
	s.Rearm()
	s.Disarm() // unread
	wantState(t, s, f, Kept)
	r.want(t, Claiming, Disarmed, Rearmed, Disarmed)
	if e := r.events[1]; e.Sent != 2 || *e.Reader != cat {
		t.Fatalf("%+v", e)
	}
}

func TestRestart_NotKeptIsNotArmed(t *testing.T) {
	f := &fake{size: 4}
	s := New(f, Options{})
	if s.Rearm() != ErrNotKept || s.Disarm() != ErrNotKept {
		t.Fatal("it was")
	}
	wantState(t, s, f, Sealed)
}

func TestRestart_LimitsWipeForGood(t *testing.T) {
	for name, c := range map[string]struct {
		opts Options
		act  func(*Secret)
	}{
		"kept":    {Options{Expire: time.Minute}, func(s *Secret) { s.Disarm() }},
		"claimed": {Options{Expire: time.Minute}, func(s *Secret) { c, _ := s.Claim(); deliver(c, 0, 1) }},
		"hold":    {Options{Hold: time.Minute}, func(s *Secret) { c, _ := s.Claim(); deliver(c, 0, 1) }},
	} {
		synctest.Test(t, func(t *testing.T) {
			f := &fake{size: 4}
			c.opts.Keep = true
			s := New(f, c.opts)
			s.Begin()
			c.act(s)
			time.Sleep(time.Hour)
			synctest.Wait()
			if err := s.Rearm(); err != ErrSpent {
				t.Fatalf("%s: %v", name, err)
			}
			wantState(t, s, f, Spent)
		})
	}
}

func TestC17_DestroyRevokes(t *testing.T) {
	f, r := &fake{size: 4}, &record{}
	s := New(f, Options{Observe: r.observe})
	c := mustClaim(t, s)
	deliver(c, 0, 2)
	if err := s.Destroy(); err != nil {
		t.Fatal(err)
	}
	wantState(t, s, f, Spent)
	if c.Valid() != ErrRevoked || c.Close() != Spent || f.wiped.Load() != 1 {
		t.Fatal("the claim survived")
	}
	s.Destroy()
	r.want(t, Claiming, Destroyed)
}

func TestC11_Expire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, r := &fake{size: 4}, &record{}
		s := New(f, Options{Expire: time.Minute, Observe: r.observe})
		s.Begin()
		time.Sleep(time.Minute - time.Nanosecond)
		synctest.Wait()
		wantState(t, s, f, Sealed)
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		wantState(t, s, f, Spent)
		r.want(t, Expiry)
	})
}

// A start that takes longer than the limit is no reason to lose it.
func TestC11_ExpireCountsFromBegin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{size: 4}
		s := New(f, Options{Expire: time.Minute})
		time.Sleep(time.Hour)
		synctest.Wait()
		wantState(t, s, f, Sealed)
		s.Begin()
		time.Sleep(time.Minute)
		synctest.Wait()
		wantState(t, s, f, Spent)
	})
	// Spent before it began: there is nothing to expire.
	r := &record{}
	s := New(&fake{size: 4}, Options{Expire: 1, Observe: r.observe})
	c := mustClaim(t, s)
	deliver(c, 0, 4)
	c.Close()
	s.Begin()
	r.want(t, Claiming, Delivery)
}

// Who had it in an earlier start had nothing in this one.
func TestRestart_HadIsOfThisStart(t *testing.T) {
	r := &record{}
	s := New(&fake{size: 4}, Options{Keep: true, Observe: r.observe})
	c := mustClaim(t, s)
	deliver(c, 0, 4)
	c.Close()
	s.Attempt(Late, "lookup", "", 9)(cat)
	if err := s.Rearm(); err != nil {
		t.Fatal(err)
	}
	if err := s.Disarm(); err != nil { // unread
		t.Fatal(err)
	}
	s.Attempt(Late, "lookup", "", 10)(Reader{PID: 10})
	r.want(t, Claiming, Delivery, Late, Rearmed, Disarmed, Late)
	if r.events[2].Had == nil || *r.events[2].Had != cat || r.events[5].Had != nil {
		t.Errorf("%+v", r.events)
	}
	if st := s.Status(); st.Reader == nil || *st.Reader != cat {
		t.Errorf("the status forgot who read: %+v", st)
	}
}

func TestC11_ExpireLetsAReadEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, r := &fake{size: 4}, &record{}
		s := New(f, Options{Reads: 2, Expire: time.Minute, Observe: r.observe})
		s.Begin()
		s.OnRevoke(func() { t.Error("revoked") })
		c := mustClaim(t, s)
		deliver(c, 0, 1)
		time.Sleep(time.Hour)
		synctest.Wait()
		wantState(t, s, f, Claimed)
		if c.Valid() != nil || !c.Last() {
			t.Fatal("the claim did not stay, or is not the last")
		}
		deliver(c, 1, 3)
		c.Close()
		wantState(t, s, f, Spent)
		r.want(t, Claiming, Delivery, Expiry)
	})
}

// To open it and wait does not keep it.
func TestC11_ExpireRevokesAnUnreadClaim(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, r := &fake{size: 4}, &record{}
		revoked := 0
		s := New(f, Options{Reads: 2, Expire: time.Minute, Observe: r.observe})
		s.Begin()
		s.OnRevoke(func() {
			revoked++
			wantState(t, s, f, Spent) // it may call back
		})
		c := mustClaim(t, s)
		time.Sleep(time.Minute - time.Nanosecond)
		synctest.Wait()
		wantState(t, s, f, Claimed)
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		wantState(t, s, f, Spent)
		if c.Valid() != ErrRevoked || c.Close() != Spent || revoked != 1 {
			t.Fatalf("the claim survived, or was revoked %d times", revoked)
		}
		r.want(t, Claiming, Expiry)
		if e := r.events[1]; e.Op != "expire" || e.Reader == nil || *e.Reader != cat {
			t.Fatalf("%+v", e)
		}
	})
}

func TestC11_RevokedIsToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		revoked := 0
		secret := func(o Options) *Secret {
			s := New(&fake{size: 4}, o)
			s.OnRevoke(func() { revoked++ })
			return s
		}
		s := secret(Options{Reads: 9, Hold: time.Second})
		mustClaim(t, s).Close() // given back: nothing was taken away
		c := mustClaim(t, s)
		deliver(c, 0, 4)
		c.Close() // read: nor here
		c = mustClaim(t, s)
		deliver(c, 0, 1)
		time.Sleep(time.Minute)
		synctest.Wait()
		if revoked != 1 {
			t.Fatalf("hold revoked %d times", revoked)
		}
		s.Destroy()
		c.Close()
		if revoked != 1 {
			t.Fatalf("revoked %d times in the end", revoked)
		}
		s = secret(Options{})
		s.Destroy() // nobody had it
		if revoked != 1 {
			t.Fatal("revoked from nobody")
		}
		s = secret(Options{})
		mustClaim(t, s)
		s.Destroy()
		if revoked != 2 {
			t.Fatal("destroyed and not told")
		}
	})
}

func TestC11_NoExpiryAfterTheSpend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, r := &fake{size: 4}, &record{}
		s := New(f, Options{Expire: time.Minute, Hold: time.Second, Observe: r.observe})
		s.Begin()
		c := mustClaim(t, s)
		deliver(c, 0, 4)
		c.Close()
		time.Sleep(time.Hour)
		synctest.Wait()
		r.want(t, Claiming, Delivery)
		wantState(t, s, f, Spent)
	})
}

func TestC11_Hold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, r := &fake{size: 4}, &record{}
		s := New(f, Options{Reads: 5, Hold: time.Second, Observe: r.observe})
		c := mustClaim(t, s)
		time.Sleep(time.Hour) // before the first byte nothing runs
		synctest.Wait()
		wantState(t, s, f, Claimed)
		deliver(c, 0, 1)
		time.Sleep(time.Second - time.Nanosecond)
		synctest.Wait()
		deliver(c, 1, 1) // does not start it again
		wantState(t, s, f, Claimed)
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		wantState(t, s, f, Spent)
		if c.Valid() != ErrRevoked {
			t.Fatal("the claim is still valid")
		}
		r.want(t, Claiming, Expiry)
	})
}

func TestC11_HoldEndsWithTheClaim(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{size: 4}
		s := New(f, Options{Reads: 2, Hold: time.Second})
		c := mustClaim(t, s)
		deliver(c, 0, 4)
		c.Close()
		next := mustClaim(t, s)
		time.Sleep(time.Hour)
		synctest.Wait()
		if next.Valid() != nil {
			t.Fatal("the first claim's hold ended the second")
		}
		wantState(t, s, f, Claimed)
	})
}

func TestC20_FloodIsCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &record{}
		s := New(&fake{size: 1}, Options{Observe: r.observe})
		attempt := func() {
			if tell := s.Attempt(Late, "open", "", cat.PID); tell != nil {
				tell(cat)
			}
		}
		for range 1000 {
			attempt()
		}
		r.want(t, Late)
		time.Sleep(tellEvery)
		attempt()
		r.want(t, Late, Late)
		if got := r.events[1].Untold; got != 999 {
			t.Fatalf("%d untold", got)
		}
		if got := s.Status().Attempts; got != 1001 {
			t.Fatalf("%d attempts", got)
		}
		if r.events[1].Op != "open" || *r.events[1].Reader != cat {
			t.Fatalf("%+v", r.events[1])
		}
	})
}

// Who made a claim may be known only after it is over. What happened meanwhile
// is told then, in its order, and each event names its own reader.
func TestC20_EventsWaitForTheirReader(t *testing.T) {
	r := &record{}
	s := New(&fake{size: 1}, Options{Observe: r.observe})
	first, _ := s.Claim()
	first.Close()
	second, _ := s.Claim()
	dog := Reader{PID: 7, Exe: "/bin/dog"}
	second.Opened(dog)
	deliver(second, 0, 1)
	second.Close()
	r.want(t)
	first.Opened(cat)
	r.want(t, Claiming, GiveBack, Claiming, Delivery)
	for i, want := range []Reader{cat, cat, dog, dog} {
		if got := r.events[i].Reader; got == nil || *got != want {
			t.Errorf("event %d names %v, and it was %v", i, got, want)
		}
	}
}

// At the end nothing stays untold.
func TestC20_DestroyTellsWhatWaited(t *testing.T) {
	r := &record{}
	s := New(&fake{size: 1}, Options{Observe: r.observe})
	c, _ := s.Claim()
	s.Destroy()
	r.want(t, Claiming, Destroyed)
	c.Opened(cat)
	r.want(t, Claiming, Destroyed)
}

// A flood by one process does not hide another, and one by many is bounded.
func TestC20_FloodHidesNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &record{}
		s := New(&fake{size: 1}, Options{Observe: r.observe})
		attempt := func(kind Kind, pid uint32) {
			if tell := s.Attempt(kind, "open", "", pid); tell != nil {
				tell(Reader{PID: pid})
			}
		}
		for range 1000 {
			attempt(Late, 1)
		}
		attempt(Refusal, 1)
		attempt(Late, 2)
		r.want(t, Late, Refusal, Late)
		for pid := range uint32(1000) {
			attempt(Late, 10+pid)
		}
		if n := len(r.kinds()); n != tellMost {
			t.Fatalf("%d told", n)
		}
		time.Sleep(tellEvery)
		attempt(Late, 1)
		if n := len(r.kinds()); n != tellMost+1 {
			t.Fatalf("%d told after a second", n)
		}
		if c := s.Status().Counts; c.Late != 2002 || c.Refused != 1 {
			t.Fatalf("%+v", c)
		}
	})
}

// Who comes late is told after who has it, and with who that is.
func TestC20_LateNamesWhoHasIt(t *testing.T) {
	r := &record{}
	s := New(&fake{size: 1}, Options{Observe: r.observe})
	late := func(pid uint32) { s.Attempt(Late, "open", "", pid)(Reader{PID: pid}) }
	c, err := s.Claim()
	if err != nil {
		t.Fatal(err)
	}
	late(1)
	r.want(t)
	c.Opened(cat)
	late(2)
	deliver(c, 0, 1)
	c.Close()
	late(3)
	r.want(t, Claiming, Late, Late, Delivery, Late)
	for _, i := range []int{1, 2, 4} {
		if e := r.events[i]; e.Had == nil || *e.Had != cat || e.Reader.PID == 0 {
			t.Errorf("%+v", e)
		}
	}
	s = New(&fake{size: 1}, Options{Observe: r.observe})
	s.Destroy()
	late(4)
	if e := r.events[len(r.events)-1]; e.Had != nil {
		t.Errorf("nobody had it: %+v", e)
	}
}

// A late attempt waits for its turn like any event, and names who had it when it
// was made, not when it is told.
func TestC20_LateWaitsInOrder(t *testing.T) {
	r := &record{}
	s := New(&fake{size: 1}, Options{Observe: r.observe})
	late := func(pid uint32) (tell func()) {
		told := s.Attempt(Late, "open", "", pid)
		return func() { told(Reader{PID: pid}) }
	}
	first, _ := s.Claim()
	early, slow := late(1), late(2)
	early()
	first.Close()
	second, _ := s.Claim()
	dog := Reader{PID: 7, Exe: "/bin/dog"}
	second.Opened(dog)
	late(3)()
	slow()
	r.want(t)
	first.Opened(cat)
	r.want(t, Claiming, Late, GiveBack, Claiming, Late, Late)
	for i, want := range map[int]Reader{1: cat, 4: dog, 5: cat} {
		if e := r.events[i]; e.Had == nil || *e.Had != want || e.Reader.PID == 0 {
			t.Errorf("event %d: %+v, and %v had it", i, e, want)
		}
	}
}

// Who had it may never be known. That is not the same as that nobody had it.
func TestC20_LateAfterSomebodyUnknown(t *testing.T) {
	r := &record{}
	s := New(&fake{size: 1}, Options{Observe: r.observe})
	if _, err := s.Claim(); err != nil {
		t.Fatal(err)
	}
	s.Attempt(Late, "open", "", cat.PID)(cat)
	r.want(t)
	s.Destroy()
	r.want(t, Claiming, Late, Destroyed)
	if e := r.events[1]; e.Had == nil || *e.Had != (Reader{}) || *e.Reader != cat {
		t.Errorf("%+v", e)
	}
}

func TestC20_Counts(t *testing.T) {
	s := New(&fake{size: 1}, Options{Reads: 2})
	first, _ := s.Claim()
	if got := s.Status().Counts; got != (Counts{Sealed: 1, Claimed: 1}) {
		t.Fatalf("before it is known who it is: %+v", got)
	}
	first.Close()
	for range 2 {
		c := mustClaim(t, s)
		deliver(c, 0, 1)
		c.Close()
	}
	s.Attempt(Refusal, "open", "", 1)
	s.Attempt(Late, "open", "", 1)
	s.Attempt(Late, "open", "", 1)
	want := Counts{Sealed: 1, Claimed: 3, GivenBack: 1, Delivered: 2, Refused: 1, Late: 2}
	if st := s.Status(); st.Counts != want || st.Attempts != 3 {
		t.Fatalf("%+v, want %+v", st, want)
	}
}

func TestC3_OneWinner(t *testing.T) {
	for range 100 {
		f := &fake{size: 1}
		s := New(f, Options{})
		var wg sync.WaitGroup
		var mu sync.Mutex
		won := 0
		for range 50 {
			wg.Go(func() {
				c, err := s.Claim()
				if err != nil {
					return
				}
				c.Opened(cat)
				mu.Lock()
				won++
				mu.Unlock()
				deliver(c, 0, 1)
				c.Close()
			})
		}
		wg.Wait()
		if won != 1 || f.wiped.Load() != 1 {
			t.Fatalf("%d winners, wiped %d times", won, f.wiped.Load())
		}
	}
}

func TestStateText(t *testing.T) {
	for _, s := range []State{Sealed, Claimed, Spent, Kept} {
		text, err := json.Marshal(s)
		var back State
		if err != nil || json.Unmarshal(text, &back) != nil || back != s {
			t.Errorf("%v: %s, %v", s, text, err)
		}
	}
	if State(9).String() != "State(9)" || new(State).UnmarshalText([]byte("x")) == nil {
		t.Error("a state that is none")
	}
}

// TestModel drives a secret and a model of it with random acts.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		reads := rapid.IntRange(1, 4).Draw(t, "reads")
		size := rapid.Int64Range(0, 5).Draw(t, "size")
		f := &fake{size: size}
		keep := rapid.Bool().Draw(t, "keep")
		s := New(f, Options{Reads: reads, Keep: keep})
		// The model: who holds it, whether a byte went out, how many reads are left,
		// whether it waits to be armed again.
		var held *Claim
		began, left, gone, kept := false, reads, false, false
		var stale []*Claim
		t.Repeat(map[string]func(*rapid.T){
			"claim": func(t *rapid.T) {
				c, err := s.Claim()
				switch {
				case (gone || kept) && err != ErrSpent, !gone && held != nil && err != ErrClaimed, !gone && !kept && held == nil && err != nil:
					t.Fatalf("claim: %v", err)
				}
				if err == nil {
					c.Opened(cat)
					held, began = c, false
				}
			},
			"deliver": func(t *rapid.T) {
				if held == nil {
					t.Skip()
				}
				off := rapid.Int64Range(0, size).Draw(t, "off")
				n := rapid.Int64Range(0, size-off).Draw(t, "n")
				deliver(held, off, n)
				began = began || n > 0 || size == 0
			},
			"close": func(t *rapid.T) {
				if held == nil {
					t.Skip()
				}
				if began {
					left--
					gone, kept = left == 0 && !keep, left == 0 && keep
				}
				want := Sealed
				switch {
				case gone:
					want = Spent
				case kept:
					want = Kept
				}
				if got := held.Close(); got != want {
					t.Fatalf("close: %v, want %v", got, want)
				}
				stale, held = append(stale, held), nil
			},
			"stale": func(t *rapid.T) {
				if len(stale) == 0 {
					t.Skip()
				}
				c := stale[rapid.IntRange(0, len(stale)-1).Draw(t, "which")]
				deliver(c, 0, size)
				c.Close()
				if c.Valid() != ErrRevoked {
					t.Fatal("a closed claim is valid")
				}
			},
			"destroy": func(t *rapid.T) {
				if rapid.IntRange(0, 9).Draw(t, "rarely") > 0 {
					t.Skip()
				}
				if err := s.Destroy(); err != nil {
					t.Fatal(err)
				}
				if held != nil {
					stale, held = append(stale, held), nil
				}
				gone, kept = true, false
			},
			"disarm": func(t *rapid.T) {
				err := s.Disarm()
				switch {
				case !keep && err != ErrNotKept, keep && err != nil:
					t.Fatalf("disarm: %v", err)
				case keep && !gone:
					if held != nil {
						stale, held = append(stale, held), nil
					}
					kept, left = true, 0
				}
			},
			"rearm": func(t *rapid.T) {
				err := s.Rearm()
				switch {
				case !keep && err != ErrNotKept, keep && gone && err != ErrSpent, keep && !gone && err != nil:
					t.Fatalf("rearm: %v", err)
				case keep && !gone:
					if held != nil {
						stale, held = append(stale, held), nil
					}
					kept, left = false, reads
				}
			},
			"attempt": func(t *rapid.T) {
				if tell := s.Attempt(Late, "open", "", cat.PID); tell != nil {
					tell(cat)
				}
			},
			"": func(t *rapid.T) {
				want := Sealed
				switch {
				case gone:
					want = Spent
				case kept:
					want = Kept
				case held != nil:
					want = Claimed
				}
				st := s.Status()
				if s.State() != want || st.State != want {
					t.Fatalf("state %v, want %v", s.State(), want)
				}
				if (f.wiped.Load() == 1) != gone {
					t.Fatalf("wiped %d times, gone %v", f.wiped.Load(), gone)
				}
				if !gone && st.Left != left || gone && st.Left != 0 {
					t.Fatalf("%d left, want %d", st.Left, left)
				}
				if held != nil && (held.Valid() != nil || held.Last() != (left == 1 && !keep)) {
					t.Fatal("the open claim is not valid, or wrong about being the last")
				}
			},
		})
	})
}

// A reader that has its bytes may close before Deliver has returned: that close
// finds the claim begun all the same.
func TestC5_CloseOvertakesDelivery(t *testing.T) {
	s := New(&fake{size: 10}, Options{})
	c := mustClaim(t, s)
	closed := make(chan State, 1)
	err := c.Deliver(0, 10, func() (bool, error) {
		started := make(chan bool)
		go func() { close(started); closed <- c.Close() }()
		<-started
		return true, nil
	})
	if state := <-closed; err != nil || state != Spent {
		t.Errorf("%v, %v", state, err)
	}
}

// What failed before anything went out is given back; what may have gone out in
// part is spent.
func TestC5_FailedDelivery(t *testing.T) {
	failure := errors.New("failure")
	for out, want := range map[bool]State{false: Sealed, true: Spent} {
		s := New(&fake{size: 10}, Options{})
		c := mustClaim(t, s)
		if err := c.Deliver(0, 4, func() (bool, error) { return out, failure }); err != failure {
			t.Errorf("Deliver: %v", err)
		}
		if state := c.Close(); state != want {
			t.Errorf("something went out: %v; then %v", out, state)
		}
		if err := c.Deliver(0, 4, func() (bool, error) { t.Error("sent after the end"); return true, nil }); err != ErrRevoked {
			t.Errorf("after the end: %v", err)
		}
	}
}
