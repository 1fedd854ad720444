// Package once decides who may have the bytes, and when that is over.
//
//	           claim                    close, reads left
//	┌────────┐──────────▶┌─────────┐──────────────────────┐
//	│ sealed │           │ claimed │                      │
//	└────────┘◀──────────└─────────┘                      │
//	   ▲  │  close before      │  close after the last     │
//	   │  │  any byte went out │  permitted read, time over│
//	   │  │                    ▼                           │
//	   │  │ expire, destroy  ┌───────┐                     │
//	   │  └─────────────────▶│ spent │◀── destroy          │
//	   │                     └───────┘                     │
//	   └───────────────────────────────────────────────────┘
//
// With Options.Keep there is a fourth state. A secret that would be spent by
// reading is kept: to everybody it is as if spent, but the bytes are there still,
// and Rearm seals it again. Disarm keeps it whatever anybody had of it.
//
//	sealed, claimed ──── disarm, close after the last read ───▶ kept
//	kept ──── rearm ───▶ sealed
//	kept ──── expire, destroy ───▶ spent
//
// A [Secret] is sealed until somebody claims it. While it is claimed nobody
// else can. A claim that closes before any byte went out is given back; once a
// byte went out it is spent at close, and the last permitted one takes the
// memory with it: it is zeroed before the state can be seen as spent.
package once

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// A State is where a secret stands.
type State int

const (
	Sealed  State = iota // nobody has it; the next claim succeeds
	Claimed              // one reader has it open
	Spent                // it is gone; its memory is zeroed
	Kept                 // nobody gets it until it is armed again
)

func (s State) String() string {
	switch s {
	case Sealed:
		return "sealed"
	case Claimed:
		return "claimed"
	case Spent:
		return "spent"
	case Kept:
		return "kept"
	}
	return fmt.Sprintf("State(%d)", int(s))
}

// MarshalText makes a state readable in JSON.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (s *State) UnmarshalText(text []byte) error {
	for _, known := range []State{Sealed, Claimed, Spent, Kept} {
		if string(text) == known.String() {
			*s = known
			return nil
		}
	}
	return fmt.Errorf("unknown state %q", text)
}

var (
	// ErrClaimed says that another reader has it.
	ErrClaimed = errors.New("claimed by another reader")
	// ErrSpent says that it is gone.
	ErrSpent = errors.New("spent")
	// ErrNotKept says that a secret is not one to be armed again.
	ErrNotKept = errors.New("not kept")
	// ErrRevoked says that the claim was taken away while it was open.
	ErrRevoked = errors.New("the claim was revoked")
)

// Bytes is what a secret guards. Wipe zeroes it; after Wipe every use of it
// fails.
type Bytes interface {
	Size() int64
	Wipe() error
}

// A Reader is who asked, as far as the kernel tells. It is for the log and the
// status, never for a decision.
type Reader struct {
	PID    uint32 `json:"pid"` // of the asking thread; 0 if outside the daemon's pid namespace
	UID    uint32 `json:"uid"`
	GID    uint32 `json:"gid"`
	Exe    string `json:"exe,omitempty"`
	Cgroup string `json:"cgroup,omitempty"`
}

// A Kind says what happened to a secret.
type Kind string

const (
	Claiming  Kind = "claim"     // a reader opened it
	GiveBack  Kind = "give-back" // closed before any byte went out
	Delivery  Kind = "delivery"  // closed after bytes went out
	Refusal   Kind = "refusal"   // an act that is never allowed, or a reader who is not
	Late      Kind = "late"      // an attempt while claimed or after the spend
	Expiry    Kind = "expiry"    // not read in time, or held too long
	Destroyed Kind = "destroyed" // unread at shutdown
	Disarmed  Kind = "disarmed"  // kept before it was read, or while a reader had it
	Rearmed   Kind = "rearmed"   // to be had again
)

// An Event is one thing that happened. Sent counts every byte that went out,
// also when some went out twice; Whole says that all of them did, in order.
type Event struct {
	Time       time.Time
	Kind       Kind
	Op         string  // the attempted act, for refusals and late attempts; the limit, for an expiry
	Why        string  // for a refusal: what the reader lacks; "" where nobody may do it
	Reader     *Reader // nil where nobody asked
	Had        *Reader // for a late attempt: who had the latest claim, empty if that is not known; nil if nobody had since it was armed
	Sent, Size int64
	Whole      bool
	Left       int   // reads that are left
	Untold     int64 // attempts before this one that were counted and not told
	Err        error // memory that could not be given back
}

