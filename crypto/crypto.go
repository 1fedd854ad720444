// Package crypto turns OpenPGP messages into authenticated bytes, and back.
//
// Only messages protected by a passphrase are read: what gpg --symmetric
// writes (RFC 4880 with MDC), what RFC 9580 defines (Argon2, AEAD), and the
// OCB packets that GnuPG 2.3 and later write when asked to. A message without
// integrity protection, with anything behind its end, or with a packet where
// none belongs is refused.
package crypto

import "errors"

// A Fault is one way in which a message cannot be served. It is comparable, so
// errors.Is finds it; it never carries anything from inside the encryption.
type Fault uint8

const (
	// ErrNotOpenPGP: no OpenPGP message begins here.
	ErrNotOpenPGP Fault = iota + 1
	// ErrWrongPassphrase: the passphrase does not open it. Damage to the first
	// bytes of the encrypted part looks the same.
	ErrWrongPassphrase
	// ErrDamaged: it is cut short, changed, or not built as a message must be.
	ErrDamaged
	// ErrPublicKey: it was encrypted to a key and not with a passphrase.
	ErrPublicKey
	// ErrNoIntegrity: nothing in it would show a change (no MDC, no AEAD).
	ErrNoIntegrity
	// ErrTrailing: something follows its end.
	ErrTrailing
	// ErrTooLarge: its content is larger than the most that was allowed.
	ErrTooLarge
	// ErrUnsupported: an algorithm or packet that is not read here; the error
	// around it says which.
	ErrUnsupported
	// ErrRead: the file could not be read to its end.
	ErrRead
	lastFault = ErrRead
)

func (f Fault) Error() string {
	switch f {
	case ErrNotOpenPGP:
		return "not an OpenPGP message"
	case ErrWrongPassphrase:
		return "wrong passphrase"
	case ErrDamaged:
		return "damaged: it is not whole or was changed"
	case ErrPublicKey:
		return "encrypted to a public key, not with a passphrase"
	case ErrNoIntegrity:
		return "has no integrity protection"
	case ErrTrailing:
		return "data follows the end of the message"
	case ErrTooLarge:
		return "its content is too large"
	case ErrUnsupported:
		return "not supported"
	case ErrRead:
		return "cannot be read to its end"
	}
	return "unknown fault"
}

// Known tells whether f is one of this package's faults.
func (f Fault) Known() bool { return f >= ErrNotOpenPGP && f <= lastFault }

// An Error is a fault with what is known of it from outside the encryption.
type Error struct {
	Fault  Fault
	Detail string
}

func (e *Error) Error() string { return e.Fault.Error() + ": " + e.Detail }
func (e *Error) Unwrap() error { return e.Fault }

func unsupported(what string) error { return &Error{Fault: ErrUnsupported, Detail: what} }

// FaultOf takes an error of this package apart.
func FaultOf(err error) (f Fault, detail string) {
	var e *Error
	if errors.As(err, &e) {
		return e.Fault, e.Detail
	}
	if errors.As(err, &f) {
		return f, ""
	}
	return ErrDamaged, ""
}
