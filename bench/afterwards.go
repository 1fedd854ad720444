package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// afterwards looks, as root, for what is left of the secret once it was read:
// in the memory of the peer's processes, in the page cache, at its path, and on the
// disk, which is an image of its own so that all of it can be searched.
func (b *bench) afterwards() error {
	if os.Geteuid() != 0 {
		b.record.leaveOut("afterwards", "all", "", errors.New("needs root"))
		return nil
	}
	dir, err := b.fresh()
	if err != nil {
		return err
	}
	image, inside := filepath.Join(dir, "image"), filepath.Join(dir, "disk")
	onDisk := b.makeDisk(image, inside)
	if onDisk != nil {
		b.record.leaveOut("afterwards", "all", "disk", onDisk)
		if err := os.MkdirAll(inside, 0o700); err != nil {
			return err
		}
	}
	home := b.dir
	b.dir = inside // the peers work on that disk
	defer func() { b.dir = home }()
	p, err := b.everyPeer()
	if err != nil {
		return err
	}
	defer p.stop()
	// plain was for the other peers to serve; it is not what they leave.
	plains, _ := filepath.Glob(filepath.Join(inside, "*", "plain"))
	for _, plain := range plains {
		os.Remove(plain)
	}
	mark := newMark(p.text)
	for _, s := range p.served {
		cached, err := readCached(s.path, p.text)
		if err != nil {
			return fmt.Errorf("%s: %w", s.peer, err)
		}
		b.record.add("afterwards", s.peer, "bytes of it in the page cache", "", float64(cached))
		if s.peer == oldWayName {
			if err := waitFor(func() bool { _, err := os.Stat(s.path); return err != nil }); err != nil {
				return err
			}
		}
		copies := 0
		for _, pid := range tree(s.pid) {
			n, err := mark.inProcess(pid)
			if err != nil {
				return err
			}
			copies += n
		}
		b.record.add("afterwards", s.peer, "copies in its processes' memory", "", float64(copies))
		again := 0.0
		if s.peer != "sops exec-file" { // whose FIFO would wait
			if f, err := os.Open(s.path); err == nil {
				n, _ := mark.in(f)
				f.Close()
				again = float64(n)
			}
		}
		b.record.add("afterwards", s.peer, "copies at its path", "", again)
	}
	if err := p.stop(); err != nil {
		return err
	}
	if onDisk != nil {
		return nil
	}
	return errors.Join(b.diskAfterwards(image, inside, mark), unmountBelow(inside))
}

// readCached reads all of a file and tells how much of it the kernel kept in the
// page cache.
func readCached(path string, want []byte) (cached int, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	got := make([]byte, len(want))
	defer clear(got)
	if _, err := io.ReadFull(f, got); err != nil {
		return 0, err
	}
	if err := same(got, want); err != nil {
		return 0, err
	}
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return 0, err // a FIFO has no pages there
	}
	// cachestat(2), Linux 6.5: a range of offset and length, and the number of
	// pages comes first.
	const sysCachestat = 451
	of, pages := [2]uint64{0, uint64(len(want))}, [5]uint64{}
	if _, _, errno := unix.Syscall6(sysCachestat, f.Fd(), uintptr(unsafe.Pointer(&of)), uintptr(unsafe.Pointer(&pages)), 0, 0, 0); errno != 0 {
		return 0, fmt.Errorf("cachestat: %w", errno)
	}
	return int(pages[0]) * os.Getpagesize(), nil
}

// makeDisk makes a filesystem in a file.
func (b *bench) makeDisk(image, inside string) error {
	if err := os.Mkdir(inside, 0o700); err != nil {
		return err
	}
	f, err := os.Create(image)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(64<<20), f.Close()); err != nil {
		return err
	}
	if err := quietly(exec.Command("mke2fs", "-q", "-F", "-t", "ext4", image)); err != nil {
		return err
	}
	return quietly(exec.Command("mount", "-o", "loop", image, inside))
}

