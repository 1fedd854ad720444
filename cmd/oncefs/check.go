package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/alecthomas/kong"
	"github.com/docker/go-units"
	"golang.org/x/sys/unix"

	"oncefs/crypto"
	"oncefs/internal/decryptor"
	"oncefs/internal/sandbox"
)

type checkCmd struct {
	Files []string `arg:"" name:"file" help:"Encrypted files; - is standard input."`
	passphraseFlag
	Verify  bool `help:"Decrypt as well, to see whether the passphrase fits and the content is whole. Implied by --passphrase-file."`
	JSON    bool `name:"json" help:"One JSON document for all files."`
	MaxSize size `default:"${maxsize}" help:"The most that the content may hold, as for mount."`
}

// Help is shown below the options.
func (checkCmd) Help() string {
	return `Tells what a file is without its passphrase: nothing of that is authenticated until
it is verified. The content is never shown; of a bundle (NAME.tar.enc) the names,
sizes and modes are, once it is verified.

Exit status: 0 if every file can be served and is as strong as it should be; 93 if
one can be served and is weak (rekey makes it strong); else that of the first file
that cannot be served, as mount would end: see docs/exit-codes.md.

Examples:
  oncefs check *.enc
  oncefs check secrets.yaml.enc --passphrase-file pw
  oncefs check secrets.yaml.enc --json | jq '.files[0].weaknesses'`
}

func (c *checkCmd) Validate(*kong.Context) error {
	if c.PassphraseFile != "" {
		c.Verify = true
	}
	return nil
}

// checked is what check tells of one file, as JSON.
type checked struct {
	File        string          `json:"file"`
	Size        int64           `json:"size"`                // bytes of the encrypted file
	ServedAs    string          `json:"served_as,omitempty"` // the name, unless --name says otherwise
	Bundle      bool            `json:"bundle"`              // the files in it are served
	Armored     bool            `json:"armored"`
	Packets     []checkedPacket `json:"packets"`
	Cipher      string          `json:"cipher,omitempty"`
	Integrity   string          `json:"integrity,omitempty"`
	AEAD        string          `json:"aead,omitempty"`
	Passphrases []checkedPass   `json:"passphrases"`
	PublicKeys  int             `json:"public_keys"`
	Weaknesses  []string        `json:"weaknesses"`
	Verified    bool            `json:"verified"` // decrypted to its end and authentic
	Content     *int64          `json:"content_size,omitempty"`
	Files       []checkedFile   `json:"files,omitempty"` // of a bundle, once verified
	Error       string          `json:"error,omitempty"`
	Exit        int             `json:"exit"` // what check would end with for this file alone
	report      *crypto.Report
	err         error
}

type checkedFile struct {
	Name string `json:"name"`
	Mode string `json:"mode"` // as it is served, unless --mode says otherwise
	Size int64  `json:"size"`
}

type checkedPacket struct {
	Tag    uint8  `json:"tag"`
	Kind   string `json:"kind"`
	Length int64  `json:"length"`
}

type checkedPass struct {
	Cipher    string `json:"cipher"`
	AEAD      string `json:"aead,omitempty"`
	S2K       string `json:"s2k"`
	Digest    string `json:"digest,omitempty"`
	Count     int64  `json:"count,omitempty"` // bytes that are hashed
	Passes    uint8  `json:"passes,omitempty"`
	Lanes     uint8  `json:"lanes,omitempty"`
	MemoryKiB uint64 `json:"memory_kib,omitempty"`
}

func (c *checkCmd) Run(e *env) error {
	if err := sandbox.Hide(); err != nil {
		return err
	}
	var passphrase []byte
	if c.Verify {
		var err error
		if passphrase, err = readPassphrase(e, c.PassphraseFile, "passphrase", false); err != nil {
			return err
		}
		defer clear(passphrase)
	}
	all := []*checked{}
	status := 0
	for _, name := range c.Files {
		f := c.check(e, name, passphrase)
		all = append(all, f)
		if status == 0 || status == exitWeak && f.err != nil {
			status = f.Exit
		}
		if !c.JSON {
			f.print(e)
		}
	}
	if c.JSON {
		out := json.NewEncoder(e.out)
		out.SetIndent("", "  ")
		if err := out.Encode(map[string]any{"version": 1, "files": all}); err != nil {
			return err
		}
	}
	if status != 0 {
		return statusError(status)
	}
	return nil
}

func (c *checkCmd) check(e *env, name string, passphrase []byte) *checked {
	r := &checked{File: name, Packets: []checkedPacket{}, Passphrases: []checkedPass{}, Weaknesses: []string{}}
	r.err = c.look(e, r, passphrase)
	switch {
	case r.err != nil:
		r.Error, r.Exit = r.err.Error(), exitFor(r.err).code
	case len(r.Weaknesses) > 0:
		r.Exit = exitWeak
	}
	return r
}

