package crypto

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

// A Report is what a message tells of itself without its passphrase. Nothing in
// it is authenticated: whoever can change the file can make it say anything, but
// what it says is what Decrypt would try.
type Report struct {
	Armored     bool
	Packets     []Packet     // the outermost, in order; at most maxPackets
	Passphrases []Passphrase // the ways in by passphrase
	PublicKeys  int          // the ways in by key, which are not read here
	Integrity   Integrity
	Cipher      Cipher // of the content; 0 where only the passphrase packet says it
	AEAD        AEAD   // 0 unless Integrity is AEAD
}

// A Packet is one packet of RFC 9580 section 4: its tag, and its body's length
// in bytes.
type Packet struct {
	Tag    uint8
	Length int64
}

// A Passphrase is how one passphrase packet (RFC 9580 section 5.3) makes a key.
type Passphrase struct {
	Version  uint8
	Cipher   Cipher
	AEAD     AEAD // 0 in version 4
	S2K      S2K
	Digest   Digest // of S2K, where it is not Argon2
	Count    int64  // bytes that are hashed, for Iterated
	Passes   uint8  // Argon2: t
	Lanes    uint8  // Argon2: p
	Exponent uint8  // Argon2: m is 2^Exponent KiB of memory
}

// Numbers of RFC 9580 section 9 and section 3.7.1.
type (
	Cipher    uint8
	AEAD      uint8
	Digest    uint8
	S2K       uint8
	Integrity uint8
)

const (
	Simple   S2K = 0 // one hash over the passphrase
	Salted   S2K = 1 // one hash over salt and passphrase
	Iterated S2K = 3 // Count bytes of salt and passphrase
	Argon2   S2K = 4
)

// What shows a change of the message.
const (
	None     Integrity = iota // nothing
	MDC                       // a SHA-1 hash inside the encryption, RFC 4880 section 5.13
	WithAEAD                  // authenticated encryption
)

func (c Cipher) String() string { return name(cipherNames, byte(c)) }
func (d Digest) String() string { return name(hashNames, byte(d)) }
func (a AEAD) String() string {
	return name(map[byte]string{1: "EAX", 2: "OCB", 3: "GCM"}, byte(a))
}
func (s S2K) String() string {
	return name(map[byte]string{0: "simple", 1: "salted", 3: "iterated", 4: "Argon2id"}, byte(s))
}
func (i Integrity) String() string {
	return [...]string{"none", "MDC", "AEAD"}[min(i, WithAEAD)]
}

// Kind is what the packet is called.
func (p Packet) Kind() string {
	return name(map[byte]string{1: "public-key session key", 2: "signature", 3: "passphrase", 4: "one-pass signature", 5: "secret key",
		6: "public key", 8: "compressed data", 9: "encrypted data without integrity protection", 10: "marker", 11: "literal data", 13: "user ID",
		18: "encrypted data", 20: "encrypted data of GnuPG (OCB)", 21: "padding"}, p.Tag)
}

const (
	tagPublicKey  = 1
	tagPassphrase = 3
	tagUnguarded  = 9
	tagMarker     = 10
	tagGuarded    = 18
	tagGnuPG      = 20
	tagPadding    = 21

	// maxPackets bounds a report; a message that Decrypt takes has fewer.
	maxPackets = 64
	// packetHead is as much of a packet's body as is looked at.
	packetHead = 64
)

// Inspect reads one message to its end and reports what it tells. The error is
// the fault that Decrypt would find on the way to the encryption, with the report
// of what came before it; what is wrong inside the encryption only a passphrase
// shows. It needs no more memory than a buffer, whatever src holds.
func Inspect(src io.Reader) (Report, error) {
	in := &source{r: src}
	buf := bufio.NewReaderSize(in, readAhead)
	body, armored, err := dearmor(buf)
	report := Report{Armored: armored}
	if err == nil {
		err = report.walk(bufio.NewReaderSize(body, 64<<10))
	}
	if err == nil && armored {
		err = armorEnd(buf)
	}
	if err != nil && in.failed.Load() {
		err = ErrRead
	}
	return report, err
}

