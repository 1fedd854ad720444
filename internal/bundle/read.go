package bundle

import (
	"archive/tar"
	"errors"
	"io"
	"strings"
)

// Read reads an archive to its end, calls add for each file and directory, and
// writes a file's content to what add returned for it. Contents of more than max
// bytes in all are ErrTooLarge. A name may begin with ./ as `tar c .` writes it,
// and an entry for the bundle itself is passed over. The error is an *Error for
// what is wrong with the archive, or what r, add or a writer returned; then what was
// added so far is to be thrown away. Owners, times and other attributes are not
// looked at.
func Read(r io.Reader, max int64, add func(Entry) (io.Writer, error)) error {
	src := &source{r: r}
	in := tar.NewReader(src)
	buf := make([]byte, 64<<10)
	var t Tree
	files := 0
	for number := 1; ; number++ {
		h, err := in.Next()
		bad := func(f Fault) error {
			if src.err != nil {
				return src.err
			}
			return &Error{Entry: number, Fault: f}
		}
		switch {
		case err == io.EOF && src.ended:
			// tar may have been stopped half-way, and gpg encrypted what there was.
			return &Error{Fault: ErrNoEnd}
		case err == io.EOF:
			return end(src, buf, files)
		case errors.Is(err, io.ErrUnexpectedEOF):
			return bad(ErrNoEnd)
		case errors.Is(err, tar.ErrInsecurePath):
			return bad(ErrName)
		case err != nil:
			return bad(ErrFormat)
		}
		e, fault := entry(h)
		if fault != 0 {
			return bad(fault)
		}
		if e.Dir && e.Name == "." {
			continue
		}
		if err := t.Add(e); err != nil {
			return bad(err.(Fault))
		}
		if e.Size > max {
			return bad(ErrTooLarge)
		}
		max -= e.Size
		out, err := add(e)
		if err != nil {
			return err
		}
		if e.Dir {
			continue
		}
		files++
		// LimitReader hides what else a tar.Reader can do: each byte passes here.
		content := &source{r: io.LimitReader(in, e.Size)}
		n, err := io.CopyBuffer(out, content, buf)
		switch {
		case content.err != nil || err == nil && n != e.Size:
			return bad(ErrNoEnd)
		case err != nil:
			return err
		}
	}
}

// entry is what a header says, if it is one that can be served. The bundle itself
// has the name ".".
func entry(h *tar.Header) (Entry, Fault) {
	e := Entry{Name: strings.TrimPrefix(h.Name, "./"), Mode: uint32(h.Mode & 0o777), Size: h.Size}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return e, ErrSparse
		}
	}
	switch h.Typeflag {
	case tar.TypeReg:
		return e, 0
	case tar.TypeDir:
		e.Dir = true
		if e.Name = strings.TrimSuffix(e.Name, "/"); e.Name == "" && h.Name != "" {
			e.Name = "."
		}
		if strings.HasPrefix(h.Name, "/") {
			return e, ErrName
		}
		return e, 0
	case tar.TypeSymlink:
		return e, ErrSymlink
	case tar.TypeLink:
		return e, ErrHardLink
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return e, ErrDevice
	case tar.TypeGNUSparse:
		return e, ErrSparse
	}
	return e, ErrKind
}

// end looks at what follows the end of an archive: tar fills up with zeros.
func end(src *source, buf []byte, files int) error {
	for {
		n, err := src.Read(buf)
		for _, b := range buf[:n] {
			if b != 0 {
				return &Error{Fault: ErrTrailing}
			}
		}
		switch {
		case err == io.EOF && files == 0:
			return &Error{Fault: ErrEmpty}
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}

// source remembers how reading ended, which the parser above does not tell.
type source struct {
	r     io.Reader
	ended bool  // the end was met
	err   error // any other failure
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	switch {
	case err == io.EOF && n > 0:
		err = nil // it will be met again
	case err == io.EOF:
		s.ended = true
	case err != nil:
		s.err = err
	}
	return n, err
}