func (c *checkCmd) look(e *env, r *checked, passphrase []byte) error {
	f := e.stdin
	if r.File != "-" {
		// Not waiting for the writer of a FIFO.
		var err error
		if f, err = os.OpenFile(r.File, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
			return notThere(err, r.File)
		}
		defer f.Close()
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s: is not a regular file", r.File)
	}
	r.Size = info.Size()
	if name, ok := servedName(info.Name()); ok {
		r.ServedAs = name
		r.Bundle = isBundle(name)
	}
	report, err := decryptor.Inspect(context.Background(), e.binary, f)
	r.tell(report)
	if err != nil {
		return err
	}
	if passphrase == nil {
		return nil
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	contents, err := contentsKnowing(context.Background(), e, "decrypting "+filepath.Base(r.File), decryptor.Message{File: f, Bundle: r.Bundle}, passphrase, c.MaxSize)
	if err != nil {
		return err
	}
	defer wipe(contents)
	var size int64
	for _, content := range contents {
		if content.Dir {
			continue
		}
		size += content.Bytes.Size()
		if r.Bundle {
			r.Files = append(r.Files, checkedFile{Name: content.Name, Mode: fmt.Sprintf("%04o", (*mode)(nil).of(content.Mode)), Size: content.Size})
		}
	}
	r.Verified, r.Content = true, &size
	return nil
}

// tell puts a report into words.
func (r *checked) tell(report *crypto.Report) {
	if report == nil {
		return
	}
	r.report = report
	r.Armored, r.PublicKeys = report.Armored, report.PublicKeys
	for _, p := range report.Packets {
		r.Packets = append(r.Packets, checkedPacket{Tag: p.Tag, Kind: p.Kind(), Length: p.Length})
	}
	for _, p := range report.Passphrases {
		pass := checkedPass{Cipher: p.Cipher.String(), S2K: p.S2K.String(), Count: p.Count, Passes: p.Passes, Lanes: p.Lanes}
		if p.AEAD != 0 {
			pass.AEAD = p.AEAD.String()
		}
		if p.S2K == crypto.Argon2 {
			pass.MemoryKiB = 1 << min(p.Exponent, 63)
		} else {
			pass.Digest = p.Digest.String()
		}
		r.Passphrases = append(r.Passphrases, pass)
		r.Cipher = pass.Cipher
	}
	if report.Cipher != 0 {
		r.Cipher = report.Cipher.String()
	}
	if len(report.Passphrases) > 0 {
		r.Integrity = report.Integrity.String()
		if report.AEAD != 0 {
			r.AEAD = report.AEAD.String()
		}
	}
	r.Weaknesses = append(r.Weaknesses, report.Weaknesses()...)
}

// print tells a person.
func (r *checked) print(e *env) {
	e.printf("%s\n", r.File)
	row := func(name, format string, a ...any) { e.printf("  %-11s %s\n", name, fmt.Sprintf(format, a...)) }
	if r.report != nil && len(r.Packets) > 0 {
		form := "binary"
		if r.Armored {
			form = "armored"
		}
		var kinds []string
		for _, p := range r.Packets {
			kinds = append(kinds, fmt.Sprintf("%s (%s)", p.Kind, units.BytesSize(float64(p.Length))))
		}
		row("message", "%s, %s; packets: %s", form, units.BytesSize(float64(r.Size)), strings.Join(kinds, ", "))
	}
	for _, p := range r.Passphrases {
		switch {
		case p.Digest == "":
			row("passphrase", "S2K %s, %d KiB of memory, %d passes, %d lanes", p.S2K, p.MemoryKiB, p.Passes, p.Lanes)
		case p.Count > 0:
			row("passphrase", "S2K %s, %s, count %d", p.S2K, p.Digest, p.Count)
		default:
			row("passphrase", "S2K %s, %s", p.S2K, p.Digest)
		}
	}
	if r.PublicKeys > 0 {
		row("keys", "%d public keys can open it too; they are not read here", r.PublicKeys)
	}
	if r.Cipher != "" {
		integrity := map[string]string{"none": "nothing shows a change", "MDC": "MDC shows any change"}[r.Integrity]
		if r.AEAD != "" {
			integrity = r.AEAD + " shows any change"
		}
		row("encryption", "%s; %s", r.Cipher, integrity)
	}
	switch {
	case r.err != nil:
		row("error", "%v", r.err)
	case len(r.Weaknesses) == 0:
		row("strength", "strong")
	}
	for _, w := range r.Weaknesses {
		row("weak", "%s", w)
	}
	if r.err == nil {
		if r.Bundle {
			row("served as", "a bundle: each file in %s once; their names are encrypted too", r.ServedAs)
		} else if r.ServedAs != "" {
			row("served as", "%s", r.ServedAs)
		} else {
			row("served as", "what --name says: its own name does not end in .enc, .gpg, .pgp or .asc")
		}
		if r.Verified {
			row("verified", "the passphrase fits, and the content is whole: %d bytes", *r.Content)
		}
		for _, f := range r.Files {
			row("file", "%s %s, %d bytes", f.Mode, f.Name, f.Size)
		}
	}
	hint := exitFor(r.err).hint(r.err)
	if r.err == nil {
		hint = ""
		if len(r.Weaknesses) > 0 {
			hint = "make it strong with: oncefs rekey " + r.File
		}
	}
	if hint != "" {
		row("hint", "%s", hint)
	}
}
