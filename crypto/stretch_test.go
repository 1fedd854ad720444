package crypto

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/ProtonMail/go-crypto/openpgp/s2k"
	"pgregory.net/rapid"
)

// What we make ourselves in less time is what the library makes.
func TestStretchingIsTheLibrarys(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		body := append([]byte{4, rapid.SampledFrom([]byte{2, 3, 7, 8, 9}).Draw(t, "cipher"), 3,
			rapid.SampledFrom([]byte{2, 8, 9, 10, 11}).Draw(t, "digest")}, rapid.SliceOfN(rapid.Byte(), 8, 8).Draw(t, "salt")...)
		body = append(body, rapid.ByteRange(0, 0x80).Draw(t, "count"))
		passphrase := rapid.SliceOfN(rapid.Byte(), 1, 5000).Draw(t, "passphrase")
		s := parseStretching(body)
		if s == nil {
			t.Fatal("not taken")
		}
		theirs, err := s2k.Parse(bytes.NewReader(body[2:]))
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, s.cipher.KeySize())
		theirs(want, passphrase)
		if got := s.key(passphrase); !bytes.Equal(got, want) {
			t.Errorf("%x and not %x", got, want)
		}
	})
}

func TestStretchingLeavesTheRestToTheLibrary(t *testing.T) {
	body := []byte{4, 9, 3, 10, 1, 2, 3, 4, 5, 6, 7, 8, 0x60}
	if parseStretching(body) == nil {
		t.Fatal("not taken")
	}
	for _, change := range []func([]byte) []byte{
		func(b []byte) []byte { return b[:12] },
		func(b []byte) []byte { return append(b, 1) }, // a session key follows
		func(b []byte) []byte { b[0] = 5; return b },
		func(b []byte) []byte { b[1] = 99; return b },
		func(b []byte) []byte { b[2] = 1; return b },
		func(b []byte) []byte { b[3] = 3; return b },
	} {
		if b := change(bytes.Clone(body)); parseStretching(b) != nil {
			t.Errorf("%x was taken", b)
		}
	}
}

// Reading ahead changes nothing of what is read, however it comes in, and
// tells an error only after all that came before it.
func TestAheadGivesWhatIsRead(t *testing.T) {
	broken := errors.New("broken")
	for _, size := range []int{0, 1, aheadBlock - 1, aheadBlock, aheadBlock + 1, 5*aheadBlock + 7} {
		want := bytes.Repeat([]byte("abcdefg"), size/7+1)[:size]
		for _, end := range []error{io.EOF, broken} {
			a := newAhead(iotest.HalfReader(io.MultiReader(bytes.NewReader(want), iotest.ErrReader(end))), aheadBlock)
			var got bytes.Buffer
			_, err := io.Copy(&got, onlyReader{a})
			if end == io.EOF {
				end = nil
			}
			if err != end || !bytes.Equal(got.Bytes(), want) {
				t.Errorf("%d bytes: got %d, %v", size, got.Len(), err)
			}
			a.close()
		}
	}
}
