package main

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	_ "gonum.org/v1/plot/vg/vgsvg" // Save writes SVG
)

// plots draws what the tables hold.
func (r *record) plots(dir string) error {
	bytes := map[string]float64{}
	for _, s := range sizes {
		bytes[s.name+", default S2K"] = float64(s.bytes)
	}
	byName := func(of string) (float64, bool) { x, ok := bytes[of]; return x, ok }
	byNumber := func(of string) (float64, bool) { n, err := strconv.Atoi(of); return float64(n), err == nil }
	counted := func(what string) func(string) (float64, bool) {
		re := regexp.MustCompile(`^(\d+) ` + regexp.QuoteMeta(what) + `$`)
		return func(of string) (float64, bool) {
			m := re.FindStringSubmatch(of)
			if m == nil {
				return 0, false
			}
			n, err := strconv.Atoi(m[1])
			return float64(n), err == nil
		}
	}
	lines := []struct {
		file, title, x, y string
		curves            []curve
	}{
		{"benchmarks-start", "Start to content, gpg's default S2K", "bytes", "ms", r.curves("start", byName)},
		{"benchmarks-race", "Until the last process has its answer", "processes", "ms", r.curves("race time", byNumber)},
		{"benchmarks-growth", "Growth", "secrets, or mounts", "start in ms, memory in MiB", []curve{
			{"start of one mount of so many secrets", r.points("growth", "oncefs", counted("secrets, start"))},
			{"its memory", r.points("growth", "oncefs", counted("secrets, memory (PSS)"))},
			{"start of the last of so many mounts", r.points("growth", "oncefs", counted("mounts, start of each"))},
			{"memory of each", r.points("growth", "oncefs", counted("mounts, memory of each (PSS)"))},
		}},
	}
	for _, l := range lines {
		p := plot.New()
		p.Title.Text, p.X.Label.Text, p.Y.Label.Text = l.title, l.x, l.y
		p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
		p.X.Tick.Marker, p.Y.Tick.Marker = plot.LogTicks{Prec: -1}, plot.LogTicks{Prec: -1}
		p.Legend.Left, p.Legend.Top = true, true
		var all []any
		for _, c := range l.curves {
			if len(c.points) > 0 {
				all = append(all, c.name, c.points)
			}
		}
		if len(all) == 0 {
			continue
		}
		if err := plotutil.AddLinePoints(p, all...); err != nil {
			return fmt.Errorf("%s: %w", l.file, err)
		}
		p.Y.Max *= 30 // room for the legend
		if err := p.Save(18*vg.Centimeter, 12*vg.Centimeter, filepath.Join(dir, l.file+".svg")); err != nil {
			return err
		}
	}
	return r.bars(dir)
}

// bars draws one read.
func (r *record) bars(dir string) error {
	var names []string
	var p50, p99 plotter.Values
	for _, s := range r.Series {
		if s.Work == "one read" && s.Of == "p50" {
			names = append(names, s.Peer)
			p50 = append(p50, median(s.Values))
			p99 = append(p99, median(r.find(s.Work, s.Peer, "p99").Values))
		}
	}
	if len(names) == 0 {
		return nil
	}
	p := plot.New()
	p.Title.Text, p.Y.Label.Text = "One read: open, read 1 KiB, close", "µs"
	p.Legend.Top = true
	width := vg.Points(20)
	for i, v := range []plotter.Values{p50, p99} {
		bars, err := plotter.NewBarChart(v, width)
		if err != nil {
			return err
		}
		bars.Color = plotutil.Color(i)
		bars.Offset = width * vg.Length(i)
		p.Add(bars)
		p.Legend.Add([]string{"p50", "p99"}[i], bars)
	}
	p.NominalX(names...)
	return p.Save(18*vg.Centimeter, 10*vg.Centimeter, filepath.Join(dir, "benchmarks-read.svg"))
}

type curve struct {
	name   string
	points plotter.XYs
}

// curves are the medians of each peer, where x finds a place for them.
func (r *record) curves(work string, x func(string) (float64, bool)) (all []curve) {
	var peers []string
	for _, s := range r.Series {
		if s.Work == work && !slices.Contains(peers, s.Peer) {
			peers = append(peers, s.Peer)
			all = append(all, curve{s.Peer, r.points(work, s.Peer, x)})
		}
	}
	return all
}

func (r *record) points(work, peer string, x func(string) (float64, bool)) (xys plotter.XYs) {
	for _, s := range r.Series {
		if s.Work != work || s.Peer != peer {
			continue
		}
		// A log scale has no place for zero.
		if at, ok := x(s.Of); ok && at > 0 && median(s.Values) > 0 {
			xys = append(xys, plotter.XY{X: at, Y: median(s.Values)})
		}
	}
	return xys
}
