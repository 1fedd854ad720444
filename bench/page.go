package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// write writes the raw numbers, the plots and the page into a directory, and
// prints what holds.
func (r *record) write(dir string) error {
	for _, s := range r.Series {
		for i, v := range s.Values {
			// Four digits are more than a time means.
			s.Values[i], _ = strconv.ParseFloat(strconv.FormatFloat(v, 'g', 4, 64), 64)
		}
	}
	raw, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "benchmarks.json"), append(raw, '\n'), 0o644); err != nil {
		return err
	}
	if err := r.plots(dir); err != nil {
		return err
	}
	page, err := os.Create(filepath.Join(dir, "benchmarks.md"))
	if err != nil {
		return err
	}
	if err := errors.Join(r.page(page), page.Close()); err != nil {
		return err
	}
	return r.targets(os.Stdout)
}

// section is a table of the page: a row for each peer.
type section struct {
	work, title, text string
	base              string // the peer that others are compared with
	plot              string // file name, without .svg
}

var sections = []section{
	{"start", "Start to content", "From exec to the last byte in the reader's hands. `gpg -d` is the floor: it decrypts to a pipe and protects nothing. The times of oncefs hold the mount, the removal of the passphrase file and the sandbox: three processes are started for that, a program of Go each, and with a small S2K nearly all of the time is theirs. What oncefs encrypt writes has the largest S2K that the format can say, which gpg and oncefs spend alike: it hides what else differs. *gpg + inotify* is the old way: gpg to a file, then the watcher, then the read. age with a key file stretches no passphrase; its passphrase takes scrypt of about a second by design, as does gocryptfs.\n\nWhat 64 MiB cost: of the child that decrypts, the half is inflating what gpg has compressed (by klauspost/compress; `go test ./crypto -run '^$' -bench Decrypt/gpg -cpuprofile cpu.out` shows it), which runs beside armor, CFB and SHA-1. About as much again goes to the kernel, which tells every processor of each page of secret memory when it is first used (flush_tlb_kernel_range in mm/secretmem.c; `perf record -a -g`): that is done before the bytes come, on both processors at once, and while the S2K is computed. What oncefs encrypt writes is not compressed.", "gpg -d", "benchmarks-start"},
	{"one read", "One read", "Open, read 1 KiB, close, by a reader in another process than the server. Every open of oncefs is a claim, with its two lines in the event log and the look-up of who reads, which another process makes, for the one that holds the secret may look nobody up. It is asked when the path leads a process to the secret, and answered while that process opens it; the first byte waits for the answer, so that a reader that ends at once is known too. A process is looked up only once a millisecond while its requests follow each other within 25 µs, for it has no time to become another then: that is the loop of the first two rows, of one secret that may be read many times. Where each read is the last of its secret (below, *Growth*) the wiping lies between them. The third row is the first read of a program, two milliseconds after whatever was before: it waits for the look-up, and all peers are asleep.", "go-fuse memory file", "benchmarks-read"},
	{"throughput", "Throughput", "One large file, read 1 MiB a call.", "go-fuse memory file", ""},
	{"too late", "Too late", "The open of a secret that is spent, against the open of a name that never was.", "go-fuse, no such name", ""},
	{"race", "The race", "So many processes at one secret of 16 KiB at the same moment. The rightful outcome is one that got all, none that got a part, none that hung. Hung is who still waits when for three seconds nobody has ended; the times below leave that wait out.", "", ""},
	{"race time", "The race: until the last has its answer", "Of 10,000 that wait for the same name at once, the kernel wakes all at each answer (d_alloc_parallel in fs/dcache.c; `perf record -a -g`), for none of them may take over what another was told (C9): where they pile up that takes half a minute, where they do not two seconds, and which it is differs from run to run. The FIFO's time is of the few that did not hang.", "oncefs", "benchmarks-race"},
	{"race cost", "The race: for each process", "", "oncefs", ""},
	{"afterwards", "Afterwards", "What root finds of the secret after one read: in the memory of the peer's processes (`/proc/PID/mem`), in the page cache (cachestat(2)), at its path, and on the disk (every byte of the filesystem's image, which was synced while the secret waited).", "", ""},
	{"size", "Size", "While one secret of 4 KiB is served and nobody reads, some seconds after its start. PSS divides the pages of the program that several processes share, RSS counts them for each. The image of oncefs is its binary: it is static and needs nothing else.", "", ""},
	{"growth", "Growth", "Many secrets in one mount, and many mounts of one secret each.", "", "benchmarks-growth"},
}

