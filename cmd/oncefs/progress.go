package main

import (
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/docker/go-units"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// progressAfter is how long work is not long.
const progressAfter = 500 * time.Millisecond

// A progress is one line on the terminal that tells how far work is, and is gone
// when the work is over. It knows numbers of bytes and a name.
type progress struct {
	out   io.Writer
	what  string
	total int64        // 0 or less if that is not known
	done  func() int64 // negative before the work begins
	stop  chan struct{}
	ended chan struct{}
}

// progress shows how far work is, until the function that it returns is called. It
// shows nothing where standard error is no terminal or another job's, or where the
// work is soon over.
func (t *tui) progress(what string, total int64, done func() int64) (stop func()) {
	if t.terminal == nil {
		return func() {}
	}
	p := &progress{out: t.terminal, what: printable(what), total: total, done: done, stop: make(chan struct{}), ended: make(chan struct{})}
	go p.show()
	return func() {
		close(p.stop)
		select {
		case <-p.ended:
		case <-time.After(time.Second): // a terminal that is held up (Ctrl-S) holds up nothing else
		}
	}
}

// terminalOf is a stream if a person sees it and lines can be drawn anew there.
func terminalOf(f *os.File) *os.File {
	if !term.IsTerminal(int(f.Fd())) || os.Getenv("TERM") == "dumb" {
		return nil
	}
	return f
}

func (p *progress) show() {
	defer close(p.ended)
	tick := time.NewTicker(progressAfter / 5)
	defer tick.Stop()
	var began time.Time
	var shown *mpb.Progress
	var bar *mpb.Bar
	for {
		select {
		case <-p.stop:
			if shown != nil {
				bar.Abort(true)
				shown.Wait()
			}
			return
		case now := <-tick.C:
			done := p.done()
			switch {
			case done < 0:
				continue
			case began.IsZero():
				began = now
				continue
			case shown == nil && (now.Sub(began) < progressAfter || !foreground()):
				continue
			case shown == nil:
				shown, bar = p.draw(began)
			}
			bar.SetCurrent(done)
		}
	}
}

// draw also shows for how long: a key takes its time to derive, while no byte is
// read.
func (p *progress) draw(began time.Time) (*mpb.Progress, *mpb.Bar) {
	elapsed := func() time.Duration { return time.Since(began).Truncate(time.Second) }
	shown := mpb.New(mpb.WithOutput(p.out), mpb.WithWidth(30), mpb.WithRefreshRate(progressAfter/5))
	before := mpb.PrependDecorators(decor.Name(short(p.what) + " "))
	if p.total <= 0 {
		return shown, shown.New(0, mpb.SpinnerStyle(), before, mpb.BarFillerTrim(), mpb.AppendDecorators(decor.Any(func(s decor.Statistics) string {
			return fmt.Sprintf(" %s, %s", units.BytesSize(float64(s.Current)), elapsed())
		})))
	}
	// Dropped at its end by us, not when it is full: what follows may take as long.
	bar := shown.New(p.total+1, mpb.BarStyle(), before, mpb.BarFillerTrim(), mpb.AppendDecorators(decor.Any(func(s decor.Statistics) string {
		return fmt.Sprintf(" %d%% of %s, %s", 100*s.Current/s.Total, units.BytesSize(float64(p.total)), elapsed())
	})))
	return shown, bar
}

// short keeps a line on one line.
func short(s string) string {
	if r := []rune(s); len(r) > 36 {
		return string(r[:35]) + "…"
	}
	return s
}

// foreground tells whether the terminal is this process's to write to.
func foreground() bool {
	group, err := unix.IoctlGetInt(2, unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// readSoFar tells how much of open files was read, by whoever reads them: a child
// that inherits them shares their offset. It is negative before anything was: a
// passphrase may be asked for until then.
func readSoFar(files []*os.File) func() int64 {
	return func() int64 {
		var sum int64
		for _, f := range files {
			if at, err := f.Seek(0, io.SeekCurrent); err == nil {
				sum += at
			}
		}
		if sum == 0 {
			return -1
		}
		return sum
	}
}

// sizes is what open files hold together, or 0 if one of them cannot tell.
func sizes(files []*os.File) (sum int64) {
	for _, f := range files {
		info, err := f.Stat()
		if err != nil || !info.Mode().IsRegular() {
			return 0
		}
		sum += info.Size()
	}
	return sum
}

// A counted reader counts what was read of it.
type counted struct {
	io.Reader
	n atomic.Int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n.Add(int64(n))
	return n, err
}
