package main

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"oncefs/internal/metrics"
)

// A family is one metric of every secret. Names and labels are a promise.
type family struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(metrics.Sample) int64
}

func counter(name, help string, value func(metrics.Sample) int64) family {
	return family{desc(name, help), prometheus.CounterValue, value}
}

func desc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("oncefs_"+name, help, []string{"mount", "secret"}, nil)
}

// serving tells whether the serving process lives; the others keep what they were
// when it ended.
var serving = desc("serving", "1 while the file's mount is served, 0 when its process has ended.")

var families = []family{
	{desc("reads_left", "Reads that are left; 0 once the file is spent."), prometheus.GaugeValue, func(s metrics.Sample) int64 { return int64(s.Left) }},
	counter("sealed_total", "Times that the file was put up to be read: once, and once more for each restart of a command.", func(s metrics.Sample) int64 { return s.Sealed }),
	counter("claimed_total", "Opens that claimed the file.", func(s metrics.Sample) int64 { return s.Claimed }),
	counter("given_back_total", "Claims that were closed before a byte went out.", func(s metrics.Sample) int64 { return s.GivenBack }),
	counter("delivered_total", "Claims that were closed after bytes went out.", func(s metrics.Sample) int64 { return s.Delivered }),
	counter("expired_total", "Times that --expire or --hold ended it.", func(s metrics.Sample) int64 { return s.Expired }),
	counter("refused_total", "Attempts by readers who may not read, and other acts that nobody may do.", func(s metrics.Sample) int64 { return s.Refused }),
	counter("late_total", "Attempts while the file was claimed or after it was spent.", func(s metrics.Sample) int64 { return s.Late }),
	counter("intrusions_total", "Refused and late attempts by others than the reader, as far as they are in the log.", func(s metrics.Sample) int64 { return s.Intrusions }),
}

// A collector shows the latest samples.
type collector struct {
	mu      sync.Mutex
	samples []metrics.Sample
	ended   bool
}

func (c *collector) set(samples []metrics.Sample) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.samples = samples
}

// end: what is served by nobody cannot be read.
func (c *collector) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	for i := range c.samples {
		c.samples[i].Left = 0
	}
}

func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	ch <- serving
	for _, f := range families {
		ch <- f.desc
	}
}

func (c *collector) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	live := 1.0
	if c.ended {
		live = 0
	}
	for _, s := range c.samples {
		ch <- prometheus.MustNewConstMetric(serving, prometheus.GaugeValue, live, s.Mount, s.Secret)
		for _, f := range families {
			ch <- prometheus.MustNewConstMetric(f.desc, f.kind, float64(f.value(s)), s.Mount, s.Secret)
		}
	}
}
