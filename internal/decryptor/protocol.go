package decryptor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"

	"oncefs/crypto"
	"oncefs/internal/bundle"
	"oncefs/internal/secretmem"
)

// The child writes frames to its pipe: a header of 16 bytes and what follows
// it. Frames of several messages may be mixed; those of one message are in order
// and end with done, failed or unfit. In a bundle each file and directory begins
// with an entry, and the data after it is that file's.
//
//	byte  0     kind
//	byte  1     fault, for failed, unfit and refuse; for entry, 1 if a directory
//	bytes 2-3   permission bits, big endian, for entry; else 0
//	bytes 4-7   number of the message, from 0, big endian; 0 for refuse
//	bytes 8-15  length of what follows: plaintext for data, text for failed; for
//	            entry, the length of its content, 8 bytes, big endian, and its
//	            name; for done, the sum of all the data's lengths, and nothing
//	            follows; for unfit, the number of the entry, and nothing follows;
//	            for expect, about how much data there will be in all, and nothing
//	            follows
const headerSize = 16

type kind byte

const (
	data   kind = iota + 1 // plaintext, not yet authenticated
	done                   // the whole message was authenticated
	failed                 // this file has a fault
	refuse                 // the passphrase cannot be used; no file was tried
	entry                  // a file or directory of a bundle begins
	unfit                  // the message was authenticated, and its content is no bundle
	expect                 // about so much is to come; not for a bundle, whose entries say it
)

type header struct {
	kind  kind
	fault byte
	mode  uint16
	file  uint32
	n     uint64
}

func (h header) put() (b [headerSize]byte) {
	b[0], b[1] = byte(h.kind), h.fault
	binary.BigEndian.PutUint16(b[2:], h.mode)
	binary.BigEndian.PutUint32(b[4:], h.file)
	binary.BigEndian.PutUint64(b[8:], h.n)
	return b
}

func parseHeader(b [headerSize]byte) (header, error) {
	h := header{kind: kind(b[0]), fault: b[1], mode: binary.BigEndian.Uint16(b[2:]), file: binary.BigEndian.Uint32(b[4:]), n: binary.BigEndian.Uint64(b[8:])}
	if h.kind < data || h.kind > expect || h.mode != 0 && h.kind != entry {
		return h, errProtocol
	}
	return h, nil
}

// maxText bounds what the child may say about a fault.
const maxText = 256

var errProtocol = errors.New("the decrypting process did not keep to its protocol")

// putEntry is what follows the header of an entry.
func putEntry(e bundle.Entry) []byte {
	return append(binary.BigEndian.AppendUint64(nil, uint64(e.Size)), e.Name...)
}

// arriving is a message whose content is being received.
type arriving struct {
	bundle  bool
	max     int64 // bytes of content that may still be told of
	tree    bundle.Tree
	content []Content
	sum     uint64
	whole   bool
	store   *secretmem.Store
}

// newArriving makes room for a message's content, of about so many bytes. wipe is
// to be called if it is not wanted.
func newArriving(isBundle bool, max, about int64, store *secretmem.Store) *arriving {
	a := &arriving{bundle: isBundle, max: max, store: store}
	if !isBundle {
		a.content = []Content{{Bytes: store.NewBuffer(max)}}
		a.content[0].Bytes.Expect(about)
	}
	return a
}

func (a *arriving) wipe() (err error) {
	for _, c := range a.content {
		if c.Bytes != nil {
			err = errors.Join(err, c.Bytes.Wipe())
		}
	}
	return err
}

// begin takes an entry in, with the same checks that the child has made.
func (a *arriving) begin(e bundle.Entry) error {
	if !a.bundle || !a.lastIsWhole() || e.Size < 0 || e.Size > a.max || a.tree.Add(e) != nil {
		return errProtocol
	}
	a.max -= e.Size
	c := Content{Entry: e}
	if !e.Dir {
		c.Bytes = a.store.NewBuffer(e.Size)
		c.Bytes.Expect(e.Size)
	}
	a.content = append(a.content, c)
	return nil
}

// lastIsWhole tells whether the entry before has all its content.
func (a *arriving) lastIsWhole() bool {
	if len(a.content) == 0 {
		return true
	}
	last := a.content[len(a.content)-1]
	return last.Dir || last.Bytes.Size() == last.Size
}

// fill takes content from the descriptor straight into secret memory.
func (a *arriving) fill(fd int, n uint64) error {
	if n > maxData || len(a.content) == 0 {
		return errProtocol
	}
	last := a.content[len(a.content)-1]
	if last.Bytes == nil || a.bundle && int64(n) > last.Size-last.Bytes.Size() {
		return errProtocol
	}
	a.sum += n
	return last.Bytes.Fill(fd, int64(n))
}

// end is told that the message was authenticated.
func (a *arriving) end(sum uint64) error {
	if sum != a.sum || a.bundle && (len(a.content) == 0 || !a.lastIsWhole()) {
		return errProtocol
	}
	for _, c := range a.content {
		if c.Bytes != nil {
			if err := c.Bytes.Settle(); err != nil {
				return err
			}
		}
	}
	if a.bundle {
		a.addDirs()
	}
	a.whole = true
	return nil
}

