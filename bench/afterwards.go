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

	"golang.org/x/sys/unix"
)

// afterwards looks, as root, for what is left of the secret once it was read:
// in the memory of the peer's processes, at its path, and on the disk, which is
// an image of its own so that all of it can be searched.
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
		// A reader that is another process, and ends.
		out, err := exec.Command("cat", s.path).Output()
		if err == nil {
			err = same(out, p.text)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", s.peer, err)
		}
		clear(out)
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
	for _, peer := range []string{"oncefs", oldWayName} {
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
		enc := filepath.Join(dir, "secrets.yaml.enc")
		if err := b.encrypt(enc, text, "--s2k-count", "65536"); err != nil {
			return err
		}
		var path string
		var stop func() error
		if peer == "oncefs" {
			d, err := b.mount(dir, []string{enc})
			if err != nil {
				return err
			}
			path, stop = filepath.Join(d.target, "secrets.yaml"), d.stop
		} else {
			s, err := b.serveOldWay(filepath.Join(dir, "old"), enc)
			if err != nil {
				b.record.leaveOut("afterwards", peer, "disk", err)
				continue
			}
			path, stop = s.path, s.stop
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
		b.record.add("afterwards", peer, "copies on the disk", "", float64(n))
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
