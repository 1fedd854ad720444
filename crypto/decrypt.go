package crypto

import (
	"bufio"
	"bytes"
	"crypto/aes"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"sync/atomic"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zlib"

	pgperrors "github.com/ProtonMail/go-crypto/openpgp/errors"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

func init() {
	// GnuPG 2.3 and later write version 5 packets with --force-ocb; the library
	// reads them but has them switched off.
	packet.V5Disabled = false
}

const (
	// readAhead is how much of the file is read at once. With the armor
	// decoder's own 4 KiB, half the time of a large file goes into system calls.
	readAhead = 1 << 20
	// maxPassphrasePackets bounds the S2K work that a hostile file can ask for.
	maxPassphrasePackets = 8
	// copyBlock is how much plaintext is passed on at once.
	copyBlock = 32 << 10
	// maxSkipped bounds the marker and padding packets that are passed over.
	maxSkipped = 16
	// maxArgon2Exponent bounds the memory that a hostile file can ask for: 2^21
	// KiB are 2 GiB, what RFC 9106 recommends as its first choice.
	maxArgon2Exponent = 21
)

// Decrypt reads one message from src and writes its content to dst.
//
// It writes before it knows that the message is authentic, for only the end of
// the message tells: on any error the caller must throw away what dst got. The
// error is a [Fault] or an [*Error] unless dst failed. Content of more than max
// bytes is ErrTooLarge, and at most max bytes are written. If dst is an [Expecter]
// it is told how much there will be as soon as that can be said.
func Decrypt(dst io.Writer, src io.Reader, passphrase []byte, max int64) error {
	in := &source{r: src}
	file := sizeOf(src)
	// Buffers need not be larger: to touch memory that a small secret does not need
	// takes longer than to decrypt it.
	size := readAhead
	if file > 0 && file < readAhead {
		size = int(file) + 512
	}
	buf := bufio.NewReaderSize(in, size)
	body, armored, err := dearmor(buf)
	if err == nil {
		out := &output{w: dst, left: max, message: file}
		if armored {
			out.message = file / armorLine * armorLineHolds
		}
		outer := newAhead(body, size)
		err = decryptBinary(out, outer, passphrase, size)
		outer.close()
	}
	if err == nil && armored {
		err = armorEnd(buf)
	}
	if err != nil && in.failed.Load() {
		return ErrRead
	}
	return err
}

// An Expecter is told about how many bytes will be written, once at most. What says
// that is not yet known to be authentic, and may be a guess.
type Expecter interface{ Expect(n int64) }

// sizeOf is the size of a file, and 0 for what is none.
func sizeOf(src io.Reader) int64 {
	if f, ok := src.(interface{ Stat() (fs.FileInfo, error) }); ok {
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
			return info.Size()
		}
	}
	return 0
}

// source remembers that reading failed: to the parsers above it that looks
// like damage.
type source struct {
	r      io.Reader
	failed atomic.Bool
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.failed.Store(true)
	}
	return n, err
}

func decryptBinary(dst *output, r io.Reader, passphrase []byte, size int) error {
	in := bufio.NewReaderSize(r, min(64<<10, size))
	fast, err := describe(in)
	if err != nil {
		return err
	}
	var keys []passphrasePacket
	var publicKey bool
	for skipped := 0; ; {
		p, err := packet.Read(in)
		if err != nil {
			return outerFault(err, len(keys) > 0 || publicKey)
		}
		switch p := p.(type) {
		case *packet.SymmetricKeyEncrypted:
			if keys = append(keys, passphrasePacket{p, fast}); len(keys) > maxPassphrasePackets {
				return unsupported("more passphrase packets than any program writes")
			}
		case *packet.EncryptedKey:
			publicKey = true
		case *packet.Marker, packet.Padding:
			if skipped++; skipped > maxSkipped {
				return ErrDamaged
			}
		case *packet.SymmetricallyEncrypted, *packet.AEADEncrypted:
			if len(keys) == 0 {
				if publicKey {
					return ErrPublicKey
				}
				// RFC 4880 5.7: no key packet means IDEA and MD5.
				return unsupported("a message without a passphrase packet")
			}
			if se, ok := p.(*packet.SymmetricallyEncrypted); ok && !se.IntegrityProtected {
				return ErrNoIntegrity
			}
			data := encryptedPart(p)
			if err := open(dst, p.(packet.EncryptedDataPacket), keys, passphrase, size); err != nil {
				return err
			}
			// The library takes a packet that ends too early for its end.
			if n, err := data.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				return ErrDamaged
			}
			if _, err := in.ReadByte(); err != io.EOF {
				if err != nil {
					return ErrDamaged
				}
				return ErrTrailing
			}
			return nil
		case *packet.Compressed, *packet.LiteralData, *packet.OnePassSignature:
			return &Error{Fault: ErrNotOpenPGP, Detail: "it is not encrypted"}
		default:
			return &Error{Fault: ErrNotOpenPGP, Detail: "it holds keys or signatures"}
		}
		if fast, err = describe(in); err != nil {
			return err
		}
	}
}