// addDirs puts the directories, also those that had no entry, before the files.
func (a *arriving) addDirs() {
	var all []Content
	for _, e := range a.tree.Dirs() {
		all = append(all, Content{Entry: e})
	}
	for _, c := range a.content {
		if !c.Dir {
			all = append(all, c)
		}
	}
	a.content = all
}

// receive reads frames from the descriptor until every message is whole or
// something is wrong. Headers, names and texts go through ordinary memory, content
// does not. On an error the caller wipes what arrived.
func receive(fd int, messages []*arriving) error {
	for left := len(messages); left > 0; {
		var raw [headerSize]byte
		if err := readFull(fd, raw[:]); err != nil {
			return err
		}
		h, err := parseHeader(raw)
		if err != nil {
			return err
		}
		if h.kind == refuse || h.kind == failed {
			if h.n > maxText {
				return errProtocol
			}
			text := make([]byte, h.n)
			if err := readFull(fd, text); err != nil {
				return err
			}
			return reported(h, text, len(messages))
		}
		if int64(h.file) >= int64(len(messages)) || messages[h.file].whole {
			return errProtocol
		}
		m := messages[h.file]
		switch h.kind {
		case data:
			if err := m.fill(fd, h.n); err == errProtocol {
				return err
			} else if err != nil {
				return &FileError{File: int(h.file), Err: err}
			}
		case expect:
			if m.bundle || h.n > math.MaxInt64 {
				return errProtocol
			}
			m.content[0].Bytes.Expect(int64(h.n))
		case entry:
			e, err := readEntry(fd, h)
			if err != nil {
				return err
			}
			if err := m.begin(e); err != nil {
				return err
			}
		case unfit:
			fault := bundle.Fault(h.fault)
			if !m.bundle || !fault.Known() || h.n > maxEntryNumber {
				return errProtocol
			}
			return &FileError{File: int(h.file), Err: &bundle.Error{Entry: int(h.n), Fault: fault}}
		case done:
			if err := m.end(h.n); err != nil {
				return err
			}
			left--
		}
	}
	// Nothing may follow, and the end must be the child's own.
	var extra [1]byte
	if err := readFull(fd, extra[:]); err != io.ErrUnexpectedEOF {
		return errProtocol
	}
	return nil
}

// maxEntryNumber is more than the entries of any archive that is read to its end.
const maxEntryNumber = 1 << 40

// readEntry reads what follows the header of an entry.
func readEntry(fd int, h header) (e bundle.Entry, err error) {
	if h.n <= 8 || h.n > 8+bundle.MaxName || h.fault > 1 {
		return e, errProtocol
	}
	text := make([]byte, h.n)
	if err := readFull(fd, text); err != nil {
		return e, err
	}
	e = bundle.Entry{Name: string(text[8:]), Dir: h.fault == 1, Mode: uint32(h.mode), Size: int64(binary.BigEndian.Uint64(text))}
	return e, nil
}

func reported(h header, text []byte, files int) error {
	if h.kind == refuse {
		p := PassphraseFault(h.fault)
		if !p.known() {
			return errProtocol
		}
		return p
	}
	fault, err := faultOf(h.fault, text)
	if err != nil || int64(h.file) >= int64(files) {
		return errProtocol
	}
	return &FileError{File: int(h.file), Err: fault}
}

// faultOf is a fault that the child told; what it says is for a terminal too.
func faultOf(number byte, text []byte) (fault, protocol error) {
	f := crypto.Fault(number)
	if !f.Known() || len(text) > maxText {
		return nil, errProtocol
	}
	for _, c := range text {
		if c < ' ' || c > '~' {
			return nil, errProtocol
		}
	}
	if len(text) == 0 {
		return f, nil
	}
	return &crypto.Error{Fault: f, Detail: string(text)}, nil
}

// A FileError says which of the files could not be had, counted from 0.
type FileError struct {
	File int
	Err  error
}

func (e *FileError) Error() string { return fmt.Sprintf("file %d: %v", e.File, e.Err) }
func (e *FileError) Unwrap() error { return e.Err }

// A PassphraseFault is a way in which a passphrase cannot be used.
type PassphraseFault byte

const (
	ErrEmpty    PassphraseFault = iota + 1 // the first line is empty
	ErrTooLong                             // longer than gpg would read
	ErrUnread                              // it could not be read
	ErrMismatch                            // it was typed differently the second time
	lastPassphraseFault
)

func (p PassphraseFault) known() bool { return p >= ErrEmpty && p < lastPassphraseFault }

func (p PassphraseFault) Error() string {
	switch p {
	case ErrEmpty:
		return "the passphrase is empty"
	case ErrTooLong:
		return "the passphrase is too long"
	case ErrUnread:
		return "the passphrase could not be read"
	case ErrMismatch:
		return "the two passphrases are not the same"
	}
	return "unknown passphrase fault"
}
