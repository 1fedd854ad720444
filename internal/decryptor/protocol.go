package decryptor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"oncefs/crypto"
	"oncefs/internal/secretmem"
)

// The child writes frames to its pipe: a header of 16 bytes and what follows
// it. Frames of several files may be mixed; those of one file are in order and
// end with done or failed.
//
//	byte  0     kind
//	byte  1     fault, for failed
//	bytes 4-7   number of the file, from 0, big endian; 0 for refused
//	bytes 8-15  length of what follows: plaintext for data, text for failed;
//	            for done, the sum of all the data's lengths, and nothing follows
const headerSize = 16

type kind byte

const (
	data   kind = iota + 1 // plaintext, not yet authenticated
	done                   // the whole message was authenticated
	failed                 // this file has a fault
	refuse                 // the passphrase cannot be used; no file was tried
)

type header struct {
	kind  kind
	fault byte
	file  uint32
	n     uint64
}

func (h header) put() (b [headerSize]byte) {
	b[0], b[1] = byte(h.kind), h.fault
	binary.BigEndian.PutUint32(b[4:], h.file)
	binary.BigEndian.PutUint64(b[8:], h.n)
	return b
}

func parseHeader(b [headerSize]byte) (header, error) {
	h := header{kind: kind(b[0]), fault: b[1], file: binary.BigEndian.Uint32(b[4:]), n: binary.BigEndian.Uint64(b[8:])}
	if h.kind < data || h.kind > refuse || b[2] != 0 || b[3] != 0 {
		return h, errProtocol
	}
	return h, nil
}

// maxText bounds what the child may say about a fault.
const maxText = 256

var errProtocol = errors.New("the decrypting process did not keep to its protocol")

// receive reads frames from the descriptor until every buffer is whole or
// something is wrong. Headers and texts go through ordinary memory, plaintext
// does not. On an error the caller wipes the buffers.
func receive(fd int, bufs []*secretmem.Buffer) error {
	whole := make([]bool, len(bufs))
	for left := len(bufs); left > 0; {
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
			return reported(h, text, len(bufs))
		}
		if int64(h.file) >= int64(len(bufs)) || whole[h.file] {
			return errProtocol
		}
		buf := bufs[h.file]
		switch h.kind {
		case data:
			if h.n > maxData {
				return errProtocol
			}
			if err := buf.Fill(fd, int64(h.n)); err != nil {
				return &FileError{File: int(h.file), Err: err}
			}
		case done:
			if h.n != uint64(buf.Size()) {
				return errProtocol
			}
			whole[h.file] = true
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
