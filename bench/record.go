package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A series is one peer at one piece of work: a value for each round.
type series struct {
	Work   string    `json:"work"`
	Peer   string    `json:"peer"`
	Of     string    `json:"of"` // the size, the number of readers, or what else varies
	Unit   string    `json:"unit"`
	Values []float64 `json:"values"`
}

// An omission is a peer that could not be measured, and why.
type omission struct {
	Work, Peer, Of, Why string
}

// record is all that a run measured: the raw numbers.
type record struct {
	Machine  []string   `json:"machine"`
	Programs []string   `json:"programs"` // and their versions
	Seconds  float64    `json:"seconds"`  // that the run took
	Series   []*series  `json:"series"`
	LeftOut  []omission `json:"left_out"`
}

func (r *record) add(work, peer, of, unit string, v ...float64) {
	if s := r.find(work, peer, of); s != nil {
		s.Values = append(s.Values, v...)
		return
	}
	r.Series = append(r.Series, &series{Work: work, Peer: peer, Of: of, Unit: unit, Values: v})
}

func (r *record) find(work, peer, of string) *series {
	for _, s := range r.Series {
		if s.Work == work && s.Peer == peer && s.Of == of {
			return s
		}
	}
	return nil
}

func (r *record) leaveOut(work, peer, of string, err error) {
	fmt.Fprintf(os.Stderr, "left out: %s, %s, %s: %v\n", work, peer, of, err)
	r.LeftOut = append(r.LeftOut, omission{work, peer, of, err.Error()})
}

// median of the values; 0 for none.
func median(values []float64) float64 {
	v := slices.Sorted(slices.Values(values))
	switch n := len(v); {
	case n == 0:
		return 0
	case n%2 == 1:
		return v[n/2]
	default:
		return (v[n/2-1] + v[n/2]) / 2
	}
}

// ratio is the median of a's values, each divided by b's of the same round.
func ratio(a, b *series) (float64, bool) {
	if a == nil || b == nil {
		return 0, false
	}
	n := min(len(a.Values), len(b.Values))
	if len(a.Values) != len(b.Values) {
		// Not measured in every round: the middles are compared.
		if n == 0 || median(b.Values) == 0 {
			return 0, false
		}
		return median(a.Values) / median(b.Values), true
	}
	var all []float64
	for i := range n {
		if b.Values[i] == 0 {
			return 0, false
		}
		all = append(all, a.Values[i]/b.Values[i])
	}
	return median(all), n > 0
}

// describe says what was measured with what.
func (r *record) describe(b *bench) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	str := func(b []byte) string { return strings.TrimRight(string(b), "\x00") }
	r.Machine = append(r.Machine, fmt.Sprintf("%d processors: %s", runtime.NumCPU(), field("/proc/cpuinfo", "model name")),
		"memory: "+field("/proc/meminfo", "MemTotal"), "kernel "+str(u.Release[:])+" "+str(u.Machine[:]))
	for _, p := range [][]string{{b.oncefs, "version"}, {"gpg", "--version"}, {"age", "--version"}, {"sops", "--version"}, {"gocryptfs", "--version"}, {"busybox"}} {
		cmd := exec.Command(p[0], p[1:]...)
		out, err := cmd.CombinedOutput()
		line, _, _ := strings.Cut(string(out), "\n")
		switch {
		case errors.Is(err, exec.ErrNotFound):
			line = "not installed"
		case err != nil:
			return fmt.Errorf("%v: %w", p, err)
		}
		r.Programs = append(r.Programs, filepath.Base(p[0])+": "+strings.TrimSpace(line))
	}
	return nil
}

func field(file, name string) string {
	text, _ := os.ReadFile(file)
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}

func load(file string) (*record, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	r := &record{}
	return r, json.Unmarshal(text, r)
}