// passphrasePacket is one way to the session key.
type passphrasePacket struct {
	*packet.SymmetricKeyEncrypted
	fast *stretching // nil: by the library
}

func (p passphrasePacket) open(passphrase []byte) ([]byte, packet.CipherFunction, error) {
	if p.fast != nil {
		return p.fast.key(passphrase), p.fast.cipher, nil
	}
	return p.Decrypt(passphrase)
}

func encryptedPart(p packet.Packet) io.Reader {
	if ae, ok := p.(*packet.AEADEncrypted); ok {
		return ae.Contents
	}
	return p.(*packet.SymmetricallyEncrypted).Contents
}

// outerFault says what a packet that cannot be parsed means outside the
// encryption.
func outerFault(err error, begun bool) error {
	var unsup pgperrors.UnsupportedError
	var crit pgperrors.CriticalUnknownPacketTypeError
	var aead pgperrors.AEADError
	switch {
	case errors.As(err, &unsup), errors.As(err, &crit), errors.As(err, &aead):
		// The library's text holds numbers of the packet header at most.
		return unsupported(err.Error())
	case begun, err == io.ErrUnexpectedEOF:
		return ErrDamaged
	}
	return ErrNotOpenPGP
}

// open finds the passphrase packet that fits and writes the content to dst.
func open(dst *output, data packet.EncryptedDataPacket, keys []passphrasePacket, passphrase []byte, size int) error {
	var prefix []byte
	if se, ok := data.(*packet.SymmetricallyEncrypted); ok && se.Version == 1 {
		// Peeked at, not read: the library reads it again.
		ahead := bufio.NewReaderSize(se.Contents, min(64<<10, size))
		prefix, _ = ahead.Peek(aes.BlockSize + 2)
		se.Contents = ahead
	}
	fault := ErrWrongPassphrase
	for _, k := range keys {
		key, cipher, err := k.open(passphrase)
		if err != nil || !fits(prefix, cipher, key) {
			continue
		}
		plain, err := decryptor(data, cipher, key, size)
		clear(key)
		if err != nil {
			// Here the passphrase has opened the session key.
			fault = ErrDamaged
			continue
		}
		return content(dst, plain, size)
	}
	return fault
}

// decryptor returns what reads the plaintext; its Close tells whether it was
// authentic.
func decryptor(data packet.EncryptedDataPacket, cipher packet.CipherFunction, key []byte, size int) (io.ReadCloser, error) {
	se, ok := data.(*packet.SymmetricallyEncrypted)
	if ok && se.Version == 1 && se.IntegrityProtected && isAES(cipher) {
		return newMDCReader(se.Contents, key, min(mdcBlock, size))
	}
	return data.Decrypt(cipher, key)
}

func isAES(c packet.CipherFunction) bool { return c >= packet.CipherAES128 && c <= packet.CipherAES256 }

