package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"
)

// openEncrypted finds and opens an encrypted file: a relative name in the
// working directory, then in the directory of the mount. With --wait it stays
// until there is one.
func (m *mounting) openEncrypted(ctx context.Context, name string) (*os.File, error) {
	f, err := m.findEncrypted(name)
	if !m.Wait || !errors.Is(err, errNoEncrypted) {
		return f, err
	}
	m.events.tell(slog.LevelInfo, "waiting", slog.String("enc", name), slog.String("hint", "make it with: oncefs encrypt FILE -o "+name))
	m.printf("oncefs: waiting: %s does not exist yet; make it with: oncefs encrypt FILE -o %s\n", name, name)
	// Asking once in a while works on every filesystem; notifications do not
	// come from other machines of a shared volume.
	tick := time.NewTicker(waitInterval)
	defer tick.Stop()
	var last fs.FileInfo
	for {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-tick.C:
		}
		f, err := m.findEncrypted(name)
		if errors.Is(err, errNoEncrypted) {
			continue
		}
		if err != nil {
			return nil, err
		}
		// gpg writes in place: take it when it no longer changes.
		info, err := f.Stat()
		if err == nil && last != nil && info.Size() > 0 && os.SameFile(info, last) && info.Size() == last.Size() && info.ModTime().Equal(last.ModTime()) {
			return f, nil
		}
		last = info
		f.Close()
	}
}

const waitInterval = 300 * time.Millisecond

func (m *mounting) findEncrypted(name string) (*os.File, error) {
	if filepath.IsAbs(name) {
		f, err := os.Open(name)
		return f, notThere(err, name)
	}
	dir := m.point.Path
	if m.point.File {
		dir = filepath.Dir(dir)
	}
	here, errHere := os.Open(name)
	there, errThere := os.Open(filepath.Join(dir, name))
	switch {
	case errHere != nil && !errors.Is(errHere, fs.ErrNotExist):
		closeAll(there)
		return nil, errHere
	case errThere != nil && !errors.Is(errThere, fs.ErrNotExist):
		closeAll(here)
		return nil, errThere
	case here == nil:
		return there, notThere(errThere, name+" (looked in the working directory and in "+dir+")")
	case there == nil:
		return here, nil
	}
	same, err := sameContent(here, there)
	there.Close()
	if err == nil && !same {
		wd, _ := os.Getwd()
		err = fmt.Errorf("%w: %s and %s", errAmbiguous, filepath.Join(wd, name), filepath.Join(dir, name))
	}
	if err != nil {
		here.Close()
		return nil, err
	}
	return here, nil
}

func notThere(err error, name string) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", name, errNoEncrypted)
	}
	return err
}

func closeAll(f *os.File) {
	if f != nil {
		f.Close()
	}
}

// sameContent compares two files and leaves them at their start.
func sameContent(a, b *os.File) (bool, error) {
	ia, err := a.Stat()
	if err != nil {
		return false, err
	}
	ib, err := b.Stat()
	if err != nil {
		return false, err
	}
	if os.SameFile(ia, ib) {
		return true, nil
	}
	if ia.Size() != ib.Size() {
		return false, nil
	}
	bufA, bufB := make([]byte, 64<<10), make([]byte, 64<<10)
	for off := int64(0); off < ia.Size(); off += int64(len(bufA)) {
		nA, errA := a.ReadAt(bufA, off)
		nB, errB := b.ReadAt(bufB, off)
		for _, err := range []error{errA, errB} {
			if err != nil && err != io.EOF {
				return false, err
			}
		}
		if !bytes.Equal(bufA[:nA], bufB[:nB]) {
			return false, nil
		}
	}
	return true, nil
}