func (r *Report) walk(in *bufio.Reader) error {
	var fault error
	note := func(err error) {
		if fault == nil {
			fault = err
		}
	}
	ended := false
	for skipped := 0; ; {
		begun := len(r.Packets) > 0
		tag, length, head, err := nextPacket(in)
		switch {
		case err == io.EOF && !ended:
			if fault == nil && !begun {
				fault = ErrNotOpenPGP
			}
			note(ErrDamaged)
			return fault
		case err == io.EOF:
			return fault
		case ended:
			note(ErrTrailing)
			return fault
		case err == errNoPacket && !begun:
			return ErrNotOpenPGP
		case err != nil:
			note(ErrDamaged)
			return fault
		}
		if len(r.Packets) == maxPackets {
			note(ErrDamaged)
			return fault
		}
		r.Packets = append(r.Packets, Packet{Tag: tag, Length: length})
		switch tag {
		case tagPassphrase:
			p, err := parsePassphrase(head)
			if err != nil {
				note(err)
				break
			}
			note(p.readable())
			if r.Passphrases = append(r.Passphrases, p); len(r.Passphrases) > maxPassphrasePackets {
				note(unsupported("more passphrase packets than any program writes"))
			}
		case tagPublicKey:
			r.PublicKeys++
		case tagMarker, tagPadding:
			if skipped++; skipped > maxSkipped {
				note(ErrDamaged)
			}
		case tagUnguarded, tagGuarded, tagGnuPG:
			ended = true
			r.data(tag, head)
			switch {
			case len(r.Passphrases) == 0 && fault != nil:
			case len(r.Passphrases) == 0 && r.PublicKeys > 0:
				note(ErrPublicKey)
			case len(r.Passphrases) == 0:
				note(unsupported("a message without a passphrase packet"))
			case r.Integrity == None:
				note(ErrNoIntegrity)
			}
		case 4, 8, 11:
			note(&Error{Fault: ErrNotOpenPGP, Detail: "it is not encrypted"})
			return fault
		default:
			note(&Error{Fault: ErrNotOpenPGP, Detail: "it holds keys or signatures"})
			return fault
		}
	}
}

// data notes what the start of the encrypted packet's body says (RFC 9580
// section 5.13, and the OCB packet of GnuPG).
func (r *Report) data(tag uint8, head []byte) {
	switch {
	case tag == tagGuarded && len(head) > 0 && head[0] == 1:
		r.Integrity = MDC
	case tag == tagGuarded && len(head) > 2 && head[0] == 2, tag == tagGnuPG && len(head) > 2:
		r.Integrity, r.Cipher, r.AEAD = WithAEAD, Cipher(head[1]), AEAD(head[2])
	}
}

// errNoPacket: no packet begins here.
var errNoPacket = fmt.Errorf("no packet")

// nextPacket reads one packet to its end and returns the start of its body. The
// error is io.EOF where nothing follows.
func nextPacket(in *bufio.Reader) (tag uint8, length int64, head []byte, err error) {
	first, err := in.ReadByte()
	if err != nil {
		return 0, 0, nil, err
	}
	if first&0x80 == 0 {
		return 0, 0, nil, errNoPacket
	}
	read := func(n int64) error {
		if keep := min(n, int64(packetHead-len(head))); keep > 0 {
			part := make([]byte, keep)
			got, err := io.ReadFull(in, part)
			head = append(head, part[:got]...)
			length += int64(got)
			if n -= int64(got); err != nil {
				return err
			}
		}
		got, err := io.CopyN(io.Discard, in, n)
		length += got
		return err
	}
	octets := func(n int) (int64, error) {
		var b [8]byte
		_, err := io.ReadFull(in, b[8-n:])
		return int64(binary.BigEndian.Uint64(b[:])), err
	}
	if first&0x40 == 0 { // old format
		tag = first >> 2 & 0xf
		if first&3 == 3 { // of indeterminate length
			err = read(1 << 62)
			if err == io.EOF || err == io.ErrUnexpectedEOF {
				err = nil
			}
			return tag, length, head, err
		}
		n, err := octets(1 << (first & 3))
		if err == nil {
			err = read(n)
		}
		return tag, length, head, noEOF(err)
	}
	tag = first & 0x3f
	for partial := true; partial; {
		partial = false
		n, err := octets(1)
		switch {
		case err != nil:
		case n < 192:
		case n < 224:
			var low int64
			low, err = octets(1)
			n = (n-192)<<8 + low + 192
		case n == 255:
			n, err = octets(4)
		default:
			n, partial = 1<<(n&0x1f), true
		}
		if err == nil {
			err = read(n)
		}
		if err != nil {
			return tag, length, head, noEOF(err)
		}
	}
	return tag, length, head, nil
}

