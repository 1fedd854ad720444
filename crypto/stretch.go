package crypto

import (
	"crypto"
	_ "crypto/sha1" // makes crypto.SHA1 available, and so on
	_ "crypto/sha256"
	_ "crypto/sha512"
	"sync"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// A stretching is an iterated and salted S2K (RFC 4880 section 3.7.1.3) whose
// result is the key itself: what gpg --symmetric writes. It gives what the
// library's gives, in less time: a small file's time is spent here.
type stretching struct {
	cipher packet.CipherFunction
	hash   crypto.Hash
	salt   [8]byte
	count  int
}

// stretchingSize is the body of a version 4 passphrase packet without a session
// key: version, cipher, S2K mode, digest, salt, count (RFC 4880 section 5.3).
const stretchingSize = 13

// parseStretching returns nil for what is left to the library. body is all of
// the packet's body, and describe has let it pass.
func parseStretching(body []byte) *stretching {
	if len(body) != stretchingSize || body[0] != 4 || body[2] != 3 {
		return nil
	}
	// RFC 4880 section 9.4. The SHA-3 of RFC 9580 nobody writes here.
	hash := map[byte]crypto.Hash{2: crypto.SHA1, 8: crypto.SHA256, 9: crypto.SHA384, 10: crypto.SHA512, 11: crypto.SHA224}[body[3]]
	cipher := packet.CipherFunction(body[1])
	if hash == 0 || cipher.KeySize() == 0 {
		return nil
	}
	s := &stretching{cipher: cipher, hash: hash, count: (16 + int(body[12]&15)) << (body[12]>>4 + 6)}
	copy(s.salt[:], body[4:])
	return s
}

// stretchedAtOnce is the least that goes into the hash in one call. Salt and
// passphrase alone are some 30 bytes, and a call would cost more than they do.
const stretchedAtOnce = 16 << 10

// key makes the key. A key that is longer than the hash takes several runs,
// which differ by the zeros in front; they do not need each other.
func (s *stretching) key(passphrase []byte) []byte {
	one := len(s.salt) + len(passphrase)
	count := max(s.count, one)
	repeated := make([]byte, 0, stretchedAtOnce+one)
	for len(repeated) < min(count, stretchedAtOnce) {
		repeated = append(append(repeated, s.salt[:]...), passphrase...)
	}
	key := make([]byte, s.cipher.KeySize())
	var wg sync.WaitGroup
	for i := 0; i*s.hash.Size() < len(key); i++ {
		wg.Go(func() {
			h := s.hash.New()
			h.Write(make([]byte, i))
			left := count
			for ; left >= len(repeated); left -= len(repeated) {
				h.Write(repeated)
			}
			h.Write(repeated[:left])
			copy(key[i*h.Size():], h.Sum(nil))
		})
	}
	wg.Wait()
	clear(repeated)
	return key
}
