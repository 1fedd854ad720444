package main

import (
	"testing"

	"oncefs/internal/once"
)

func TestC20_Intrusion(t *testing.T) {
	app := once.Reader{PID: 7, UID: 1000, GID: 1000, Exe: "/usr/bin/app"}
	sameThread := once.Reader{PID: 7, UID: 1000}
	worker := once.Reader{PID: 9, UID: 1000, GID: 5, Exe: "/usr/bin/app"}
	cat := once.Reader{PID: 9, UID: 1000, GID: 1000, Exe: "/usr/bin/cat"}
	root := once.Reader{PID: 9, Exe: "/usr/bin/app"}
	unknown := once.Reader{UID: 1000, GID: 1000}
	for name, c := range map[string]struct {
		event once.Event
		want  bool
	}{
		"claim":                      {once.Event{Kind: once.Claiming, Reader: &cat}, false},
		"delivery":                   {once.Event{Kind: once.Delivery, Reader: &cat}, false},
		"expiry":                     {once.Event{Kind: once.Expiry}, false},
		"a change":                   {once.Event{Kind: once.Refusal, Op: "change", Reader: &cat}, false},
		"refused by the policy":      {once.Event{Kind: once.Refusal, Op: "open", Why: "w", Reader: &cat}, true},
		"the reader again":           {once.Event{Kind: once.Late, Reader: &app, Had: &app}, false},
		"the reader, not looked up":  {once.Event{Kind: once.Late, Reader: &sameThread, Had: &app}, false},
		"its worker":                 {once.Event{Kind: once.Late, Reader: &worker, Had: &app}, false},
		"another program":            {once.Event{Kind: once.Late, Reader: &cat, Had: &app}, true},
		"another user":               {once.Event{Kind: once.Late, Reader: &root, Had: &app}, true},
		"cannot be told":             {once.Event{Kind: once.Late, Reader: &unknown, Had: &app}, true},
		"neither can be told":        {once.Event{Kind: once.Late, Reader: &unknown, Had: &unknown}, true},
		"nobody had it, it is later": {once.Event{Kind: once.Late, Reader: &cat}, false},
	} {
		if got := intrusion(c.event); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestC20_Reaction(t *testing.T) {
	for text, want := range map[string]reaction{"log": {}, "exit": {exit: true}, "exec:/bin/a b": {command: "/bin/a b"}} {
		var got reaction
		if err := got.UnmarshalText([]byte(text)); err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "exec", "exec:", "mail"} {
		if new(reaction).UnmarshalText([]byte(text)) == nil {
			t.Errorf("%q is taken", text)
		}
	}
}

// A tripwire that is pulled faster than anything is done about it waits for
// nothing, and counts.
func TestC20_TripwireNeverBlocks(t *testing.T) {
	e := once.Event{Kind: once.Late, Reader: &once.Reader{}, Had: &once.Reader{}}
	for range 100 {
		newTripwire(reaction{}).pull(e, record{})
	}
	exec, exit := newTripwire(reaction{command: "x"}), newTripwire(reaction{exit: true})
	for range 100 {
		exec.pull(e, record{})
		exit.pull(e, record{})
	}
	if n := exec.missed.Load(); n != 99 {
		t.Errorf("%d missed", n)
	}
	if len(exit.intruded) != 1 || len(exec.alarms) != 1 {
		t.Error("nothing waits to be done")
	}
}