// noEOF: an end within a packet is none between packets.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// parsePassphrase takes the start of a passphrase packet's body apart (RFC 9580
// section 5.3, RFC 4880 section 5.3; version 5 is GnuPG's).
func parsePassphrase(body []byte) (p Passphrase, err error) {
	if len(body) < 4 {
		return p, ErrDamaged
	}
	p.Version, p.Cipher = body[0], Cipher(body[1])
	spec := body[2:]
	switch p.Version {
	case 4:
	case 5:
		p.AEAD, spec = AEAD(body[2]), body[3:]
	case 6: // octet count, cipher, mode, octet count of S2K
		if len(body) < 7 {
			return p, ErrDamaged
		}
		p.Cipher, p.AEAD, spec = Cipher(body[2]), AEAD(body[3]), body[5:]
		// The library passes over the counts; a message whose counts are wrong
		// was changed.
		iv, size := map[byte]byte{1: 16, 2: 15, 3: 12}[body[3]], map[byte]byte{0: 2, 1: 10, 3: 11, 4: 20}[spec[0]]
		if body[4] != size || body[1] != 3+size+iv {
			return p, ErrDamaged
		}
	default:
		return p, unsupported(fmt.Sprintf("version %d of the passphrase packet", p.Version))
	}
	p.S2K = S2K(spec[0])
	switch {
	case p.S2K == Argon2 && len(spec) >= 20: // salt of 16, passes, lanes, memory exponent
		p.Passes, p.Lanes, p.Exponent = spec[17], spec[18], spec[19]
	case p.S2K == Iterated && len(spec) >= 11: // digest, salt of 8, count
		p.Digest = Digest(spec[1])
		p.Count = (16 + int64(spec[10]&15)) << (spec[10]>>4 + 6)
	case (p.S2K == Simple || p.S2K == Salted) && len(spec) >= 2:
		p.Digest = Digest(spec[1])
	case p.S2K == Simple || p.S2K == Salted || p.S2K == Iterated || p.S2K == Argon2:
		return p, ErrDamaged
	}
	return p, nil
}

// readable tells why a passphrase packet is not tried, if it is not: what cannot
// be read has a name then, and what asks for too much is not computed. The
// library would pass over both in silence.
func (p Passphrase) readable() error {
	switch p.Cipher {
	case 2, 3, 7, 8, 9:
	default:
		return unsupported("the cipher " + p.Cipher.String())
	}
	switch p.S2K {
	case Simple, Salted, Iterated:
		switch p.Digest {
		case 2, 8, 9, 10, 11, 12, 14:
		default:
			return unsupported("S2K with the digest " + p.Digest.String())
		}
	case Argon2:
		if p.Exponent > maxArgon2Exponent {
			return unsupported(fmt.Sprintf("Argon2 with 2^%d KiB of memory", p.Exponent))
		}
	default:
		return unsupported(fmt.Sprintf("S2K mode %d", p.S2K))
	}
	return nil
}

// WeakS2KCount: iterated S2K that hashes fewer bytes than this is called weak,
// 8 MiB. The largest count there is, MaxS2KCount, costs about what OWASP asks of
// PBKDF2 with SHA-512 (210,000 rounds of two blocks of 128 bytes: 54 MB); this is
// less than a sixth of it. gpg measures its count so that it takes 100 ms and
// lands above; a gpg without its agent takes 65536, a thousandth.
const WeakS2KCount = 8 << 20

// Weaknesses lists, in words for a person, what makes it easier to guess the
// passphrase or to work on the encryption than it need be. None is strong enough.
func (r *Report) Weaknesses() (all []string) {
	for _, p := range r.Passphrases {
		switch {
		case p.S2K == Simple:
			all = append(all, "S2K simple has no salt and hashes once: passphrases can be looked up in a table")
		case p.S2K == Salted:
			all = append(all, "S2K salted hashes once: a machine tries thousands of millions of passphrases a second")
		case p.S2K == Iterated && p.Count < WeakS2KCount:
			all = append(all, fmt.Sprintf("S2K count %d is weak: the largest, %d, makes each guess %d times as dear", p.Count, MaxS2KCount, MaxS2KCount/max(p.Count, 1)))
		case p.S2K == Argon2 && p.weakArgon2():
			all = append(all, fmt.Sprintf("Argon2id with %d KiB and %d passes is less than RFC 9106 recommends", uint64(1)<<p.Exponent, p.Passes))
		}
		if p.Cipher == 2 || p.Cipher == 3 {
			all = append(all, p.Cipher.String()+" has blocks of 64 bits and is not to be used any more (RFC 9580 section 9.3)")
		}
	}
	if r.Integrity == None && len(r.Passphrases) > 0 {
		all = append(all, "nothing would show a change of the content")
	}
	return all
}

