package crypto

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha1"
	"crypto/subtle"
	"hash"
	"io"
)

// mdcTrailer is the packet that ends the plaintext: tag, length, SHA-1 of all
// before and of these two (RFC 4880 section 5.14).
const mdcTrailer = 2 + sha1.Size

// mdcBlock is the most that is decrypted at once.
const mdcBlock = 128 << 10

// mdcReader decrypts a packet with integrity protection of version 1 (RFC 4880
// section 5.13) under AES. Close tells whether all that was read is authentic.
// It does what the library's reader does, block by block where that one goes
// byte by byte.
type mdcReader struct {
	in     io.Reader
	stream cipher.Stream
	hash   hash.Hash
	block  []byte // all of the memory that is decrypted into
	buf    []byte // the part of it that was not read yet; what may be the trailer is held back
	eof    bool
}

// newMDCReader decrypts size bytes at once.
func newMDCReader(in io.Reader, key []byte, size int) (*mdcReader, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	// What OpenPGP adds to CFB, the resynchronization, is left out in this
	// packet. The mode's lack of authentication is why the MDC is there.
	//lint:ignore SA1019 the format demands it
	m := &mdcReader{in: in, stream: cipher.NewCFBDecrypter(block, make([]byte, aes.BlockSize)), hash: sha1.New(), block: make([]byte, mdcTrailer+size)}
	var prefix [aes.BlockSize + 2]byte
	if _, err := io.ReadFull(in, prefix[:]); err != nil {
		return nil, err
	}
	m.stream.XORKeyStream(prefix[:], prefix[:])
	m.hash.Write(prefix[:])
	return m, nil
}

func (m *mdcReader) Read(p []byte) (int, error) {
	for len(m.buf) <= mdcTrailer {
		if m.eof {
			return 0, io.EOF
		}
		if err := m.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, m.buf[:len(m.buf)-mdcTrailer])
	m.hash.Write(m.buf[:n])
	m.buf = m.buf[n:]
	return n, nil
}

// fill decrypts on, behind what is held back.
func (m *mdcReader) fill() error {
	held := copy(m.block, m.buf)
	n, err := m.in.Read(m.block[held:])
	m.buf = m.block[:held+n]
	m.stream.XORKeyStream(m.buf[held:], m.buf[held:])
	if err == io.EOF {
		m.eof = true
		return nil
	}
	return err
}

// Close reads to the end and checks the MDC.
func (m *mdcReader) Close() error {
	if _, err := io.Copy(io.Discard, onlyReader{m}); err != nil {
		return err
	}
	if len(m.buf) != mdcTrailer {
		return ErrDamaged
	}
	m.hash.Write(m.buf[:2])
	ok := subtle.ConstantTimeCompare(m.hash.Sum(nil), m.buf[2:])
	ok &= subtle.ConstantTimeByteEq(m.buf[0], 0xc0|19) & subtle.ConstantTimeByteEq(m.buf[1], sha1.Size)
	if ok != 1 {
		return ErrDamaged
	}
	return nil
}
