package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/lmittmann/tint"
	"golang.org/x/term"

	"oncefs/internal/once"
)

// events writes one structured line for each thing that happens. Telling it
// never blocks: lines wait for a goroutine that writes them, and what does not
// fit is counted and told later. A log that nobody reads must not stall a reader.
//
// What is no warning waits a moment for more: a reader that is at it does not
// share its processors with the log.
type events struct {
	mu      sync.Mutex
	waiting []record
	lost    int64

	due  chan struct{} // there is something to write, now
	soon *time.Timer   // puts it there
	quit chan struct{} // closed when nothing more is to come
	done chan struct{} // closed when all of it is written
	w    io.Writer
	text bytes.Buffer // lines that the handler made
	log  slog.Handler // into text
}

const (
	// moment is how long a line may wait for others.
	moment = 2 * time.Millisecond
	// mostWaiting is how many lines wait for a log that takes none.
	mostWaiting = 1024
	// mostAtOnce is how much is written at once, or one line: as much as a pipe
	// that others write to takes without mixing it with theirs (PIPE_BUF, pipe(7)).
	mostAtOnce = 4096
)

type record struct {
	at    time.Time
	level slog.Level
	name  string
	attrs []slog.Attr
}

// What --log-format may say.
const (
	formatAuto = "auto" // text for a terminal, JSON for anything else
	formatText = "text"
	formatJSON = "json"
)

// newEvents starts the writing goroutine.
func newEvents(w *os.File, format string) *events {
	// The time zone is read from a file now, while there are files.
	_, _ = time.Now().Zone()
	terminal := term.IsTerminal(int(w.Fd()))
	e := &events{due: make(chan struct{}, 1), quit: make(chan struct{}), done: make(chan struct{}), w: w}
	if format == formatJSON || format == formatAuto && !terminal {
		e.log = slog.NewJSONHandler(&e.text, nil)
	} else {
		// no-color.org: set and not empty.
		plain := !terminal || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb"
		e.log = tint.NewTextHandler(&e.text, &tint.Options{NoColor: plain, TimeFormat: time.DateTime})
	}
	e.soon = time.AfterFunc(time.Hour, e.hurry)
	e.soon.Stop()
	go func() {
		defer close(e.done)
		for {
			select {
			case <-e.due:
				e.write()
			case <-e.quit:
				e.write()
				return
			}
		}
	}()
	return e
}

// hurry has all that waits written.
func (e *events) hurry() {
	select {
	case e.due <- struct{}{}:
	default: // it is due already
	}
}

// write writes all that waits.
func (e *events) write() {
	e.mu.Lock()
	records, lost := e.waiting, e.lost
	e.waiting, e.lost = nil, 0
	e.mu.Unlock()
	if lost > 0 {
		// They were the last to come, and are told where they are missing.
		records = append(records, record{at: time.Now(), level: slog.LevelWarn, name: "events-lost", attrs: []slog.Attr{slog.Int64("count", lost)}})
	}
	for _, r := range records {
		end := e.text.Len()
		_ = e.log.Handle(context.Background(), r.slog()) // a buffer takes all
		if e.text.Len() > mostAtOnce && end > 0 {
			_, _ = e.w.Write(e.text.Next(end)) // whom could it be told?
		}
	}
	if e.text.Len() > 0 {
		_, _ = e.w.Write(e.text.Bytes())
	}
	e.text.Reset()
}

func (e *events) tell(level slog.Level, name string, attrs ...slog.Attr) {
	e.put(record{at: time.Now(), level: level, name: name, attrs: attrs})
}

func (e *events) put(r record) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.waiting) >= mostWaiting {
		e.lost++
		return
	}
	e.waiting = append(e.waiting, r)
	switch {
	case r.level >= slog.LevelWarn:
		e.hurry()
	case len(e.waiting) == 1:
		e.soon.Reset(moment)
	}
}

// close writes what is left, for as long as a second: the log may be stuck.
// What is told afterwards goes nowhere.
func (e *events) close() {
	close(e.quit)
	select {
	case <-e.done:
	case <-time.After(time.Second):
	}
}

func (r record) slog() slog.Record {
	rec := slog.NewRecord(r.at, r.level, r.name, 0)
	rec.AddAttrs(r.attrs...)
	return rec
}

// json is the line as a JSON log has it, wherever the log goes.
func (r record) json() []byte {
	var line bytes.Buffer
	_ = slog.NewJSONHandler(&line, nil).Handle(context.Background(), r.slog()) // a buffer takes all
	return line.Bytes()
}

// observe returns the observer of one secret. What it makes of an intrusion is
// passed on.
func (e *events) observe(path string, intruded func(once.Event, record)) func(once.Event) {
	return func(ev once.Event) {
		attrs := []slog.Attr{slog.String("path", path)}
		level := slog.LevelInfo
		switch ev.Kind {
		case once.Delivery, once.Destroyed, once.Disarmed, once.Rearmed:
			attrs = append(attrs, slog.Int64("sent", ev.Sent), slog.Int64("of", ev.Size), slog.Bool("whole", ev.Whole), slog.Int("left", ev.Left))
		case once.Expiry:
			attrs = append(attrs, slog.Int64("sent", ev.Sent), slog.Int64("of", ev.Size), slog.String("limit", ev.Op))
			level = slog.LevelWarn
		case once.Refusal, once.Late:
			attrs = append(attrs, slog.String("op", ev.Op))
			if ev.Why != "" {
				attrs = append(attrs, slog.String("why", ev.Why))
			}
			level = slog.LevelWarn
		}
		if ev.Untold > 0 {
			attrs = append(attrs, slog.Int64("untold", ev.Untold))
		}
		if r := ev.Reader; r != nil {
			attrs = append(attrs, slog.Uint64("pid", uint64(r.PID)), slog.Uint64("uid", uint64(r.UID)), slog.Uint64("gid", uint64(r.GID)),
				slog.String("exe", r.Exe), slog.String("cgroup", r.Cgroup))
		}
		if ev.Err != nil {
			level = slog.LevelError
			attrs = append(attrs, slog.String("error", ev.Err.Error()))
		}
		intruder := intrusion(ev)
		if intruder {
			attrs = append(attrs, slog.Bool("intrusion", true))
		}
		line := record{at: ev.Time, level: level, name: string(ev.Kind), attrs: attrs}
		e.put(line)
		if intruder {
			intruded(ev, line)
		}
	}
}