// Options say how a secret may be read. The zero value is one read, no limits.
type Options struct {
	// Reads is how many claims may be spent one after another; less than 1
	// means 1.
	Reads int
	// Expire wipes the secret if it was not read for the last time within this
	// long after Begin; 0 means never. A claim whose first byte is out by then runs
	// on, and takes the secret with it; one that has none is revoked.
	Expire time.Duration
	// Hold wipes the secret this long after the first byte of a claim went out,
	// if the claim is still open; 0 means never.
	Hold time.Duration
	// Keep keeps the bytes when the last permitted read is over, for Rearm. Both
	// limits above still wipe them, for good.
	Keep bool
	// Observe is told each event in the order of the changes. It is called with
	// the secret locked: it must neither block nor call back.
	Observe func(Event)
	// Changed is called after each change of what Status tells, if it is not nil. It
	// is called with the secret locked, as Observe is.
	Changed func()
}

// A Secret is bytes that are handed out a fixed number of times. All methods
// may be called by several goroutines and none of them blocks on a reader.
type Secret struct {
	opts  Options
	bytes Bytes
	size  int64

	mu         sync.Mutex
	state      State
	claim      *Claim // not nil exactly while claimed
	left       int
	expired    bool // the expiry came while claimed
	expire     *time.Timer
	changed    time.Time
	latest     *Claim    // nil before the first
	had        *Claim    // the latest since it was sealed by New or Rearm; nil before
	lastAt     time.Time // when it was made
	sent       int64     // by the latest claim
	whole      bool
	counts     Counts
	untold     int64
	lately     map[teller]time.Time // attempts that were told within tellEvery
	onRevoke   func()
	untellable []told // events in order, from the first whose reader is not known yet
}

// told is an event, and the claims whose readers it names.
type told struct {
	Event
	by  *Claim // is Event.Reader; nil to leave it
	had *Claim // is Event.Had; nil to leave it
}

// New seals the bytes. The secret owns them from here on.
func New(b Bytes, opts Options) *Secret {
	s := &Secret{opts: opts, bytes: b, size: b.Size(), left: max(1, opts.Reads), changed: time.Now()}
	s.counts.Sealed = 1
	return s
}

// Begin starts the time of Options.Expire: when whoever is to read can know that
// there is something to be read. It is to be called once.
func (s *Secret) Begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.opts.Expire > 0 && s.state != Spent {
		s.expire = time.AfterFunc(s.opts.Expire, s.onExpire)
	}
}

// Size is the true size in bytes, also after the spend.
func (s *Secret) Size() int64 { return s.size }

// State tells where the secret stands.
func (s *Secret) State() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// to is the one place that changes the state.
func (s *Secret) to(next State) error {
	var err error
	switch next {
	case Kept:
		s.left = 0
	case Spent:
		// Zeroed first: whoever sees "spent" may rely on it.
		err = s.bytes.Wipe()
		s.left = 0
		if s.expire != nil {
			s.expire.Stop()
		}
	}
	if next != Claimed {
		s.claim = nil
	}
	s.state = next
	s.changed = time.Now()
	return err
}

func (s *Secret) tell(e Event) { s.tellOf(nil, e) }

// tellOf counts a change, of a claim or of none, and tells it.
func (s *Secret) tellOf(c *Claim, e Event) {
	s.count(e.Kind)
	s.queue(told{Event: e, by: c})
}

func (s *Secret) count(k Kind) {
	s.counts.add(k)
	if s.opts.Changed != nil {
		s.opts.Changed()
	}
}

// queue tells an event: now, or once it is known who made the claims so far. The
// order stays that of the changes.
func (s *Secret) queue(next told) {
	if s.opts.Observe == nil {
		return
	}
	next.Time, next.Size, next.Left = time.Now(), s.size, s.left
	s.untellable = append(s.untellable, next)
	s.tellKnown(false)
}

// tellKnown tells what can be told, or all of it.
func (s *Secret) tellKnown(all bool) {
	for len(s.untellable) > 0 {
		next := s.untellable[0]
		if !all && (!next.by.known() || !next.had.known()) {
			return
		}
		if next.by != nil {
			next.Reader = next.by.reader
		}
		if next.had != nil {
			// Somebody had it, whoever that was: nil would say that nobody had.
			if next.Had = next.had.reader; next.Had == nil {
				next.Had = &Reader{}
			}
		}
		s.untellable = s.untellable[1:]
		s.opts.Observe(next.Event)
	}
	s.untellable = nil
}

// A Claim is one reader's hold on a secret, from open to the last close.
type Claim struct {
	s      *Secret
	reader *Reader
	began  bool // a byte went out, or the end of an empty secret
	sent   int64
	prefix int64 // bytes that went out in order from the start
	hold   *time.Timer
}

// known tells whether it is known who made the claim. Of none there is nothing to
// know.
func (c *Claim) known() bool { return c == nil || c.reader != nil }

