package crypto

import (
	stdcrypto "crypto"
	"fmt"
	"io"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/ProtonMail/go-crypto/openpgp/s2k"
)

// A Profile is a set of algorithms that belong together.
type Profile string

const (
	// GPG is read by every gpg since 2.1: AES-256 with MDC, S2K iterated and
	// salted SHA-512 with the largest count that the format can say.
	GPG Profile = "gpg"
	// RFC9580 is AES-256 with OCB and Argon2id; no gpg reads it.
	RFC9580 Profile = "rfc9580"
)

// MaxS2KCount is the largest count of RFC 4880 section 3.7.1.3.
const MaxS2KCount = 65011712

func (p Profile) config() (*packet.Config, error) {
	switch p {
	case GPG:
		return &packet.Config{
			DefaultCipher: packet.CipherAES256,
			// No compression: it would tell something of the content by its length.
			DefaultCompressionAlgo: packet.CompressionNone,
			S2KConfig: &s2k.Config{
				S2KMode:  s2k.IteratedSaltedS2K,
				Hash:     stdcrypto.SHA512,
				S2KCount: MaxS2KCount,
			},
		}, nil
	case RFC9580:
		return &packet.Config{
			DefaultCipher:          packet.CipherAES256,
			DefaultCompressionAlgo: packet.CompressionNone,
			// OCB is the one mode that RFC 9580 section 9.6 obliges all to read.
			AEADConfig: &packet.AEADConfig{DefaultMode: packet.AEADModeOCB},
			S2KConfig: &s2k.Config{
				S2KMode: s2k.Argon2S2K,
				// The second recommended choice of RFC 9106 section 4: 64 MiB.
				Argon2Config: &s2k.Argon2Config{NumberOfPasses: 3, DegreeOfParallelism: 4, Memory: 64 << 10},
			},
		}, nil
	}
	return nil, fmt.Errorf("unknown profile %q", string(p))
}

// Encrypt reads src to its end and writes it to dst as one armored message.
// What dst got is a message only if no error came back.
func Encrypt(dst io.Writer, src io.Reader, passphrase []byte, p Profile) error {
	return EncryptAs(dst, src, passphrase, Format{Profile: p})
}

// EncryptAs is Encrypt in a given format.
func EncryptAs(dst io.Writer, src io.Reader, passphrase []byte, f Format) error {
	config, err := f.Profile.config()
	if err != nil {
		return err
	}
	if a := config.S2KConfig.Argon2Config; a != nil {
		a.NumberOfPasses = max(a.NumberOfPasses, f.passes)
		a.Memory = max(a.Memory, 1<<f.exponent)
	}
	text := dst
	var armored io.WriteCloser
	if !f.Binary {
		if armored, err = armor.Encode(dst, messageType, nil); err != nil {
			return err
		}
		text = armored
	}
	// Neither name nor time of the plaintext goes into the message.
	plain, err := openpgp.SymmetricallyEncrypt(text, passphrase, &openpgp.FileHints{IsBinary: true}, config)
	if err != nil {
		return err
	}
	if _, err := io.Copy(plain, src); err != nil {
		return err
	}
	if err := plain.Close(); err != nil || armored == nil {
		return err
	}
	if err := armored.Close(); err != nil {
		return err
	}
	_, err = io.WriteString(dst, "\n")
	return err
}
