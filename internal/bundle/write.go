package bundle

import (
	"archive/tar"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// ErrChanged: a file was changed or replaced while it was read.
var ErrChanged = errors.New("was changed meanwhile")

// Write writes the directory as an archive that Read takes and any tar unpacks, in
// the order of names, with modes and times and without owners. Anything but files
// and directories is an error that names it, and so is what cannot be read; then
// what w got is to be thrown away.
func Write(w io.Writer, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	var t Tree
	files := 0
	out := tar.NewWriter(w)
	err = fs.WalkDir(listing{root.FS(), root}, ".", func(name string, d fs.DirEntry, err error) error {
		fail := func(err error) error {
			var p *fs.PathError
			if errors.As(err, &p) {
				err = p.Err
			}
			return &fs.PathError{Op: "bundle", Path: filepath.Join(dir, name), Err: err}
		}
		if err != nil {
			return fail(err)
		}
		if name == "." {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return fail(err)
		}
		e := Entry{Name: name, Dir: info.IsDir(), Mode: uint32(info.Mode().Perm())}
		h := &tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: int64(e.Mode), ModTime: info.ModTime().Truncate(time.Second)}
		if !e.Dir {
			if fault := kindOf(info.Mode()); fault != 0 {
				return fail(fault)
			}
			e.Size = info.Size()
			h.Typeflag, h.Name, h.Size = tar.TypeReg, name, e.Size
		}
		if err := t.Add(e); err != nil {
			return fail(err)
		}
		if e.Dir {
			return out.WriteHeader(h)
		}
		// Not waiting for the writer of a FIFO that has taken its place.
		f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return fail(err)
		}
		defer f.Close()
		if opened, err := f.Stat(); err != nil || !os.SameFile(opened, info) {
			return fail(ErrChanged)
		}
		if err := out.WriteHeader(h); err != nil {
			return err
		}
		content := &source{r: f}
		switch n, err := io.Copy(out, io.LimitReader(content, e.Size)); {
		case content.err != nil:
			return fail(content.err)
		case err != nil:
			return err
		case n != e.Size:
			return fail(ErrChanged)
		}
		if n, err := f.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			return fail(ErrChanged)
		}
		files++
		return nil
	})
	if err != nil {
		return err
	}
	if files == 0 {
		return &fs.PathError{Op: "bundle", Path: dir, Err: ErrEmpty}
	}
	return out.Close()
}

// A listing is a directory whose every name is listed. os.Root's own leaves out what is
// gone when it looks at it, and a bundle would lack it without a word.
type listing struct {
	fs.FS
	root *os.Root
}

func (l listing) ReadDir(name string) (all []fs.DirEntry, err error) {
	f, err := l.root.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	slices.Sort(names)
	for _, n := range names {
		info, err := l.root.Lstat(path.Join(name, n))
		if errors.Is(err, fs.ErrNotExist) {
			err = ErrChanged
		}
		all = append(all, listed{n, info, err})
	}
	return all, err
}

// A listed name tells with Info why nothing is known of it.
type listed struct {
	name string
	info fs.FileInfo
	err  error
}

func (e listed) Name() string               { return e.name }
func (e listed) IsDir() bool                { return e.err == nil && e.info.IsDir() }
func (e listed) Info() (fs.FileInfo, error) { return e.info, e.err }
func (e listed) Type() fs.FileMode {
	if e.err != nil {
		return fs.ModeIrregular
	}
	return e.info.Mode().Type()
}

// kindOf is what is wrong with a file that is not a regular one.
func kindOf(m fs.FileMode) Fault {
	switch {
	case m.IsRegular():
		return 0
	case m&fs.ModeSymlink != 0:
		return ErrSymlink
	case m&(fs.ModeDevice|fs.ModeNamedPipe|fs.ModeSocket) != 0:
		return ErrDevice
	}
	return ErrKind
}