// weakArgon2 compares with the two choices of RFC 9106 section 4: 2 GiB and one
// pass, or 64 MiB and three.
func (p Passphrase) weakArgon2() bool {
	return !(p.Exponent >= 21 || p.Exponent >= 16 && p.Passes >= 3)
}

// A Format is how a message is to be written.
type Format struct {
	Profile Profile
	Binary  bool // without armor
	// least is Argon2 at least as costly as this.
	passes, exponent uint8
}

// Format is how to write a message anew so that whoever reads this one reads
// that: armored if it is, of the profile that it is nearest to, and with an S2K
// that is no cheaper. GnuPG's own OCB packets become the gpg profile, which every
// gpg reads.
func (r *Report) Format() Format {
	f := Format{Profile: GPG, Binary: !r.Armored}
	for _, p := range r.Passphrases {
		if p.Version == 6 || p.S2K == Argon2 {
			f.Profile = RFC9580
		}
		if p.S2K == Argon2 {
			f.passes, f.exponent = max(f.passes, p.Passes), max(f.exponent, p.Exponent)
		}
	}
	return f
}

// In is the format in another profile.
func (f Format) In(p Profile) Format {
	f.Profile = p
	return f
}

// describe looks at a passphrase packet that may begin here and tells why it is
// not tried, if it is not. It returns a stretching for what need not be left to
// the library.
func describe(in *bufio.Reader) (*stretching, error) {
	head, _ := in.Peek(32)
	body, ok := packetBody(head, tagPassphrase)
	if !ok || len(body) < 4 {
		return nil, nil
	}
	p, err := parsePassphrase(body)
	if err == nil {
		err = p.readable()
	}
	if err != nil {
		return nil, err
	}
	// Both formats tell a length this small in the second byte.
	if short := head[0]&0x40 != 0 || head[0]&3 == 0; short && int(head[1]) <= len(body) {
		return parseStretching(body[:head[1]]), nil
	}
	return nil, nil
}

// Numbers of RFC 4880 section 9 and RFC 9580 section 9.
var (
	cipherNames = map[byte]string{1: "IDEA", 2: "TripleDES", 3: "CAST5", 4: "Blowfish", 7: "AES128", 8: "AES192", 9: "AES256", 10: "Twofish", 11: "Camellia128", 12: "Camellia192", 13: "Camellia256"}
	hashNames   = map[byte]string{1: "MD5", 2: "SHA1", 3: "RIPEMD160", 8: "SHA256", 9: "SHA384", 10: "SHA512", 11: "SHA224", 12: "SHA3-256", 14: "SHA3-512"}
)

func name(names map[byte]string, n byte) string {
	if s := names[n]; s != "" {
		return s
	}
	return fmt.Sprintf("number %d", n)
}

// packetBody returns the start of the body if a packet of that tag begins here
// (RFC 4880 section 4.2).
func packetBody(head []byte, tag byte) ([]byte, bool) {
	if len(head) < 2 || head[0]&0x80 == 0 {
		return nil, false
	}
	if head[0]&0x40 != 0 { // new format
		skip := 2
		switch {
		case head[1] == 255:
			skip = 6
		case head[1] >= 192 && head[1] < 224:
			skip = 3
		}
		return head[min(skip, len(head)):], head[0]&0x3f == tag
	}
	skip := 1 + 1<<(head[0]&3)
	return head[min(skip, len(head)):], head[0]>>2&0xf == tag
}

// LooksLikeMessage tells from the first bytes of a file whether it may be an
// OpenPGP message, armored or not. It is a guard against overwriting something
// else, not a check of the message.
func LooksLikeMessage(head []byte) bool {
	if bytes.Contains(head, []byte("-----BEGIN "+messageType+"-----")) {
		return true
	}
	for _, tag := range []byte{tagPublicKey, tagPassphrase} {
		if body, ok := packetBody(head, tag); ok && len(body) > 0 && body[0] >= 2 && body[0] <= 6 {
			return true
		}
	}
	return false
}
