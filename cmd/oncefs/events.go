package main

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/lmittmann/tint"
	"golang.org/x/term"

	"oncefs/internal/once"
)

// events writes one structured line for each thing that happens. Telling it
// never blocks: lines wait in a queue for a goroutine that writes them, and what
// does not fit is counted and told later. A log that nobody reads must not stall
// a reader.
type events struct {
	queue chan record
	lost  atomic.Int64
	quit  chan struct{} // closed when nothing more is to come
	done  chan struct{} // closed when all of it is written
	log   *slog.Logger
}

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
	if format == formatJSON || format == formatAuto && !terminal {
		return startEvents(slog.NewJSONHandler(w, nil))
	}
	// no-color.org: set and not empty.
	plain := !terminal || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb"
	return startEvents(tint.NewTextHandler(w, &tint.Options{NoColor: plain, TimeFormat: time.DateTime}))
}

func startEvents(handler slog.Handler) *events {
	e := &events{queue: make(chan record, 1024), quit: make(chan struct{}), done: make(chan struct{}), log: slog.New(handler)}
	go func() {
		defer close(e.done)
		for {
			select {
			case r := <-e.queue:
				e.write(r)
			case <-e.quit:
				for {
					select {
					case r := <-e.queue:
						e.write(r)
					default:
						return
					}
				}
			}
		}
	}()
	return e
}

func (e *events) write(r record) {
	ctx := context.Background()
	if n := e.lost.Swap(0); n > 0 {
		e.log.LogAttrs(ctx, slog.LevelWarn, "events-lost", slog.Int64("count", n))
	}
	rec := slog.NewRecord(r.at, r.level, r.name, 0)
	rec.AddAttrs(r.attrs...)
	_ = e.log.Handler().Handle(ctx, rec)
}

func (e *events) tell(level slog.Level, name string, attrs ...slog.Attr) {
	e.put(record{at: time.Now(), level: level, name: name, attrs: attrs})
}

func (e *events) put(r record) {
	select {
	case e.queue <- r:
	default:
		e.lost.Add(1)
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

// json is the line as a JSON log has it, wherever the log goes.
func (r record) json() []byte {
	var line bytes.Buffer
	rec := slog.NewRecord(r.at, r.level, r.name, 0)
	rec.AddAttrs(r.attrs...)
	_ = slog.NewJSONHandler(&line, nil).Handle(context.Background(), rec) // a buffer takes all
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
