package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// read measures one read of a mounted secret (open, read 1 KiB, close), and
// the throughput of one that is large. The mounts stay; the reader is this
// process on one thread.
func (b *bench) read() error {
	if err := b.readOf(1<<10, func(where []place) error { return b.oneRead(where) }); err != nil {
		return err
	}
	size := 64 << 20
	if b.short {
		size = 4 << 20
	}
	return b.readOf(size, func(where []place) error { return b.throughput(where, size) })
}

// place is a file that can be read over and over.
type place struct{ peer, path string }

// readOf puts the content where each peer serves it from.
func (b *bench) readOf(size int, f func([]place) error) (err error) {
	dir, err := b.fresh()
	if err != nil {
		return err
	}
	text := content(size)
	plain := filepath.Join(dir, "plain")
	enc := filepath.Join(dir, "secrets.yaml.enc")
	err = errors.Join(os.WriteFile(plain, text, 0o600), b.encrypt(enc, text, append([]string{"--armor", "--compress-algo", "none"}, smallS2K...)...))
	if err != nil {
		return err
	}
	d, err := b.mount(dir, []string{enc}, "--reads", "100000000")
	if err != nil {
		return err
	}
	where := []place{{"oncefs", filepath.Join(d.target, "secrets.yaml")}}
	defer func() { err = errors.Join(err, d.stop()) }()
	for _, peer := range []struct{ name, command string }{{"go-fuse memory file", "serve-gofuse"}, {"bazil fs package", "serve-bazil"}} {
		target := filepath.Join(dir, peer.command)
		if err := os.Mkdir(target, 0o700); err != nil {
			return err
		}
		d, err := servePeer(peer.command, target, plain)
		if err != nil {
			b.record.leaveOut("read", peer.name, fmt.Sprint(size), err)
			continue
		}
		defer func() { err = errors.Join(err, d.stop()) }()
		where = append(where, place{peer.name, filepath.Join(target, "secrets.yaml")})
	}
	shm, err := os.MkdirTemp("/dev/shm", "oncefs-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(shm)
	file := filepath.Join(shm, "secrets.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return err
	}
	where = append(where, place{"tmpfs file", file})
	for _, w := range where {
		if err := readWhole(w.path, text); err != nil {
			return fmt.Errorf("%s: %w", w.peer, err)
		}
	}
	return f(where)
}

// servePeer starts one of the peers that this binary is.
func servePeer(command, target, plain string) (*daemon, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return launch(target, exec.Command(self, command, target, plain))
}

func (b *bench) oneRead(where []place) error {
	const (
		each = 500
		// A program that reads once is not known, and nobody is awake for it.
		rested = 25
		rest   = 2 * time.Millisecond
	)
	buf := make([]byte, 1<<10)
	times := make([]time.Duration, each)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// sorted times n reads, each so long after the one before.
	sorted := func(w place, n int, pause time.Duration) ([]time.Duration, error) {
		for i := range times[:n] {
			time.Sleep(pause)
			begin := time.Now()
			fd, err := unix.Open(w.path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", w.peer, err)
			}
			got, err := unix.Read(fd, buf)
			if err == nil && got != len(buf) {
				err = fmt.Errorf("read %d bytes", got)
			}
			if err = errors.Join(err, unix.Close(fd)); err != nil {
				return nil, fmt.Errorf("%s: %w", w.peer, err)
			}
			times[i] = time.Since(begin)
		}
		slices.Sort(times[:n])
		return times[:n], nil
	}
	for range b.rounds(40) {
		for _, w := range where {
			t, err := sorted(w, each, 0)
			if err != nil {
				return err
			}
			b.record.add("one read", w.peer, "p50", "us", us(t[each/2]))
			b.record.add("one read", w.peer, "p99", "us", us(t[each*99/100]))
			if t, err = sorted(w, rested, rest); err != nil {
				return err
			}
			b.record.add("one read", w.peer, "p50 after a rest", "us", us(t[rested/2]))
		}
		if err := b.readFIFO(times, buf); err != nil {
			return err
		}
	}
	return nil
}

// readFIFO is a FIFO whose writer is there already: what sops gives a program.
func (b *bench) readFIFO(times []time.Duration, buf []byte) error {
	path := filepath.Join(b.dir, "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return err
	}
	defer os.Remove(path)
	text := content(len(buf))
	next, written := make(chan struct{}), make(chan error, 1)
	defer close(next)
	go func() {
		for range next {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err == nil {
				_, err = f.Write(text)
				err = errors.Join(err, f.Close())
			}
			written <- err
		}
	}()
	for i := range times {
		next <- struct{}{}
		begin := time.Now()
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		for got := 0; got < len(buf); {
			n, err := unix.Read(fd, buf[got:])
			if err != nil {
				return err
			}
			got += n
		}
		// Else the next reader could meet this writer.
		if err := <-written; err != nil {
			return err
		}
		unix.Close(fd)
		times[i] = time.Since(begin)
	}
	slices.Sort(times)
	b.record.add("one read", "FIFO", "p50", "us", us(times[len(times)/2]))
	b.record.add("one read", "FIFO", "p99", "us", us(times[len(times)*99/100]))
	return nil
}

func us(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }

func (b *bench) throughput(where []place, size int) error {
	buf := make([]byte, 1<<20)
	for range b.rounds(20) {
		for _, w := range where {
			fd, err := unix.Open(w.path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			begin := time.Now()
			for total := 0; total < size; {
				n, err := unix.Read(fd, buf)
				if err != nil || n == 0 {
					return fmt.Errorf("%s: read %d bytes of %d: %w", w.peer, total, size, err)
				}
				total += n
			}
			took := time.Since(begin)
			unix.Close(fd)
			b.record.add("throughput", w.peer, "64 MiB", "MB/s", float64(size)/1e6/took.Seconds())
		}
		if err := b.throughFIFO(buf, size); err != nil {
			return err
		}
	}
	return nil
}

// throughFIFO is one read of as much through a FIFO.
func (b *bench) throughFIFO(buf []byte, size int) error {
	path := filepath.Join(b.dir, "fifo")
	wait, err := feedFIFO(path, make([]byte, size))
	if err != nil {
		return err
	}
	defer os.Remove(path)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	begin := time.Now()
	for total := 0; total < size; {
		n, err := unix.Read(fd, buf)
		if err != nil || n == 0 {
			return fmt.Errorf("FIFO: read %d bytes of %d: %w", total, size, err)
		}
		total += n
	}
	b.record.add("throughput", "FIFO", "64 MiB", "MB/s", float64(size)/1e6/time.Since(begin).Seconds())
	unix.Close(fd)
	wait()
	return nil
}