// Claim takes the secret for a reader. It returns ErrClaimed or ErrSpent if it
// cannot be had. Who the reader is may take a moment to find out: Opened says so
// afterwards, and until then no event of this secret is told.
func (s *Secret) Claim() (*Claim, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch s.state {
	case Claimed:
		return nil, ErrClaimed
	case Spent, Kept:
		return nil, ErrSpent
	}
	c := &Claim{s: s}
	_ = s.to(Claimed) // only Spent wipes
	s.claim = c
	s.latest, s.had, s.lastAt, s.sent, s.whole = c, c, s.changed, 0, false
	s.tellOf(c, Event{Kind: Claiming})
	return c, nil
}

// Opened says who made the claim, once. The claim may be over by then.
func (c *Claim) Opened(r Reader) {
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	c.reader = &r
	s.tellKnown(false)
}

// Valid returns nil while the claim may still be served, else ErrRevoked.
func (c *Claim) Valid() error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if c.s.claim != c {
		return ErrRevoked
	}
	return nil
}

// Last tells whether the claim, once begun, takes the secret with it.
func (c *Claim) Last() bool {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	return c.s.left <= 1 && !c.s.opts.Keep || c.s.expired
}

// Deliver lets send pass the n bytes at off to the reader and notes what came of
// it: in one step, so that the reader's close, which may follow before send
// returns, finds the claim begun, and no wipe falls in between. send tells
// whether anything may have gone out; it is called with the secret locked and
// must neither block nor call back. Its error is returned, or ErrRevoked if the
// claim is over. Reading an empty secret delivers it too.
func (c *Claim) Deliver(off, n int64, send func() (out bool, err error)) error {
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.claim != c {
		return ErrRevoked
	}
	out, err := send()
	if !out || n <= 0 && s.size > 0 {
		return err
	}
	if !c.began {
		c.began = true
		if s.opts.Hold > 0 {
			c.hold = time.AfterFunc(s.opts.Hold, c.onHold)
		}
	}
	if err != nil {
		return err
	}
	c.sent += n
	if off <= c.prefix && off+n > c.prefix {
		c.prefix = off + n
	}
	s.sent, s.whole = c.sent, c.prefix == s.size
	return nil
}

// Close ends the claim and returns the state that follows: sealed if it was
// given back or reads are left, else spent or kept. Closing a revoked claim or
// closing twice changes nothing.
func (c *Claim) Close() State {
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.claim != c {
		return s.state
	}
	c.end(Delivery, "")
	return s.state
}

// end closes the open claim, for an expiry by which limit; the caller holds the
// lock.
func (c *Claim) end(kind Kind, limit string) {
	s := c.s
	if c.hold != nil {
		c.hold.Stop()
	}
	next := Sealed
	switch {
	case kind != Delivery:
		next = Spent
	case !c.began:
		kind = GiveBack
	default:
		s.left--
		switch {
		case s.left == 0 && s.opts.Keep:
			next = Kept
		case s.left == 0:
			next = Spent
		}
	}
	late := next != Spent && s.expired
	if late {
		next = Spent
	}
	err := s.to(next)
	s.tellOf(c, Event{Kind: kind, Op: limit, Sent: c.sent, Whole: c.began && c.prefix == s.size, Err: err})
	if late {
		s.tell(Event{Kind: Expiry, Op: "expire"})
	}
}

func (c *Claim) onHold() {
	c.s.mu.Lock()
	revoke := c.s.claim == c
	if revoke {
		c.end(Expiry, "hold")
	}
	c.s.mu.Unlock()
	if revoke {
		c.s.revoked()
	}
}

func (s *Secret) onExpire() {
	s.mu.Lock()
	revoke := false
	switch s.state {
	case Sealed, Kept:
		err := s.to(Spent)
		s.tell(Event{Kind: Expiry, Op: "expire", Err: err})
	case Claimed:
		if revoke = !s.claim.began; revoke {
			s.claim.end(Expiry, "expire")
		} else {
			s.expired = true
		}
	}
	s.mu.Unlock()
	if revoke {
		s.revoked()
	}
}

// OnRevoke says what to do after a claim was taken away while it was open, by an
// expiry, Disarm or Destroy. It is done before these return, and may call back.
func (s *Secret) OnRevoke(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.onRevoke = f
}

// revoked is called without the lock.
func (s *Secret) revoked() {
	s.mu.Lock()
	f := s.onRevoke
	s.mu.Unlock()
	if f != nil {
		f()
	}
}

// Destroy zeroes the secret now, whatever its state. A claim that is open is
// revoked. It returns what Wipe returned.
func (s *Secret) Destroy() error {
	s.mu.Lock()
	if s.state == Spent {
		s.tellKnown(true)
		s.mu.Unlock()
		return nil
	}
	return s.takeBack(Spent, Event{Kind: Destroyed})
}

