package crypto

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"io"

	"github.com/ProtonMail/go-crypto/openpgp/armor"
)

const messageType = "PGP MESSAGE"

// dearmor returns the binary message in buf, which may be armored: the top bit
// is set in the first byte of every OpenPGP packet and in no ASCII text.
func dearmor(buf *bufio.Reader) (body io.Reader, armored bool, err error) {
	head, err := buf.Peek(1)
	if err != nil {
		return nil, false, ErrNotOpenPGP
	}
	if head[0]&0x80 != 0 {
		return buf, false, nil
	}
	// The library finds the opening line and the headers, and has read no
	// further: it takes a large enough bufio.Reader as it is.
	block, err := armor.Decode(buf)
	if err != nil {
		return nil, false, ErrNotOpenPGP
	}
	if block.Type != messageType {
		return nil, false, &Error{Fault: ErrNotOpenPGP, Detail: "the armor holds another kind of data"}
	}
	return &armorBody{in: buf}, true, nil
}

// A line of gpg's is 64 letters and its end, and holds 48 bytes.
const (
	armorLine      = 65
	armorLineHolds = 48
)

// maxArmorLine is the longest line that the library takes; RFC 4880 allows 76.
const maxArmorLine = 96

// armorText is the most of the text that is decoded at once, a multiple of 4.
const armorText = 64 << 10

// armorBody decodes the lines of an armor's body up to its checksum or closing
// line. It does what the library's own reader does, many lines at a time: that
// one decodes each line by itself.
type armorBody struct {
	in   *bufio.Reader
	err  error  // sticks: what follows the end is not ours to read
	text []byte // without line ends, not yet decoded
	bin  []byte // decoded
	out  []byte // the part of bin that was not read yet
}

func (a *armorBody) Read(p []byte) (int, error) {
	for len(a.out) == 0 {
		if a.err != nil {
			return 0, a.err
		}
		a.fill()
	}
	n := copy(p, a.out)
	a.out = a.out[n:]
	return n, nil
}

func (a *armorBody) fill() {
	if a.text == nil {
		// No more than a small file needs.
		text := min(armorText, (a.in.Size()+maxArmorLine)/4*4)
		a.text, a.bin = make([]byte, 0, text), make([]byte, text/4*3)
	}
	for a.err == nil && cap(a.text)-len(a.text) >= maxArmorLine {
		var line []byte
		line, a.err = a.in.ReadSlice('\n')
		line = bytes.TrimSpace(line)
		switch {
		case bytes.HasPrefix(line, []byte("-----END ")), len(line) == 5 && line[0] == '=':
			// The checksum is not looked at: the encryption has a better one.
			a.err = io.EOF
		case len(line) > maxArmorLine:
			a.err = ErrDamaged
		default:
			a.text = append(a.text, line...)
		}
	}
	whole := len(a.text) / 4 * 4
	n, err := base64.StdEncoding.Decode(a.bin, a.text[:whole])
	a.out = a.bin[:n]
	a.text = append(a.text[:0], a.text[whole:]...)
	switch {
	case err != nil:
		a.err = ErrDamaged
	case a.err == io.EOF && len(a.text) > 0:
		a.err = io.ErrUnexpectedEOF
	}
}

// armorEnd checks what follows the armor's data: at most the closing line, and
// blank space. The closing line was used up unless a checksum line stood before
// it.
func armorEnd(buf *bufio.Reader) error {
	for first := true; ; {
		line, err := buf.ReadSlice('\n')
		if err == bufio.ErrBufferFull {
			return ErrTrailing
		}
		line = bytes.TrimSpace(line)
		switch {
		case len(line) == 0:
		case first && bytes.Equal(line, []byte("-----END "+messageType+"-----")):
			first = false
		default:
			return ErrTrailing
		}
		if err != nil {
			return nil
		}
	}
}