func (r *record) page(w io.Writer) error {
	var b strings.Builder
	b.WriteString("# Benchmarks\n\n`make bench` (as root; it installs the peers) wrote this page from one run on one machine; the raw numbers are in [benchmarks.json](benchmarks.json). " +
		"Rounds are interleaved, every value is a median, and a ratio is the median of the ratios of each round. Compare ratios, not times: those are this machine's.\n\n")
	for _, l := range append(slices.Clone(r.Machine), r.Programs...) {
		fmt.Fprintf(&b, "- %s\n", l)
	}
	fmt.Fprintf(&b, "- the run took %.0f minutes\n", r.Seconds/60)
	b.WriteString("\n## Targets\n\n")
	if err := r.targets(&b); err != nil {
		return err
	}
	for _, s := range sections {
		r.table(&b, s)
	}
	if len(r.LeftOut) > 0 {
		b.WriteString("\n## Left out\n\n")
		for _, o := range r.LeftOut {
			why, _, _ := strings.Cut(o.Why, "\n")
			fmt.Fprintf(&b, "- %s, %s %s: %s\n", o.Work, o.Peer, o.Of, why)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// table has a row for each thing measured and a column for each peer.
func (r *record) table(b *strings.Builder, s section) {
	var peers, ofs []string
	for _, x := range r.Series {
		if x.Work == s.work {
			if !slices.Contains(peers, x.Peer) {
				peers = append(peers, x.Peer)
			}
			if !slices.Contains(ofs, x.Of) {
				ofs = append(ofs, x.Of)
			}
		}
	}
	if len(peers) == 0 {
		return
	}
	fmt.Fprintf(b, "\n## %s\n\n", s.title)
	if s.text != "" {
		fmt.Fprintf(b, "%s\n\n", s.text)
	}
	if s.plot != "" {
		fmt.Fprintf(b, "![%s](%s.svg)\n\n", s.title, s.plot)
	}
	fmt.Fprintf(b, "| | %s |\n|---|%s\n", strings.Join(peers, " | "), strings.Repeat("---:|", len(peers)))
	for _, of := range ofs {
		fmt.Fprintf(b, "| %s |", of)
		for _, peer := range peers {
			x := r.find(s.work, peer, of)
			if x == nil {
				b.WriteString(" |")
				continue
			}
			fmt.Fprintf(b, " %s", short(median(x.Values), x.Unit))
			if q, ok := ratio(x, r.find(s.work, s.base, of)); ok && peer != s.base {
				fmt.Fprintf(b, " (%.2f×)", q)
			}
			b.WriteString(" |")
		}
		b.WriteString("\n")
	}
}

// short gives a value three digits.
func short(v float64, unit string) string {
	digits := 0
	switch {
	case v == float64(int(v)):
	case v < 10:
		digits = 2
	case v < 100:
		digits = 1
	}
	if unit == "us" {
		unit = "µs"
	}
	return strings.TrimSpace(fmt.Sprintf("%.*f %s", digits, v, unit))
}

// A target is a ratio or a size that is to hold in one run.
type target struct {
	what string
	most float64
	got  func(*record) (float64, bool)
	why  string // where it does not hold, if that is known
}

func of(work, peer, of, base, baseOf string) func(*record) (float64, bool) {
	return func(r *record) (float64, bool) { return ratio(r.find(work, peer, of), r.find(work, base, baseOf)) }
}

func value(work, peer, of string) func(*record) (float64, bool) {
	return func(r *record) (float64, bool) {
		s := r.find(work, peer, of)
		if s == nil {
			return 0, false
		}
		return median(s.Values), true
	}
}

// targets prints which hold, and which do not.
func (r *record) targets(w io.Writer) error {
	var all []target
	for _, size := range sizes {
		most, hows := 0.8, []string{"default S2K"}
		why := "What is beside the S2K, which both must do: three programs of Go are started, the mount is made and tried, and the passphrase file is overwritten and removed."
		if size.bytes > 1<<20 {
			// In what is smaller both spend nearly all the time in the same S2K.
			most, hows = 0.9, append(hows, "written by oncefs encrypt")
			why = "See *Start to content* for what 64 MiB cost; secret memory costs most on a virtual machine."
		}
		for _, how := range hows {
			name := size.name + ", " + how
			all = append(all, target{"start to content of " + name + ", of gpg -d", most, of("start", "oncefs mount", name, "gpg -d", name), why})
		}
	}
	all = append(all,
		target{"one read, of go-fuse's memory file", 0.5, of("one read", "oncefs", "p50", "go-fuse memory file", "p50"),
			"Nothing is cached (C9), so each read is five questions of the kernel: the directory, the name, its attributes, the open and the read."},
		// A rate: the other way round, so that less is better here too.
		target{"time of a 64 MiB read, of go-fuse's memory file", 1.0, of("throughput", "go-fuse memory file", "64 MiB", "oncefs", "64 MiB"),
			"Secret memory cannot be given to the kernel by its pages: it is copied into a pipe, and from that to the reader."},
		target{"an open that comes too late, of a plain ENOENT on go-fuse", 1.5, of("too late", "oncefs, spent", "p50", "go-fuse, no such name", "p50"), ""},
		target{"winners of a race of 1000", 1, value("race", "oncefs", "1000 readers, got all"), ""},
		target{"winners of a race of 10000", 1, value("race", "oncefs", "10000 readers, got all"), ""},
		target{"wake-ups per second while idle", 0, value("size", "oncefs", "wake-ups per second, idle"), ""},
		target{"MiB resident while idle, all processes (PSS)", 12, value("size", "oncefs", "resident, shared pages divided (PSS)"), ""},
		target{"MiB resident while idle, all processes (RSS, shared pages counted twice)", 12, value("size", "oncefs", "resident, shared pages counted each time (RSS)"),
			"The two processes are one program, and its pages are counted for each."},
		target{"KiB for each of 1000 secrets, beyond their size", 32, value("growth", "oncefs", "1000 secrets, memory each beyond their size"), ""},
		target{"copies that root finds in memory after the read", 0, value("afterwards", "oncefs", "copies in its processes' memory"), ""},
	)
	var b, failing strings.Builder
	hold, judged := 0, 0
	b.WriteString("| | at most | measured | holds |\n|---|---:|---:|---|\n")
	for _, t := range all {
		got, ok := t.got(r)
		if !ok {
			continue
		}
		judged++
		holds := "**no**"
		if got <= t.most {
			holds = "yes"
			hold++
		} else if t.why != "" {
			fmt.Fprintf(&failing, "- %s: %s\n", t.what, t.why)
		}
		fmt.Fprintf(&b, "| %s | %g | %.2f | %s |\n", t.what, t.most, got, holds)
	}
	fmt.Fprintf(&b, "\n%d of %d targets hold.\n", hold, judged)
	if failing.Len() > 0 {
		fmt.Fprintf(&b, "\nWhy the others do not:\n\n%s", failing.String())
	}
	_, err := io.WriteString(w, b.String())
	return err
}