// fits makes the quick check of RFC 4880 5.13: two bytes of the prefix repeat
// under the right key. It tells a wrong passphrase from damage, but for one in
// 65,536; it decides nothing, for the integrity check follows. It is made for
// AES only and takes any other cipher's key as fitting.
func fits(prefix []byte, cipher packet.CipherFunction, key []byte) bool {
	if !isAES(cipher) || len(prefix) < aes.BlockSize+2 {
		return true
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return true
	}
	var pad [aes.BlockSize]byte
	block.Encrypt(pad[:], pad[:])
	first := [2]byte{prefix[14] ^ pad[14], prefix[15] ^ pad[15]}
	block.Encrypt(pad[:], prefix[:aes.BlockSize])
	again := [2]byte{prefix[16] ^ pad[0], prefix[17] ^ pad[1]}
	return subtle.ConstantTimeCompare(first[:], again[:]) == 1
}

// content copies the literal data inside the encryption to dst. Whatever is
// wrong in there is one fault: telling more would tell an attacker who changes
// the file what came of it.
func content(dst *output, plain io.ReadCloser, size int) error {
	inner := newAhead(plain, size)
	defer inner.close()
	err := literal(dst, bufio.NewReader(&decrypted{inner, dst}), 0, size)
	switch {
	case dst.err != nil:
		return dst.err
	case err != nil:
		return err
	case plain.Close() != nil: // checks the MDC; AEAD checks at EOF
		return ErrDamaged
	}
	return nil
}

func literal(dst *output, r *bufio.Reader, depth, size int) error {
	for skipped := 0; ; {
		if inflated, err := inflate(r); err != nil {
			return ErrDamaged
		} else if inflated != nil {
			if depth > 0 {
				return ErrDamaged
			}
			plain := newAhead(&decompressed{Reader: inflated, o: dst}, size)
			defer plain.close()
			return literal(dst, bufio.NewReaderSize(plain, 16<<10), depth+1, size)
		}
		n, known := literalSize(r)
		p, err := packet.Read(r)
		if err != nil {
			return ErrDamaged
		}
		switch p := p.(type) {
		case packet.Padding, *packet.Marker:
			if skipped++; skipped > maxSkipped {
				return ErrDamaged
			}
		case *packet.Compressed:
			if depth > 0 {
				return ErrDamaged
			}
			if err := literal(dst, bufio.NewReaderSize(&decompressed{Reader: p.Body, o: dst}, 64<<10), depth+1, size); err != nil {
				return err
			}
			return atEnd(r)
		case *packet.LiteralData:
			if known {
				dst.expect(n)
			}
			var text io.Writer = dst
			if p.Format == 't' || p.Format == 'u' || p.Format == 'm' {
				// As gpg does: text travels with CR LF and loses every CR here.
				text = &withoutCR{dst}
			}
			if _, err := io.CopyBuffer(text, onlyReader{p.Body}, make([]byte, copyBlock)); err != nil {
				return ErrDamaged
			}
			return atEnd(r)
		case *packet.OnePassSignature, *packet.Signature:
			return unsupported("a signature inside the encryption")
		default:
			return ErrDamaged
		}
	}
}

// literalSize is how much the literal data packet holds that begins here, if one
// does and its header tells (RFC 4880 sections 4.2 and 5.9); the library keeps that
// to itself.
func literalSize(r *bufio.Reader) (int64, bool) {
	const literalTag = 11
	head, _ := r.Peek(8) // the longest header, format and length of the name
	if len(head) < 4 {
		return 0, false
	}
	var length, header int
	switch l := int(head[1]); {
	case head[0] == 0x80|literalTag<<2: // old format, and how long the length is
		length, header = l, 2
	case head[0] == 0x80|literalTag<<2|1:
		length, header = int(binary.BigEndian.Uint16(head[1:])), 3
	case head[0] == 0x80|literalTag<<2|2 && len(head) >= 5:
		length, header = int(binary.BigEndian.Uint32(head[1:])), 5
	case head[0] == 0xc0|literalTag && l < 192:
		length, header = l, 2
	case head[0] == 0xc0|literalTag && l < 224:
		length, header = (l-192)<<8+int(head[2])+192, 3
	case head[0] == 0xc0|literalTag && l == 255 && len(head) >= 6:
		length, header = int(binary.BigEndian.Uint32(head[2:])), 6
	default: // another packet, or in parts
		return 0, false
	}
	if len(head) < header+2 {
		return 0, false
	}
	const formatNameDate = 1 + 1 + 4
	n := length - formatNameDate - int(head[header+1])
	return int64(n), n >= 0
}