// Disarm takes the secret back: nobody can have it until Rearm. A claim that is
// open is revoked. It does nothing to one that is kept or spent already.
func (s *Secret) Disarm() error {
	if !s.opts.Keep {
		return ErrNotKept
	}
	s.mu.Lock()
	if s.state == Kept || s.state == Spent {
		s.mu.Unlock()
		return nil
	}
	if s.expired { // while a reader had it, who is turned out now
		return s.takeBack(Spent, Event{Kind: Expiry, Op: "expire"})
	}
	return s.takeBack(Kept, Event{Kind: Disarmed})
}

// Rearm seals the secret anew, with as many reads as at first. A claim that is
// open is revoked. It returns ErrSpent if the secret is gone.
func (s *Secret) Rearm() error {
	if err := s.Disarm(); err != nil {
		return err
	}
	s.mu.Lock()
	if s.state == Spent {
		s.mu.Unlock()
		return ErrSpent
	}
	s.left, s.had = max(1, s.opts.Reads), nil
	return s.takeBack(Sealed, Event{Kind: Rearmed})
}

// takeBack ends what claim there is, and tells the event with it. The caller
// holds the lock, which is given up.
func (s *Secret) takeBack(next State, e Event) error {
	c := s.claim
	if c != nil {
		if c.hold != nil {
			c.hold.Stop()
		}
		e.Sent, e.Whole = c.sent, c.began && c.prefix == s.size
	}
	e.Err = s.to(next)
	s.tellOf(c, e)
	s.tellKnown(next == Spent) // at the end whoever was to say who it was may be gone
	s.mu.Unlock()
	if c != nil {
		s.revoked()
	}
	return e.Err
}

// Of a flood of attempts one a second is told of each process, and of all
// processes no more than tellMost.
const (
	tellEvery = time.Second
	tellMost  = 16
)

// A teller is what one attempt a second is told of.
type teller struct {
	kind Kind
	pid  uint32
}

// Attempt notes an act that was turned away. Of a flood some are told, with the
// number of those before them that were not; the rest are counted. For one to be
// told it returns the function that tells who made it, else nil. why says what a
// reader lacks who is not allowed, or is "".
func (s *Secret) Attempt(kind Kind, op, why string, pid uint32) (tell func(Reader)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.count(kind)
	now := time.Now()
	for t, at := range s.lately {
		if now.Sub(at) >= tellEvery {
			delete(s.lately, t)
		}
	}
	t := teller{kind, pid}
	if _, lately := s.lately[t]; lately || len(s.lately) >= tellMost {
		s.untold++
		return nil
	}
	if s.lately == nil {
		s.lately = map[teller]time.Time{}
	}
	s.lately[t] = now
	next := told{Event: Event{Kind: kind, Op: op, Why: why, Untold: s.untold}}
	if kind == Late {
		next.had = s.had
	}
	s.untold = 0
	return func(r Reader) {
		s.mu.Lock()
		defer s.mu.Unlock()
		next.Reader = &r
		s.queue(next)
	}
}

// Counts are how often something happened to a secret.
type Counts struct {
	Sealed    int64 `json:"sealed"` // by New and Rearm
	Claimed   int64 `json:"claimed"`
	GivenBack int64 `json:"given_back"`
	Delivered int64 `json:"delivered"`
	Expired   int64 `json:"expired"`
	Refused   int64 `json:"refused"` // acts that nobody may do, and readers who may not read
	Late      int64 `json:"late"`
}

func (c *Counts) add(k Kind) {
	switch k {
	case Rearmed:
		c.Sealed++
	case Claiming:
		c.Claimed++
	case GiveBack:
		c.GivenBack++
	case Delivery:
		c.Delivered++
	case Expiry:
		c.Expired++
	case Refusal:
		c.Refused++
	case Late:
		c.Late++
	}
}

// A Status is what may be told about a secret.
type Status struct {
	State    State      `json:"state"`
	Size     int64      `json:"size"`
	Left     int        `json:"reads_left"`
	Changed  time.Time  `json:"changed"`
	Reader   *Reader    `json:"reader,omitempty"` // who had the latest claim
	ReadAt   *time.Time `json:"read_at,omitempty"`
	Sent     int64      `json:"sent"`
	Whole    bool       `json:"whole"`
	Attempts int64      `json:"attempts"` // refused and late
	Counts   Counts     `json:"counts"`
}

// Status tells all that may be told. Asking changes nothing.
func (s *Secret) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{State: s.state, Size: s.size, Left: s.left, Changed: s.changed, Sent: s.sent, Whole: s.whole,
		Attempts: s.counts.Refused + s.counts.Late, Counts: s.counts}
	if s.latest != nil && s.latest.reader != nil {
		r, at := *s.latest.reader, s.lastAt
		st.Reader, st.ReadAt = &r, &at
	}
	return st
}
