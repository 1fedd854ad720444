package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"

	"oncefs/internal/once"
)

// errIntrusion ends the program under --on-intrusion exit.
var errIntrusion = errors.New("somebody else was at the secret")

// A reaction is what is done about an intrusion beside the line in the log.
type reaction struct {
	exit    bool
	command string // to be started; "" for none
}

func (r *reaction) UnmarshalText(text []byte) error {
	command, run := strings.CutPrefix(string(text), "exec:")
	switch {
	case string(text) == "log":
		*r = reaction{}
	case string(text) == "exit":
		*r = reaction{exit: true}
	case run && command != "":
		*r = reaction{command: command}
	default:
		return fmt.Errorf("%q is none of log, exit and exec:COMMAND", text)
	}
	return nil
}

// find makes the command a path that holds wherever it is started.
func (r *reaction) find() error {
	if r.command == "" {
		return nil
	}
	path, err := exec.LookPath(r.command)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return fmt.Errorf("%w: --on-intrusion: %w", errNotFit, err)
	}
	r.command = path
	return nil
}

// intrusion tells whether an event is the work of somebody who should not be
// there: a reader whom the policy refused, or an attempt that came late and is
// not the reader's own. Many programs look at their config again, so the reader
// is forgiven that: the same thread, or the same user with the same executable.
// Who cannot be told from the reader by that is not forgiven. Where nobody ever
// had it (it expired unread) a late attempt is just late, and acts that nobody
// may do are refused to anybody (an entrypoint's chown).
func intrusion(e once.Event) bool {
	switch {
	case e.Reader == nil:
		return false
	case e.Kind == once.Refusal:
		return e.Why != ""
	case e.Kind != once.Late || e.Had == nil:
		return false
	}
	who, had := e.Reader, e.Had
	return who.UID != had.UID || (who.PID == 0 || who.PID != had.PID) && (who.Exe == "" || who.Exe != had.Exe)
}

// A tripwire reacts to intrusions without ever making anybody wait.
type tripwire struct {
	reaction
	intruded chan once.Event // under exit: the first one
	alarms   chan record     // under exec: the next one
	missed   atomic.Int64    // alarms that came while the command ran
}

func newTripwire(r reaction) *tripwire {
	return &tripwire{reaction: r, intruded: make(chan once.Event, 1), alarms: make(chan record, 1)}
}

// pull is told of an intrusion, and the line that the log has of it.
func (t *tripwire) pull(e once.Event, line record) {
	switch {
	case t.exit:
		select {
		case t.intruded <- e:
		default: // it is ending already
		}
	case t.command != "":
		select {
		case t.alarms <- line:
		default:
			t.missed.Add(1)
		}
	}
}

// raise starts the command for one alarm after the other, as long as we live.
func (m *mounting) raise() {
	for r := range m.tripwire.alarms {
		if n := m.tripwire.missed.Swap(0); n > 0 {
			r.attrs = append(r.attrs, slog.Int64("missed", n))
		}
		if err := m.alarm.Raise(r.json()); err != nil {
			m.events.tell(slog.LevelError, "intrusion-command", slog.String("command", m.tripwire.command), slog.String("error", err.Error()))
		}
	}
}

// intruder is the error that names who it was.
func intruder(path string, e once.Event) error {
	r := e.Reader
	return fmt.Errorf("%w: %s: %s %s by %s (pid %d, uid %d)", errIntrusion, path, e.Kind, e.Op, name(r.Exe), r.PID, r.UID)
}
