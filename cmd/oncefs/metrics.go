package main

import (
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"oncefs/internal/metrics"
)

// metricsFlags say where the counters are shown.
type metricsFlags struct {
	Metrics         string `placeholder:"ADDRESS" help:"Show counters to Prometheus at this address, for example 127.0.0.1:9735, under /metrics. Whoever reaches it can read them."`
	MetricsTextfile string `placeholder:"DIR" help:"Keep counters in a file in this directory, which the node exporter's textfile collector reads."`
}

func (f *metricsFlags) validate() error {
	if f.Metrics != "" {
		if _, _, err := net.SplitHostPort(f.Metrics); err != nil {
			return fmt.Errorf("--metrics: %w", err)
		}
	}
	return nil
}

// textfile is the file for a mount in the directory: no two mounts share one.
func (f *metricsFlags) textfile(mount string) string {
	if f.MetricsTextfile == "" {
		return ""
	}
	return filepath.Join(f.MetricsTextfile, "oncefs-"+url.PathEscape(strings.TrimPrefix(mount, "/"))+".prom")
}

// countersEvery is how often changes are passed on; the first is at once.
const countersEvery = time.Second

// counters keep the program that shows them informed. They never make anybody
// wait: what changes pulls a cord, and a goroutine looks and tells. The methods
// of nil do nothing.
type counters struct {
	shown *metrics.Metrics
	cord  chan struct{}
	stop  chan struct{}
	done  chan struct{} // nil before show
}

// openCounters starts that program if it was asked for.
func (m *mounting) openCounters() error {
	file := m.textfile(m.point.Path)
	if m.Metrics == "" && file == "" {
		return nil
	}
	shown, err := metrics.Start(filepath.Dir(m.binary), m.Metrics, file)
	if err != nil {
		return fmt.Errorf("%w: %w", errMetrics, err)
	}
	m.counters = &counters{shown: shown, cord: make(chan struct{}, 1), stop: make(chan struct{})}
	return nil
}

// changed says that something is to be told.
func (c *counters) changed() {
	if c == nil {
		return
	}
	select {
	case c.cord <- struct{}{}:
	default: // it is said already
	}
}

// show tells the counters of a mount now and whenever they change, until close.
// Nothing happens while nothing changes.
func (c *counters) show(m *mounting) {
	if c == nil {
		return
	}
	c.done = make(chan struct{})
	c.changed()
	go func() {
		defer close(c.done)
		for {
			select {
			case <-c.cord:
			case <-c.shown.Ended():
				m.events.tell(slog.LevelError, "metrics", slog.String("error", metrics.Program+" has ended: the counters are not shown any more"))
				return
			case <-c.stop:
				c.shown.Tell(m.samples()) // the last
				return
			}
			if c.shown.Tell(m.samples()) != nil {
				<-c.shown.Ended() // which is told above
				continue
			}
			select {
			case <-time.After(countersEvery):
			case <-c.stop:
			}
		}
	}()
}

// close shows the last counters and ends the program.
func (c *counters) close() {
	if c == nil {
		return
	}
	close(c.stop)
	if c.done != nil {
		select {
		case <-c.done:
		case <-time.After(time.Second): // it does not listen
		}
	}
	c.shown.Close()
}

func (m *mounting) samples() (all []metrics.Sample) {
	for _, s := range m.secrets {
		st := s.once.Status()
		n := st.Counts
		all = append(all, metrics.Sample{
			Mount: label(m.point.Path), Secret: label(s.name), Left: st.Left,
			Sealed: n.Sealed, Claimed: n.Claimed, GivenBack: n.GivenBack, Delivered: n.Delivered,
			Expired: n.Expired, Refused: n.Refused, Late: n.Late, Intrusions: s.intrusions.Load(),
		})
	}
	return all
}

// label is a name as Prometheus takes it: a file's name is any bytes, a label is
// UTF-8.
func label(name string) string {
	if utf8.ValidString(name) {
		return name
	}
	return strconv.Quote(name)
}
