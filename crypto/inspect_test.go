package crypto

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"
)

func inspect(msg []byte) (Report, error) { return Inspect(bytes.NewReader(msg)) }

// TestC22_InspectAgreesWithDecrypt: on what other programs wrote, Inspect finds
// the fault that Decrypt finds, unless only a passphrase shows it.
func TestC22_InspectAgreesWithDecrypt(t *testing.T) {
	files, err := os.ReadDir("testdata/vectors")
	if err != nil || len(files) < 40 {
		t.Fatalf("vectors: %d, %v", len(files), err)
	}
	for _, f := range files {
		msg := vector(t, f.Name())
		_, want := decrypt(msg, vectorPass, 1<<20)
		if f.Name() == "gpg-signed-inside.gpg" {
			want = nil // the signature is inside the encryption
		}
		r, got := inspect(msg)
		wantFault, _ := FaultOf(want)
		gotFault, _ := FaultOf(got)
		if (got == nil) != (want == nil) || gotFault != wantFault {
			t.Errorf("%s: inspect says %v, decrypt says %v", f.Name(), got, want)
		}
		if r.Armored != (strings.HasSuffix(f.Name(), ".asc") || bytes.HasPrefix(msg, []byte("-----"))) {
			t.Errorf("%s: armored is %v", f.Name(), r.Armored)
		}
	}
}

func TestC22_InspectNames(t *testing.T) {
	for name, want := range map[string]Passphrase{
		"gpg-cipher-3DES.gpg":   {Version: 4, Cipher: 2, S2K: Iterated, Digest: 2, Count: 65536},
		"gpg-digest-SHA384.gpg": {Version: 4, Cipher: 9, S2K: Iterated, Digest: 9, Count: 65536},
		"gpg-s2k-0.gpg":         {Version: 4, Cipher: 9, S2K: Simple, Digest: 2},
		"gpg-s2k-1.gpg":         {Version: 4, Cipher: 9, S2K: Salted, Digest: 2},
		"gpg-old-scripts.asc":   {Version: 4, Cipher: 9, S2K: Iterated, Digest: 10, Count: MaxS2KCount},
	} {
		r, err := inspect(vector(t, name))
		if err != nil || len(r.Passphrases) != 1 || r.Passphrases[0] != want || r.Integrity != MDC || r.PublicKeys != 0 {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
		weak := name != "gpg-old-scripts.asc"
		if got := r.Weaknesses(); (len(got) > 0) != weak {
			t.Errorf("%s: weaknesses %q", name, got)
		}
	}
	if r, err := inspect(vector(t, "gpg-both.gpg")); err != nil || r.PublicKeys != 1 || len(r.Passphrases) != 1 {
		t.Errorf("both: %+v, %v", r, err)
	}
	if r, err := inspect(vector(t, "gpg-no-mdc.gpg")); err != ErrNoIntegrity || r.Integrity != None || len(r.Weaknesses()) == 0 {
		t.Errorf("no MDC: %+v, %v", r, err)
	}
	// A message of partial lengths: what the parts hold, without their headers.
	r, err := inspect(vector(t, "gpg-stream.gpg"))
	if err != nil || len(r.Packets) != 2 || r.Packets[1].Tag != tagGuarded || r.Packets[1].Length < 100 {
		t.Errorf("partial: %+v, %v", r, err)
	}
}

// TestC22_FormatKeeps: what is written in the format of a message is of that
// format, and its S2K costs no less.
func TestC22_FormatKeeps(t *testing.T) {
	plain := []byte("content")
	for name, f := range map[string]Format{
		"gpg":              {Profile: GPG},
		"gpg binary":       {Profile: GPG, Binary: true},
		"rfc9580":          {Profile: RFC9580},
		"more than enough": {Profile: RFC9580, Binary: true, passes: 4, exponent: 17},
	} {
		var msg bytes.Buffer
		if err := EncryptAs(&msg, bytes.NewReader(plain), []byte(vectorPass), f); err != nil {
			t.Fatal(name, err)
		}
		r, err := inspect(msg.Bytes())
		if err != nil {
			t.Fatal(name, err)
		}
		got := r.Format()
		if got.Profile != f.Profile || got.Binary != f.Binary || got.passes < f.passes || got.exponent < f.exponent {
			t.Errorf("%s: %+v became %+v", name, f, got)
		}
		if w := r.Weaknesses(); len(w) != 0 {
			t.Errorf("%s: what we write is weak: %q", name, w)
		}
		if back, err := decrypt(msg.Bytes(), vectorPass, 100); err != nil || !bytes.Equal(back, plain) {
			t.Errorf("%s: %q, %v", name, back, err)
		}
	}
}

func TestC22_InspectTrailingAndCut(t *testing.T) {
	msg := quick(t, []byte("content"), nil)
	if _, err := inspect(append(bytes.Clone(msg), 'x')); !errors.Is(err, ErrTrailing) {
		t.Errorf("trailing: %v", err)
	}
	if _, err := inspect(append(bytes.Clone(msg), msg...)); !errors.Is(err, ErrTrailing) {
		t.Errorf("two messages: %v", err)
	}
	for n := 1; n < len(msg); n++ {
		if _, err := inspect(msg[:n]); !errors.Is(err, ErrDamaged) {
			t.Fatalf("cut to %d: %v", n, err)
		}
	}
	if _, err := inspect(nil); !errors.Is(err, ErrNotOpenPGP) {
		t.Errorf("empty: %v", err)
	}
	if _, err := inspect([]byte("user: app\n")); !errors.Is(err, ErrNotOpenPGP) {
		t.Errorf("plain text: %v", err)
	}
}

// FuzzInspect: whatever comes in, it ends with a known fault or none, the report
// is bounded, and a message that Decrypt takes has none.
func FuzzInspect(f *testing.F) {
	files, _ := os.ReadDir("testdata/vectors")
	for _, file := range files {
		if n := file.Name(); !strings.Contains(n, "default") && !strings.Contains(n, "sq.") && !strings.Contains(n, "old") {
			f.Add(vector(f, n))
		}
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		r, err := inspect(msg)
		if fault, _ := FaultOf(err); err != nil && !fault.Known() {
			t.Fatalf("unknown error %v", err)
		}
		if len(r.Packets) > maxPackets || len(r.Passphrases) > maxPassphrasePackets+1 {
			t.Fatalf("a report of %d packets, %d passphrases", len(r.Packets), len(r.Passphrases))
		}
		r.Weaknesses()
		r.Format()
		for _, p := range r.Passphrases {
			if p.Count > 65536 || p.S2K == Argon2 {
				return // Decrypt would take its time
			}
		}
		if err != nil {
			if _, other := decrypt(msg, vectorPass, 1<<16); other == nil {
				t.Fatalf("inspect says %v of what can be read", err)
			}
		}
	})
}
