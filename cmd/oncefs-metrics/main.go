// Oncefs-metrics shows the counters of an oncefs mount to Prometheus: to whoever
// asks over HTTP, or in a file for the node exporter. It is started by oncefs
// mount and oncefs run, knows nothing but the counters, and ends with them. See
// README.md.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/expfmt"
	"golang.org/x/net/netutil"

	"oncefs/internal/metrics"
	"oncefs/internal/sandbox"
)

// linkedWithC tells a binary that cannot keep its promises, see cgo.go.
var linkedWithC bool

func main() {
	source, address, file, err := metrics.Inherit(os.Args)
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: error: %v\n", metrics.Program, err)
		os.Exit(1)
	}
	p, err := open(address, file)
	source.SetUp(err)
	if err != nil {
		os.Exit(1) // and oncefs says why
	}
	p.run(source)
}

// How many are answered at once, for how long, and how much of a request is read.
// Who holds all connections keeps others from the counters, and from nothing else.
const (
	mostConns = 32
	connTime  = 10 * time.Second
	mostHead  = 8 << 10
)

// A publisher shows the latest samples.
type publisher struct {
	counters *collector
	registry *prometheus.Registry
	listener net.Listener // nil where nobody may ask
	dir      *os.Root     // of the file; nil without one
	name     string
}

// open opens what showing takes, and gives up the rest.
func open(address, file string) (*publisher, error) {
	if linkedWithC {
		return nil, errors.New(metrics.Program + " is linked with C: build it with CGO_ENABLED=0")
	}
	p := &publisher{counters: &collector{}, registry: prometheus.NewRegistry()}
	if err := p.registry.Register(p.counters); err != nil {
		return nil, err
	}
	if address != "" {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return nil, err
		}
		p.listener = netutil.LimitListener(l, mostConns)
	}
	var dir *os.File
	if file != "" {
		var err error
		if dir, err = os.Open(filepath.Dir(file)); err != nil {
			return nil, err
		}
		defer dir.Close()
		if p.dir, err = os.OpenRoot(filepath.Dir(file)); err != nil {
			return nil, err
		}
		p.name = filepath.Base(file)
	}
	if err := sandbox.Publisher(dir); err != nil {
		return nil, err
	}
	if p.dir != nil {
		// Whether it can be written is to be known now. Nothing takes its name yet:
		// the mount may come to nothing.
		f, err := p.pending()
		if err == nil {
			err = f.Cleanup()
		}
		if err != nil {
			return nil, err
		}
	}
	return p, nil
}

// run shows what it is told until the serving process is gone, and then that it
// is.
func (p *publisher) run(source *metrics.Source) {
	if p.listener != nil {
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", promhttp.HandlerFor(p.registry, promhttp.HandlerOpts{}))
		server := &http.Server{
			Handler: mux, ErrorLog: log.New(io.Discard, "", 0), MaxHeaderBytes: mostHead,
			ReadTimeout: connTime, WriteTimeout: connTime, IdleTimeout: 2 * time.Minute,
		}
		go server.Serve(p.listener)
	}
	for told := false; ; told = true {
		samples, err := source.Next()
		if err != nil {
			if told {
				p.counters.end()
				p.write()
			}
			return
		}
		p.counters.set(samples)
		p.write()
	}
}

// write replaces the file, if there is one. A disk that is full now may not be the
// next time: the counters go on.
func (p *publisher) write() {
	if p.dir == nil {
		return
	}
	families, err := p.registry.Gather()
	if err != nil {
		return
	}
	var text bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&text, f); err != nil {
			return
		}
	}
	f, err := p.pending()
	if err != nil {
		return
	}
	defer f.Cleanup()
	if _, err := f.Write(text.Bytes()); err == nil {
		f.CloseAtomicallyReplace()
	}
}

// pending is the file before it takes its name. The name that it has meanwhile does
// not end in .prom: the node exporter leaves it alone. Any user may read it, for the
// node exporter is another one.
func (p *publisher) pending() (*renameio.PendingFile, error) {
	return renameio.NewPendingFile(p.name, renameio.WithRoot(p.dir), renameio.WithPermissions(0o644), renameio.IgnoreUmask())
}