// inflate returns the content of a compressed packet that is deflated and goes
// on to the end, which is how gpg compresses, or nil if none such begins here.
// The library would inflate it in twice the time.
func inflate(r *bufio.Reader) (io.Reader, error) {
	head, _ := r.Peek(2)
	if len(head) < 2 || head[0] != 0x80|8<<2|3 { // old format, compressed, of indeterminate length
		return nil, nil
	}
	switch head[1] { // RFC 4880 section 9.3
	case 1: // ZIP, which is raw deflate
		r.Discard(2)
		return &inflated{flate.NewReader(r), r}, nil
	case 2:
		r.Discard(2)
		z, err := zlib.NewReader(r)
		return &inflated{z, r}, err
	}
	return nil, nil
}

// inflated is deflated content. What follows it in its packet is passed over,
// as the library does, so that the MDC of it is checked.
type inflated struct {
	io.Reader
	rest io.Reader
}

func (i *inflated) Read(p []byte) (int, error) {
	n, err := i.Reader.Read(p)
	if err == io.EOF && n == 0 {
		if _, left := io.Copy(io.Discard, onlyReader{i.rest}); left != nil {
			return 0, left
		}
	}
	return n, err
}

// atEnd allows padding behind the data, which RFC 9580 permits, and nothing
// else.
func atEnd(r io.Reader) error {
	for range maxSkipped {
		p, err := packet.Read(r)
		if err == io.EOF {
			return nil
		}
		if _, padding := p.(packet.Padding); err != nil || !padding {
			return ErrDamaged
		}
	}
	return ErrDamaged
}

// onlyReader hides every other method, so that the copy goes through the
// buffer of the caller's choosing.
type onlyReader struct{ io.Reader }

// output lets left bytes through and remembers its own errors, so that they are not
// taken for damage. It also tells how much is to be expected.
type output struct {
	w    io.Writer
	left int64
	err  error

	message   int64        // about how much is encrypted, or 0 where that is not known
	decrypted int64        // how much of it was read; only for who reads it
	inflates  atomic.Int64 // to how much all of it will be inflated, by what was so far
	written   int64
	expected  bool // it was told what to expect
}

func (o *output) Write(p []byte) (int, error) {
	if o.err == nil && int64(len(p)) > o.left {
		o.err = ErrTooLarge
	}
	if o.err != nil {
		return 0, o.err
	}
	n, err := o.w.Write(p)
	o.left -= int64(n)
	o.err = err
	if o.written += int64(n); o.written >= guessAfter {
		o.expect(max(o.message, o.inflates.Load()))
	}
	return n, err
}

// guessAfter is how much of a content tells how well the rest of it was compressed.
const guessAfter = 1 << 20

// expect tells, once, and not that there will be nothing.
func (o *output) expect(n int64) {
	if e, ok := o.w.(Expecter); ok && !o.expected && n > 0 {
		e.Expect(n)
	}
	o.expected = true
}

// decrypted is what was decrypted, as it is read.
type decrypted struct {
	io.Reader
	o *output
}

func (d *decrypted) Read(p []byte) (int, error) {
	n, err := d.Reader.Read(p)
	d.o.decrypted += int64(n)
	return n, err
}

// decompressed is what that was inflated to. Who reads this reads that too.
type decompressed struct {
	io.Reader
	o *output
	n int64
}

func (d *decompressed) Read(p []byte) (int, error) {
	n, err := d.Reader.Read(p)
	d.n += int64(n)
	d.o.inflates.Store(int64(float64(d.o.message) / float64(d.o.decrypted) * float64(d.n)))
	return n, err
}

type withoutCR struct{ w io.Writer }

func (t *withoutCR) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		line, rest, found := bytes.Cut(p, []byte{'\r'})
		if _, err := t.w.Write(line); err != nil {
			return 0, err
		}
		if !found {
			break
		}
		p = rest
	}
	return n, nil
}