// diskAfterwards serves and reads with each way that needs a disk, alone, and
// searches all of the image then.
func (b *bench) diskAfterwards(image, inside string, mark *mark) error {
	text := content(4 << 10)
	plain := filepath.Join(b.shm, "plain")
	if err := os.WriteFile(plain, text, 0o600); err != nil {
		return err
	}
	defer os.Remove(plain)
	for _, peer := range []struct {
		name  string
		serve func(dir string) (path string, stop func() error, err error)
	}{
		{"oncefs", func(dir string) (string, func() error, error) {
			enc := filepath.Join(dir, "secrets.yaml.enc")
			if err := b.encrypt(enc, text, smallS2K...); err != nil {
				return "", nil, err
			}
			d, err := b.mount(dir, []string{enc})
			if err != nil {
				return "", nil, err
			}
			return filepath.Join(d.target, "secrets.yaml"), d.stop, nil
		}},
		{oldWayName, func(dir string) (string, func() error, error) {
			enc := filepath.Join(dir, "secrets.yaml.enc")
			if err := b.encrypt(enc, text, smallS2K...); err != nil {
				return "", nil, err
			}
			s, err := b.serveOldWay(filepath.Join(dir, "old"), enc)
			return s.path, s.stop, err
		}},
		{"gocryptfs", func(dir string) (string, func() error, error) {
			s, err := serveGocryptfs(filepath.Join(dir, "gocryptfs"), text)
			return s.path, s.stop, err
		}},
		{"sops exec-file", func(dir string) (string, func() error, error) {
			s, err := b.serveSops(filepath.Join(dir, "sops"), plain, len(text))
			return s.path, s.stop, err
		}},
	} {
		// Overwritten with zeros: nothing of what was before is to be found.
		if err := unmountBelow(inside); err != nil {
			return err
		}
		os.Remove(image)
		os.Remove(inside)
		if err := b.makeDisk(image, inside); err != nil {
			return err
		}
		dir, err := b.fresh()
		if err != nil {
			return err
		}
		path, stop, err := peer.serve(dir)
		if err != nil {
			b.record.leaveOut("afterwards", peer.name, "disk", err)
			continue
		}
		// On a volume the kernel writes back within seconds; here at once.
		if err := quietly(exec.Command("sync", "-f", inside)); err != nil {
			return err
		}
		if err := errors.Join(readWhole(path, text), stop(), quietly(exec.Command("sync", "-f", inside))); err != nil {
			return err
		}
		f, err := os.Open(image)
		if err != nil {
			return err
		}
		n, err := mark.in(f)
		f.Close()
		if err != nil {
			return err
		}
		b.record.add("afterwards", peer.name, "copies on the disk", "", float64(n))
	}
	return nil
}

// mark is a piece of the secret, kept so that looking for it finds no copy of
// ours.
type mark struct{ hidden []byte }

func newMark(text []byte) *mark {
	m := &mark{hidden: bytes.Clone(text[len(text)/2 : len(text)/2+40])}
	for i := range m.hidden {
		m.hidden[i] ^= 0x5a
	}
	return m
}

// in counts the mark in what is read.
func (m *mark) in(r io.Reader) (n int, err error) {
	want := bytes.Clone(m.hidden)
	for i := range want {
		want[i] ^= 0x5a
	}
	defer clear(want)
	buf := make([]byte, 1<<20)
	defer clear(buf)
	for held := 0; ; {
		got, err := r.Read(buf[held:])
		n += bytes.Count(buf[:held+got], want)
		if err != nil {
			if err == io.EOF {
				err = nil
			}
			return n, err
		}
		keep := min(held+got, len(want)-1)
		copy(buf, buf[held+got-keep:held+got])
		held = keep
	}
}

// inProcess counts it in all the memory of a process that root can read.
func (m *mark) inProcess(pid int) (n int, err error) {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil // it has ended, and its memory with it
	}
	if err != nil {
		return 0, err
	}
	defer maps.Close()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer mem.Close()
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var from, to int64
		var rights string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &rights); err != nil || !strings.HasPrefix(rights, "r") {
			continue
		}
		// What the kernel does not give out, secret memory among it, ends a read.
		got, _ := m.in(io.NewSectionReader(mem, from, to-from))
		n += got
	}
	return n, nil
}
