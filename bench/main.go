// Bench runs the same work through oncefs and its peers on one machine, in one
// run, and writes tables of ratios, plots and the raw numbers. See
// docs/benchmarks.md, which it writes, and ci/bench, which calls it.
//
// It is a module of its own so that the product's go.mod stays without peers.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"
)

func main() {
	if len(os.Args) > 1 {
		// The peers that are libraries are this binary too.
		switch os.Args[1] {
		case "serve-gofuse":
			exit(serveGoFuse(os.Args[2:]))
		case "serve-bazil":
			exit(serveBazil(os.Args[2:]))
		}
	}
	// A collection costs the peers nothing, and can stop what times them: in Go 1.26
	// for a minute, where it meets a thread that begins a long system call.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(8 << 30)
	exit(run())
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// A work is one section of the page.
type work struct {
	name string
	run  func(*bench) error
}

var works = []work{
	{"start", (*bench).start},
	{"read", (*bench).read},
	{"race", (*bench).race},
	{"afterwards", (*bench).afterwards},
	{"size", (*bench).size},
	{"growth", (*bench).growth},
}

func run() error {
	short := flag.Bool("short", false, "small sizes and few rounds: a smoke test that judges no time")
	only := flag.String("only", "", "comma-separated `works`: start, read, race, afterwards, size, growth")
	binary := flag.String("oncefs", "dist/oncefs", "the `binary` under test")
	out := flag.String("out", "", "`directory` for benchmarks.md, benchmarks.json and the plots; none: print only")
	from := flag.String("from", "", "write the page again from the raw numbers in this `file`")
	flag.Parse()
	if *from != "" {
		r, err := load(*from)
		if err != nil {
			return err
		}
		return r.write(*out)
	}
	abs, err := filepath.Abs(*binary)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "oncefs-bench-")
	if err != nil {
		return err
	}
	shm, err := os.MkdirTemp("/dev/shm", "oncefs-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(shm)
	b := &bench{short: *short, shm: shm, oncefs: abs, dir: dir, gpgHome: filepath.Join(dir, "gpg"), record: &record{}}
	defer b.close()
	if err := os.Mkdir(b.gpgHome, 0o700); err != nil {
		return err
	}
	if err := b.record.describe(b); err != nil {
		return err
	}
	var failed []error
	begin := time.Now()
	for _, w := range works {
		if *only != "" && !strings.Contains(","+*only+",", ","+w.name+",") {
			continue
		}
		fmt.Fprintf(os.Stderr, "== %s (%.0f s)\n", w.name, time.Since(begin).Seconds())
		if err := w.run(b); err != nil {
			// The others took minutes, and are worth a page that says what it lacks.
			failed = append(failed, fmt.Errorf("%s: %w", w.name, err))
			b.record.leaveOut(w.name, "oncefs", "and what follows it", err)
		}
	}
	b.record.Seconds = time.Since(begin).Seconds()
	if *out != "" {
		return errors.Join(append(failed, b.record.write(*out))...)
	}
	return errors.Join(append(failed, b.record.page(os.Stdout))...)
}

// bench is one run: where it works, and what it has measured.
type bench struct {
	short   bool
	oncefs  string // the binary
	dir     string
	shm     string // a directory in memory
	gpgHome string
	record  *record
	last    int // directory that fresh made
	arrived []byte
}

func (b *bench) close() {
	// gpg's agent was started for its S2K count.
	exec.Command("gpgconf", "--homedir", b.gpgHome, "--kill", "all").Run()
	// Whatever a failed work left mounted must not be walked into.
	if err := unmountBelow(b.dir); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return
	}
	os.RemoveAll(b.dir)
}

// fresh makes an empty directory of its own.
func (b *bench) fresh() (string, error) {
	b.last++
	dir := filepath.Join(b.dir, fmt.Sprint(b.last))
	return dir, os.Mkdir(dir, 0o700)
}

// rounds is how often something is measured.
func (b *bench) rounds(full int) int {
	if b.short {
		return min(full, 2)
	}
	return full
}

// interleave calls every measurement once a round, A B A B, so that what else
// happens on the machine falls on all alike. Each value goes to the series of
// its name. A peer that fails is left out with its reason.
func (b *bench) interleave(rounds int, unit string, ms []measurement) error {
	failed := map[int]bool{}
	for round := range rounds {
		for i, m := range ms {
			if failed[i] || m.every > 1 && round%m.every != 0 {
				continue
			}
			v, err := m.run()
			if err != nil {
				if m.must {
					return fmt.Errorf("%s, %s: %w", m.peer, m.of, err)
				}
				failed[i] = true
				b.record.leaveOut(m.work, m.peer, m.of, err)
				continue
			}
			b.record.add(m.work, m.peer, m.of, unit, v)
		}
	}
	return nil
}

// A measurement is one peer at one piece of work.
type measurement struct {
	work, peer, of string
	must           bool // a failure ends the run: ours, and what we compare with
	every          int  // only every so many rounds, for what takes long
	run            func() (float64, error)
}

var errMissing = errors.New("not installed here")

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// readWhole reads all of a file as a program would, and tells whether it is the
// content that was meant.
func readWhole(path string, want []byte) error {
	got := make([]byte, len(want))
	if err := readInto(path, got); err != nil {
		return err
	}
	return same(got, want)
}

func readInto(path string, got []byte) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.ReadFull(f, got)
	return err
}

// arrival times what brings a content, up to the last byte of it, and then tells
// whether it is the one that was meant. It is brought to memory that is there
// already, and holds nothing of what came before.
func (b *bench) arrival(want []byte, bring func(got []byte) error) (time.Duration, error) {
	if cap(b.arrived) < len(want) {
		b.arrived = make([]byte, len(want))
	}
	got := b.arrived[:len(want)]
	for i := range got {
		got[i] = 0xff
	}
	begin := time.Now()
	err := bring(got)
	took := time.Since(begin)
	if err == nil {
		err = same(got, want)
	}
	return took, err
}
