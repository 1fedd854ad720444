package crypto

import (
	"bufio"
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/ProtonMail/go-crypto/openpgp/s2k"
)

const vectorPass = "vector passphrase"

func vector(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "vectors", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func sample(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/content.txt")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func decrypt(msg []byte, pass string, max int64) ([]byte, error) {
	var out bytes.Buffer
	err := Decrypt(&out, bytes.NewReader(msg), []byte(pass), max)
	return out.Bytes(), err
}

// quick encrypts with a small S2K count, so that tests of framing are fast.
func quick(t testing.TB, plain []byte, config *packet.Config) []byte {
	t.Helper()
	return streamed(t, plain, len(plain), config)
}

// streamed is quick for a content that comes in pieces, so that the message does not
// tell its size.
func streamed(t testing.TB, plain []byte, piece int, config *packet.Config) []byte {
	t.Helper()
	if config == nil {
		config = &packet.Config{DefaultCipher: packet.CipherAES256}
	}
	config.S2KConfig = &s2k.Config{S2KMode: s2k.IteratedSaltedS2K, S2KCount: 65536}
	var out bytes.Buffer
	w, err := openpgp.SymmetricallyEncrypt(&out, []byte(vectorPass), &openpgp.FileHints{IsBinary: true}, config)
	if err != nil {
		t.Fatal(err)
	}
	for part := range slices.Chunk(plain, max(1, piece)) {
		if _, err := w.Write(part); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestC22_Vectors reads what other programs wrote; testdata/make-vectors tells how.
func TestC22_Vectors(t *testing.T) {
	refused := map[string]struct {
		fault Fault
		names string
	}{
		"gpg-cipher-IDEA.gpg":        {ErrUnsupported, "IDEA"},
		"gpg-cipher-BLOWFISH.gpg":    {ErrUnsupported, "Blowfish"},
		"gpg-cipher-TWOFISH.gpg":     {ErrUnsupported, "Twofish"},
		"gpg-cipher-CAMELLIA128.gpg": {ErrUnsupported, "Camellia128"},
		"gpg-cipher-CAMELLIA192.gpg": {ErrUnsupported, "Camellia192"},
		"gpg-cipher-CAMELLIA256.gpg": {ErrUnsupported, "Camellia256"},
		"gpg-digest-RIPEMD160.gpg":   {ErrUnsupported, "RIPEMD160"},
		"gpg-no-mdc.gpg":             {ErrNoIntegrity, ""},
		"gpg-public-key.gpg":         {ErrPublicKey, ""},
		"gpg-signed-inside.gpg":      {ErrUnsupported, "signature"},
		"gpg-key.gpg":                {ErrNotOpenPGP, "keys"},
		"gpg-signed-only.gpg":        {ErrNotOpenPGP, "not encrypted"},
		"gpg-stored.gpg":             {ErrNotOpenPGP, "not encrypted"},
	}
	files, err := os.ReadDir("testdata/vectors")
	if err != nil || len(files) < 40 {
		t.Fatalf("vectors: %d, %v", len(files), err)
	}
	want := sample(t)
	for _, f := range files {
		t.Run(f.Name(), func(t *testing.T) {
			t.Parallel()
			got, err := decrypt(vector(t, f.Name()), vectorPass, 1<<20)
			if r, ok := refused[f.Name()]; ok {
				if !errors.Is(err, r.fault) || !strings.Contains(err.Error(), r.names) {
					t.Fatalf("got %v, want %v naming %q", err, r.fault, r.names)
				}
				if len(got) != 0 {
					t.Fatalf("%d bytes came out", len(got))
				}
				return
			}
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
		})
	}
}

// told is a buffer that is told what to expect.
type told struct {
	bytes.Buffer
	sizes []int64
}

func (t *told) Expect(n int64) { t.sizes = append(t.sizes, n) }

// What a message says of its size is told once, before the content, and is right;
// of a small one that does not say it, nothing is told.
func TestExpecter(t *testing.T) {
	want := sample(t)
	files, err := os.ReadDir("testdata/vectors")
	if err != nil {
		t.Fatal(err)
	}
	sized := 0
	for _, f := range files {
		var out told
		if err := Decrypt(&out, bytes.NewReader(vector(t, f.Name())), []byte(vectorPass), 1<<20); err != nil {
			continue // one of those that are refused
		}
		if len(out.sizes) > 1 {
			t.Errorf("%s: told %d", f.Name(), out.sizes)
		}
		for _, n := range out.sizes {
			sized++
			if n != int64(len(want)) {
				t.Errorf("%s: told %d, and %d came", f.Name(), n, len(want))
			}
		}
	}
	if sized < 20 {
		t.Errorf("told of %d messages", sized)
	}
}

// Where a large message does not say how much it holds, the beginning tells.
func TestExpecter_Guesses(t *testing.T) {
	text := passwords(4 << 20)
	small := text[:guessAfter/2]
	zip := &packet.Config{DefaultCipher: packet.CipherAES256, DefaultCompressionAlgo: packet.CompressionZIP,
		CompressionConfig: &packet.CompressionConfig{Level: flate.DefaultCompression}}
	for _, c := range []struct {
		name     string
		message  []byte
		content  []byte
		notAFile bool
		told     int // how often
	}{
		{"as it is", streamed(t, text, 64<<10, nil), text, false, 1},
		{"zip", streamed(t, text, 64<<10, zip), text, false, 1},
		{"gpg", piped(t, text), text, false, 1},
		{"gpg, armored", piped(t, text, "--armor"), text, false, 1},
		{"gpg, as it is", piped(t, text, "--armor", "--compress-algo", "none"), text, false, 1},
		{"gpg, small", piped(t, small), small, false, 0},
		{"no file", piped(t, text), text, true, 0},
	} {
		path := filepath.Join(t.TempDir(), "msg")
		if err := os.WriteFile(path, c.message, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		src := io.Reader(f)
		if c.notAFile {
			src = onlyReader{f}
		}
		var out told
		if err := Decrypt(&out, src, []byte(vectorPass), 1<<30); err != nil || !bytes.Equal(out.Bytes(), c.content) {
			t.Fatalf("%s: %d bytes, %v", c.name, out.Len(), err)
		}
		if len(out.sizes) != c.told {
			t.Errorf("%s: told %d", c.name, out.sizes)
		}
		for _, n := range out.sizes {
			if off := float64(n)/float64(len(c.content)) - 1; math.Abs(off) > 0.03 {
				t.Errorf("%s: told %d, and %d came: %+.3f", c.name, n, len(c.content), off)
			}
		}
	}
}

// passwords is a content of that size, of which a third can be compressed away.
func passwords(size int) []byte {
	var text bytes.Buffer
	text.Grow(size + 100)
	for i := 0; text.Len() < size; i++ {
		sum := sha256.Sum256([]byte(strconv.Itoa(i)))
		fmt.Fprintf(&text, "service-%d-password: %s\n", i, base64.StdEncoding.EncodeToString(sum[:]))
	}
	return text.Bytes()[:size]
}

// BenchmarkDecrypt is what the decrypting process does with a large file:
//
//	go test ./crypto -run '^$' -bench Decrypt/gpg -benchtime 20x -cpuprofile cpu.out -o crypto.test
//	go tool pprof -top crypto.test cpu.out
func BenchmarkDecrypt(b *testing.B) {
	text := passwords(64 << 20)
	for name, message := range map[string]func(b *testing.B) []byte{
		"gpg": func(b *testing.B) []byte { return piped(b, text, "--armor") },
		"encrypt": func(b *testing.B) []byte {
			var msg bytes.Buffer
			if err := Encrypt(&msg, bytes.NewReader(text), []byte(vectorPass), GPG); err != nil {
				b.Fatal(err)
			}
			return msg.Bytes()
		},
	} {
		b.Run(name, func(b *testing.B) {
			msg := message(b)
			b.SetBytes(int64(len(text)))
			for b.Loop() {
				if err := Decrypt(io.Discard, bytes.NewReader(msg), []byte(vectorPass), 1<<30); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// piped is what gpg makes of a content whose size it does not know.
func piped(t testing.TB, content []byte, args ...string) []byte {
	msg, _ := gpg(t, content, append([]string{"--symmetric", "--s2k-count", "65536"}, args...)...)
	return msg
}

func TestLiteralSize(t *testing.T) {
	for head, want := range map[string]int64{
		"\xac\x0bb\x01n1234abcd":            4,
		"\xad\x01\x00b\x00":                 250,
		"\xae\x00\x01\x00\x00b\x0a":         65520,
		"\xae\xff\xff\xff\xffb\x00":         1<<32 - 7,
		"\xcb\x06b\x00":                     0,
		"\xcb\xbfb\x00":                     185,
		"\xcb\xc0\x00b\x00":                 186,
		"\xcb\xdf\xffb\x00":                 8377,
		"\xcb\xff\x00\x01\x00\x00b\x00":     65530,
		"":                                  -1,
		"\xcb":                              -1,
		"\xcb\x05b\x00":                     -1, // shorter than its own header
		"\xcb\x10b\xff":                     -1,
		"\xcb\xe9b\x00 in parts":            -1,
		"\xaf\x00b\x00 up to the end":       -1,
		"\xae\x00\x01\x00":                  -1,
		"\xcb\xff\x00\x01\x00\x00b":         -1,
		"\xa8\x03PGP is a marker":           -1,
		"\xa3\x01 is compressed":            -1,
		"\x2c\x0bb\x00 is no packet header": -1,
	} {
		n, ok := literalSize(bufio.NewReader(strings.NewReader(head)))
		if ok != (want >= 0) || ok && n != want {
			t.Errorf("%q: %d, %v; want %d", head, n, ok, want)
		}
	}
}

// TestC22_OCB reads a packet that GnuPG 2.3 and later write with --force-ocb;
// the sample of draft-ietf-openpgp-rfc4880bis-10, appendix A.4.
func TestC22_OCB(t *testing.T) {
	var msg []byte
	for _, line := range []string{
		"c33d05070203089f0b7da3e5ea64779099e326e5400a90936cefb4e8eba08c6773716d1f2714540a38fcac529949dac529d3de31e15b4aeb729e330033dbed",
		"d4490107020e5ed2bc1e470abe8f1d644c7a6c8a567b0f7701196611a154ba9c2574cd056284a8ef68035c623d93cc708a43211bb6eaf2b27f7c18d571bcd83b20add3a08b73af15b9a098",
	} {
		var b []byte
		if _, err := fmt.Sscanf(line, "%x", &b); err != nil {
			t.Fatal(err)
		}
		msg = append(msg, b...)
	}
	got, err := decrypt(msg, "password", 100)
	if err != nil || string(got) != "Hello, world!\n" {
		t.Fatalf("%q, %v", got, err)
	}
	if _, err := decrypt(msg, "passwore", 100); err != ErrWrongPassphrase {
		t.Fatalf("wrong passphrase: %v", err)
	}
}

func TestC22_RoundTrip(t *testing.T) {
	page := os.Getpagesize()
	sizes := []int{0, 1, page - 1, page, page + 1, 128<<10 - 1, 128 << 10, 128<<10 + 1, 1 << 20}
	for _, p := range []Profile{GPG, RFC9580} {
		for _, size := range sizes {
			t.Run(fmt.Sprint(p, "/", size), func(t *testing.T) {
				t.Parallel()
				plain := random(size)
				var msg bytes.Buffer
				if err := Encrypt(&msg, bytes.NewReader(plain), []byte(vectorPass), p); err != nil {
					t.Fatal(err)
				}
				got, err := decrypt(msg.Bytes(), vectorPass, int64(size))
				if err != nil || !bytes.Equal(got, plain) {
					t.Fatalf("%d bytes, %v", len(got), err)
				}
				if size == 0 {
					return
				}
				got, err = decrypt(msg.Bytes(), vectorPass, int64(size)-1)
				if err != ErrTooLarge || len(got) >= size {
					t.Fatalf("one byte less allowed: %d bytes, %v", len(got), err)
				}
			})
		}
	}
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n)})
	r.Read(b)
	return b
}

// gpg runs the real one on input, with the passphrase.
func gpg(t testing.TB, in []byte, args ...string) ([]byte, string) {
	t.Helper()
	path, err := exec.LookPath("gpg")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("gpg is not installed")
		}
		t.Skip("SKIPPED: gpg is not installed: apt-get install gnupg")
	}
	home := t.TempDir()
	os.Chmod(home, 0o700)
	pass := filepath.Join(home, "pass")
	if err := os.WriteFile(pass, []byte(vectorPass), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, append([]string{"--homedir", home, "--batch", "--no-autostart", "--pinentry-mode", "loopback", "--passphrase-file", pass}, args...)...)
	var errs bytes.Buffer
	cmd.Stdin, cmd.Stderr = bytes.NewReader(in), &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("gpg %v: %v\n%s", args, err, errs.String())
	}
	return out, errs.String()
}

func TestC22_GPGReadsOurs(t *testing.T) {
	var msg bytes.Buffer
	if err := Encrypt(&msg, bytes.NewReader(sample(t)), []byte(vectorPass), GPG); err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(msg.Bytes(), []byte("-----BEGIN PGP MESSAGE-----\n")) {
		t.Fatalf("not armored: %.40q", msg.Bytes())
	}
	got, said := gpg(t, msg.Bytes(), "--decrypt")
	if !bytes.Equal(got, sample(t)) || strings.Contains(said, "WARNING") {
		t.Fatalf("%d bytes; %s", len(got), said)
	}
	// What the documentation promises of the default.
	list, _ := gpg(t, msg.Bytes(), "--list-packets")
	for _, want := range []string{"cipher 9,", "s2k 3, hash 10", "count 65011712", "mdc_method: 2"} {
		if !strings.Contains(string(list), want) {
			t.Errorf("gpg --list-packets lacks %q:\n%s", want, list)
		}
	}
}

func TestC22_WrongKey(t *testing.T) {
	for _, name := range []string{"gpg-default.gpg", "gpg-default.asc", "gpg-stream.gpg", "gpg-cipher-AES.gpg", "gpg-s2k-0.gpg", "sq.asc"} {
		got, err := decrypt(vector(t, name), "another passphrase", 1<<20)
		if err != ErrWrongPassphrase || len(got) != 0 {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	for _, p := range []Profile{GPG, RFC9580} {
		var msg bytes.Buffer
		if err := Encrypt(&msg, strings.NewReader("x"), []byte(vectorPass), p); err != nil {
			t.Fatal(err)
		}
		if got, err := decrypt(msg.Bytes(), vectorPass+" ", 10); err != ErrWrongPassphrase || len(got) != 0 {
			t.Errorf("%s: %d bytes, %v", p, len(got), err)
		}
	}
}

// TestC23_Truncated cuts messages at every place: an error always, though bytes
// have come out before it is known.
func TestC23_Truncated(t *testing.T) {
	plain := random(600)
	messages := map[string][]byte{
		"mdc":        quick(t, plain, nil),
		"aead":       quick(t, plain, &packet.Config{DefaultCipher: packet.CipherAES256, AEADConfig: &packet.AEADConfig{DefaultMode: packet.AEADModeOCB, ChunkSize: 64}}),
		"compressed": quick(t, plain, &packet.Config{DefaultCipher: packet.CipherAES256, DefaultCompressionAlgo: packet.CompressionZLIB}),
		"gpg":        vector(t, "gpg-compress-zip.gpg"),
		"gpg-stream": vector(t, "gpg-stream.gpg"),
	}
	for name, msg := range messages {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := decrypt(msg, vectorPass, 1<<20); err != nil {
				t.Fatal(err)
			}
			early := 0
			for n := range msg {
				got, err := decrypt(msg[:n], vectorPass, 1<<20)
				if err == nil {
					t.Fatalf("cut to %d of %d bytes: no error", n, len(msg))
				}
				if f, _ := FaultOf(err); !f.Known() {
					t.Fatalf("cut to %d: %v", n, err)
				}
				early = max(early, len(got))
			}
			if name == "mdc" && early == 0 {
				t.Error("nothing came out early: this test shows nothing about authentication")
			}
		})
	}
}

func TestC23_TruncatedArmor(t *testing.T) {
	msg := vector(t, "gpg-compress-none.asc")
	want := sample(t)
	end := bytes.LastIndex(msg, []byte("\n=")) // the checksum line
	for n := range msg {
		// The passphrase is stretched for each. What is special is near the end.
		if n < end-8 && n%7 != 0 {
			continue
		}
		got, err := decrypt(msg[:n], vectorPass, 1<<20)
		if err == nil && (n < end || !bytes.Equal(got, want)) {
			t.Fatalf("cut to %d of %d bytes: no error", n, len(msg))
		}
	}
}

// TestC23_EveryByteFlipped changes each byte of a small message in three ways.
func TestC23_EveryByteFlipped(t *testing.T) {
	for name, msg := range map[string][]byte{
		"mdc":  quick(t, []byte("password: hunter2\n"), nil),
		"aead": quick(t, []byte("password: hunter2\n"), &packet.Config{DefaultCipher: packet.CipherAES256, AEADConfig: &packet.AEADConfig{DefaultMode: packet.AEADModeOCB}}),
		"gpg":  vector(t, "gpg-cipher-AES256.gpg"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for i := range msg {
				for _, flip := range []byte{0x01, 0x80, 0xff} {
					changed := bytes.Clone(msg)
					changed[i] ^= flip
					// A flip may ask for the largest S2K count, once per byte of it.
					if _, err := decrypt(changed, vectorPass, 1<<20); err == nil {
						t.Fatalf("byte %d of %d flipped by %#x: no error", i, len(msg), flip)
					}
				}
			}
		})
	}
}

// TestC23_ArmorFlipped: what is changed in armor either shows or changes
// nothing.
func TestC23_ArmorFlipped(t *testing.T) {
	var armored bytes.Buffer
	if err := armorFor(&armored, quick(t, []byte("password: hunter2\n"), nil)); err != nil {
		t.Fatal(err)
	}
	msg := armored.Bytes()
	for i := range msg {
		changed := bytes.Clone(msg)
		changed[i] ^= 0x01
		if got, err := decrypt(changed, vectorPass, 1<<20); err == nil && string(got) != "password: hunter2\n" {
			t.Fatalf("byte %d flipped: %q", i, got)
		}
	}
}

func TestC22_NoMDC(t *testing.T) {
	msg := quick(t, []byte("x"), nil)
	// Without integrity the packet has tag 9, no version, and no trailer.
	msg[2+int(msg[1])] = 0xc9
	if got, err := decrypt(msg, vectorPass, 10); err != ErrNoIntegrity || len(got) != 0 {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
}

func TestC22_TrailingData(t *testing.T) {
	bin, asc := vector(t, "gpg-compress-none.gpg"), vector(t, "gpg-compress-none.asc")
	for name, msg := range map[string][]byte{
		"byte":           append(bytes.Clone(bin), 'x'),
		"zero":           append(bytes.Clone(bin), 0),
		"second message": append(bytes.Clone(bin), bin...),
		"armor text":     append(bytes.Clone(asc), "x"...),
		"second armor":   append(bytes.Clone(asc), asc...),
		"binary behind":  append(bytes.Clone(asc), bin...),
		"long line":      append(bytes.Clone(asc), bytes.Repeat([]byte("y"), 2<<20)...),
	} {
		if _, err := decrypt(msg, vectorPass, 1<<20); err != ErrTrailing {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, msg := range map[string][]byte{
		"blank lines": append(bytes.Clone(asc), "\n\n \t\r\n"...),
		"no newline":  bytes.TrimRight(asc, "\n"),
	} {
		if got, err := decrypt(msg, vectorPass, 1<<20); err != nil || !bytes.Equal(got, sample(t)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestC22_CompressionBomb(t *testing.T) {
	const max = 1 << 20
	for name, algo := range map[string]packet.CompressionAlgo{"zip": packet.CompressionZIP, "zlib": packet.CompressionZLIB} {
		var out bytes.Buffer
		config := &packet.Config{DefaultCipher: packet.CipherAES256, DefaultCompressionAlgo: algo, S2KConfig: &s2k.Config{S2KMode: 3, S2KCount: 65536},
			CompressionConfig: &packet.CompressionConfig{Level: flate.BestCompression}}
		w, err := openpgp.SymmetricallyEncrypt(&out, []byte(vectorPass), nil, config)
		if err != nil {
			t.Fatal(err)
		}
		zeros := make([]byte, 1<<20)
		for range 256 {
			if _, err := w.Write(zeros); err != nil {
				t.Fatal(err)
			}
		}
		w.Close()
		got, err := decrypt(out.Bytes(), vectorPass, max)
		if err != ErrTooLarge || len(got) > max {
			t.Errorf("%s of %d bytes: %d bytes, %v", name, out.Len(), len(got), err)
		}
	}
}

func TestC22_ArmorForms(t *testing.T) {
	asc := vector(t, "gpg-compress-none.asc")
	for name, msg := range map[string][]byte{
		"CRLF":         bytes.ReplaceAll(asc, []byte("\n"), []byte("\r\n")),
		"text before":  append([]byte("Dear all,\nhere it is:\n\n"), asc...),
		"header":       bytes.Replace(asc, []byte("\n\n"), []byte("\nComment: hello\nVersion: 1\n\n"), 1),
		"no checksum":  dropLine(asc, "="),
		"spaces after": bytes.ReplaceAll(asc, []byte("\n"), []byte(" \n")),
	} {
		got, err := decrypt(msg, vectorPass, 1<<20)
		if err != nil || !bytes.Equal(got, sample(t)) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

func dropLine(text []byte, prefix string) []byte {
	var out []byte
	for line := range bytes.Lines(text) {
		if !bytes.HasPrefix(line, []byte(prefix)) {
			out = append(out, line...)
		}
	}
	return out
}

func TestC22_NotOpenPGP(t *testing.T) {
	for name, msg := range map[string][]byte{
		"empty":       nil,
		"yaml":        sample(t),
		"zeros":       make([]byte, 1000),
		"elf":         append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 100)...),
		"gzip":        {0x1f, 0x8b, 8, 0, 0, 0, 0, 0},
		"other armor": []byte("-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nxsBNBA==\n-----END PGP PUBLIC KEY BLOCK-----\n"),
		"pem":         []byte("-----BEGIN RSA PRIVATE KEY-----\n\nAAAA\n-----END RSA PRIVATE KEY-----\n"),
	} {
		got, err := decrypt(msg, vectorPass, 1<<20)
		if !errors.Is(err, ErrNotOpenPGP) || len(got) != 0 {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

func TestC22_HostileWork(t *testing.T) {
	msg := quick(t, []byte("x"), nil)
	end := 2 + int(msg[1])
	key := msg[:end]
	many := append(bytes.Repeat(key, maxPassphrasePackets+1), msg[end:]...)
	if _, err := decrypt(many, vectorPass, 10); !errors.Is(err, ErrUnsupported) {
		t.Errorf("many passphrase packets: %v", err)
	}
	few := append(bytes.Repeat(key, 2), msg[end:]...)
	if got, err := decrypt(few, vectorPass, 10); err != nil || string(got) != "x" {
		t.Errorf("two passphrase packets: %q, %v", got, err)
	}
	// Argon2 with 2^31 KiB: version 6, its octet count, AES256, OCB, count, S2K 4.
	argon := append([]byte{0xc3, 60, 6, 38, 9, 2, 20, 4}, make([]byte, 16)...)
	argon = append(argon, 3, 4, 31)
	argon = append(argon, make([]byte, 60)...)
	if _, err := decrypt(argon, vectorPass, 10); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "2^31") {
		t.Errorf("much memory: %v", err)
	}
}

func TestC23_ReadError(t *testing.T) {
	msg := vector(t, "gpg-compress-none.gpg")
	broken := io.MultiReader(bytes.NewReader(msg[:500]), iotest.ErrReader(errors.New("input/output error")))
	if err := Decrypt(io.Discard, broken, []byte(vectorPass), 1<<20); err != ErrRead {
		t.Fatal(err)
	}
	if err := Decrypt(io.Discard, iotest.OneByteReader(bytes.NewReader(msg)), []byte(vectorPass), 1<<20); err != nil {
		t.Fatal(err)
	}
}

func TestWriteErrorIsTheCallers(t *testing.T) {
	full := errors.New("no space")
	err := Decrypt(writerFunc(func([]byte) (int, error) { return 0, full }), bytes.NewReader(vector(t, "gpg-compress-none.gpg")), []byte(vectorPass), 1<<20)
	if err != full {
		t.Fatal(err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestLooksLikeMessage(t *testing.T) {
	files, _ := os.ReadDir("testdata/vectors")
	for _, f := range files {
		b := vector(t, f.Name())
		want := true
		switch f.Name() {
		case "gpg-key.gpg", "gpg-signed-only.gpg", "gpg-stored.gpg":
			want = false
		}
		if got := LooksLikeMessage(b[:min(len(b), 4096)]); got != want {
			t.Errorf("%s: %v", f.Name(), got)
		}
	}
	for _, no := range []string{"", "user: x\n", "\x7fELF", "\x8c"} {
		if LooksLikeMessage([]byte(no)) {
			t.Errorf("%q looks like a message", no)
		}
	}
}

func TestFaultsHaveWords(t *testing.T) {
	for f := ErrNotOpenPGP; f <= lastFault; f++ {
		if f.Error() == "unknown fault" || !f.Known() {
			t.Errorf("fault %d has no words", f)
		}
	}
	if Fault(0).Known() || (lastFault + 1).Known() {
		t.Error("a fault is known that is none")
	}
}

// FuzzDecrypt: whatever comes in, it ends with content within the limit or with
// a known fault, and the same twice.
func FuzzDecrypt(f *testing.F) {
	files, _ := os.ReadDir("testdata/vectors")
	for _, file := range files {
		// These spend their time in S2K.
		if n := file.Name(); !strings.Contains(n, "default") && !strings.Contains(n, "sq.") && !strings.Contains(n, "old") {
			f.Add(vector(f, n))
		}
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		const max = 1 << 16
		// And so do counts that the fuzzer makes up: 0x60 is 65536.
		msg = bytes.Clone(msg)
		if body, ok := packetBody(msg, 3); ok && len(body) > 12 && body[0] == 4 && body[2] == 3 {
			body[12] = 0x60
		}
		got, err := decrypt(msg, vectorPass, max)
		if len(got) > max {
			t.Fatalf("%d bytes of at most %d", len(got), max)
		}
		if err != nil {
			if fault, _ := FaultOf(err); !fault.Known() {
				t.Fatalf("unknown error %v", err)
			}
		}
		again, err2 := decrypt(msg, vectorPass, max)
		if !bytes.Equal(got, again) || fmt.Sprint(err) != fmt.Sprint(err2) {
			t.Fatalf("%v, then %v", err, err2)
		}
	})
}

func armorFor(w io.Writer, msg []byte) error {
	text, err := armor.Encode(w, messageType, nil)
	if err != nil {
		return err
	}
	if _, err := text.Write(msg); err != nil {
		return err
	}
	return text.Close()
}
