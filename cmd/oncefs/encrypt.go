package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"

	"github.com/alecthomas/kong"

	"oncefs/crypto"
	"oncefs/internal/bundle"
	"oncefs/internal/erase"
	"oncefs/internal/sandbox"
)

type encryptCmd struct {
	File            string `arg:"" help:"File to encrypt, or a directory to make a bundle of; - is standard input."`
	Output          string `short:"o" placeholder:"OUT" help:"Where to write; - is standard output. Default: FILE.enc, DIR.tar.enc, or standard output for standard input."`
	Profile         string `enum:"gpg,rfc9580" default:"gpg" help:"Algorithms: gpg (AES-256, MDC, iterated SHA-512; every gpg reads it) or rfc9580 (AES-256 OCB, Argon2id; no gpg does)."`
	PassphraseFile  string `placeholder:"FILE" help:"File whose first line is the passphrase; it is left alone. Default: ${passphrase} if it exists, else you are asked twice."`
	RemovePlaintext bool   `help:"Once the output is on the disk and was decrypted again for comparison, overwrite and remove FILE."`
	Force           bool   `help:"Overwrite OUT even if it is not an OpenPGP message."`
}

// Help is shown below the options.
func (encryptCmd) Help() string {
	return `OUT is written to a temporary file beside it, synced, and renamed into place: it
is never half a message. What gpg can do with it: gpg -d OUT.

Of a directory a bundle is made, a tar archive of its files and directories with
their modes and times; mounted, each file in it is served once on its own. Anything
else in it (a symbolic link, a FIFO) is an error that names it, and so is a file that
changes meanwhile. To unpack it: oncefs decrypt OUT | tar x, or gpg -d OUT | tar x.

Examples:
  oncefs encrypt secrets.yaml
  oncefs encrypt certs/
  oncefs encrypt secrets.yaml --remove-plaintext
  make-config | oncefs encrypt - -o secrets.yaml.enc --passphrase-file pw`
}

func (c *encryptCmd) Validate(*kong.Context) error {
	if c.RemovePlaintext && (c.File == "-" || c.Output == "-") {
		return errors.New("--remove-plaintext needs a file to remove and a file to compare with")
	}
	return nil
}

func (c *encryptCmd) Run(e *env) error {
	if err := sandbox.Hide(); err != nil {
		return err
	}
	isDir := false
	if info, err := os.Stat(c.File); err == nil && c.File != "-" {
		isDir = info.IsDir()
	}
	if isDir {
		if err := c.prepareBundle(); err != nil {
			return err
		}
	}
	if c.Output == "" {
		c.Output = c.File
		if c.File != "-" {
			c.Output += ".enc"
		}
	}
	if c.Output != "-" {
		if err := c.mayWrite(); err != nil {
			return err
		}
	}
	var in io.Reader = e.stdin
	var plain *erase.File
	if isDir {
		archive := pack(c.File)
		defer archive.Close()
		in = archive
	} else if c.File != "-" {
		var err error
		if plain, err = erase.Open(c.File, c.RemovePlaintext); err != nil {
			return err
		}
		defer plain.Close()
		in = plain.File()
	}
	passphrase, err := readPassphrase(e, c.PassphraseFile, "passphrase for "+c.Output, true)
	if err != nil {
		return err
	}
	defer clear(passphrase)
	if c.Output == "-" {
		out := bufio.NewWriter(os.Stdout)
		read, stop := c.progress(e, in)
		err := crypto.Encrypt(out, read, passphrase, crypto.Profile(c.Profile))
		stop()
		if err != nil {
			return fmt.Errorf("encrypt %s: %w", c.File, err)
		}
		return out.Flush()
	}
	ctx, stop := untilSignal()
	defer stop()
	sum, err := c.write(ctx, e, in, passphrase)
	if err != nil {
		return fmt.Errorf("encrypt %s to %s: %w", c.File, c.Output, err)
	}
	if !c.RemovePlaintext {
		return nil
	}
	err = c.compare(e, passphrase, sum)
	if err == nil && ctx.Err() != nil {
		err = errStopped
	}
	if err != nil {
		return fmt.Errorf("decrypt %s for comparison: %w (%s was left as it is)", c.Output, err, c.File)
	}
	return plain.Remove()
}

// prepareBundle looks whether what a directory is encrypted to will be mounted as
// a bundle, and names it where it has no name.
func (c *encryptCmd) prepareBundle() error {
	if c.RemovePlaintext {
		return fmt.Errorf("%w: --remove-plaintext removes a file, and %s is a directory; remove it yourself when the bundle is as you want it", errNotFit, c.File)
	}
	dir := filepath.Clean(c.File)
	switch base := filepath.Base(dir); {
	case c.Output == "-":
		return nil
	case c.Output == "" && (base == "." || base == ".." || base == "/"):
		return fmt.Errorf("%w: say with -o where to write the bundle of %s", errNotFit, c.File)
	case c.Output == "":
		c.Output = dir + ".tar.enc"
	}
	if name, ok := servedName(filepath.Base(c.Output)); !ok || !isBundle(name) {
		return fmt.Errorf("%w: %s does not end in .tar.enc, .tar.gpg, .tar.pgp or .tar.asc, by which mount knows a bundle", errNotFit, c.Output)
	}
	inside, err := within(dir, c.Output)
	if err == nil && inside {
		err = fmt.Errorf("%w: %s is in %s, and would be in the bundle", errNotFit, c.Output, c.File)
	}
	return err
}

// within tells whether a path, which need not exist, is in a directory or below.
func within(dir, name string) (bool, error) {
	var real [2]string
	for i, path := range []string{dir, filepath.Dir(name)} {
		path, err := filepath.EvalSymlinks(path)
		if err == nil {
			real[i], err = filepath.Abs(path)
		}
		if err != nil {
			return false, err
		}
	}
	rel, err := filepath.Rel(real[0], real[1])
	return err == nil && filepath.IsLocal(rel), err
}

// pack reads a directory as the archive that a bundle is. Its error is that of the
// last Read.
func pack(dir string) *io.PipeReader {
	r, w := io.Pipe()
	go func() { w.CloseWithError(bundle.Write(w, dir)) }()
	return r
}

// mayWrite refuses to destroy what is not an encrypted file.
func (c *encryptCmd) mayWrite() error {
	info, err := os.Stat(c.Output)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return &fs.PathError{Op: "write", Path: c.Output, Err: errNotRegular}
	}
	if in, err := os.Stat(c.File); err == nil && os.SameFile(in, info) {
		return &fs.PathError{Op: "write", Path: c.Output, Err: errors.New("is the file to encrypt")}
	}
	if c.Force || info.Size() == 0 {
		return nil
	}
	f, err := os.Open(c.Output)
	if err != nil {
		return err
	}
	defer f.Close()
	head := make([]byte, 4096)
	n, err := io.ReadFull(f, head)
	if err != nil && err != io.ErrUnexpectedEOF {
		return err
	}
	if !crypto.LooksLikeMessage(head[:n]) {
		return &fs.PathError{Op: "write", Path: c.Output, Err: errOutput}
	}
	return nil
}

// write makes the output whole or not at all, and returns the plaintext's sum. A
// signal, too, leaves nothing of it.
func (c *encryptCmd) write(ctx context.Context, e *env, in io.Reader, passphrase []byte) (hash.Hash, error) {
	path := c.Output
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real // replace the file, not the link to it
	}
	mode := os.FileMode(0o600)
	if info, err := os.Stat(path); err == nil {
		mode = info.Mode().Perm()
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	out, err := pendingFile(path, mode)
	if err != nil {
		return nil, err
	}
	defer out.Cleanup()
	sum := sha256.New()
	buf := bufio.NewWriter(out)
	read, stop := c.progress(e, in)
	defer stop()
	encrypted := make(chan error, 1)
	go func() {
		encrypted <- crypto.Encrypt(buf, io.TeeReader(read, sum), passphrase, crypto.Profile(c.Profile))
	}()
	select {
	case err = <-encrypted:
	case <-ctx.Done(): // who writes to us may never end
	}
	if ctx.Err() != nil {
		return nil, errStopped
	}
	if err != nil {
		return nil, err
	}
	if err := buf.Flush(); err != nil {
		return nil, err
	}
	if err := out.CloseAtomicallyReplace(); err != nil {
		return nil, err
	}
	// The rename is on the disk only when its directory is.
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return sum, dir.Sync()
}

// progress shows how much of the plaintext was read.
func (c *encryptCmd) progress(e *env, in io.Reader) (_ io.Reader, stop func()) {
	read := &counted{Reader: in}
	var total int64
	if f, ok := in.(*os.File); ok {
		total = sizes([]*os.File{f})
	}
	return read, e.progress("encrypting "+filepath.Base(c.File), total, read.n.Load)
}

// compare reads the output back and decrypts it: a plaintext is only ever
// removed when there is something that gives it back.
func (c *encryptCmd) compare(e *env, passphrase []byte, want hash.Hash) error {
	f, err := os.Open(c.Output)
	if err != nil {
		return err
	}
	defer f.Close()
	files := []*os.File{f}
	defer e.progress("comparing "+filepath.Base(c.Output), sizes(files), readSoFar(files))()
	got := sha256.New()
	if err := crypto.Decrypt(got, f, passphrase, math.MaxInt64); err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(got.Sum(nil), want.Sum(nil)) != 1 {
		return errors.New("it holds something else")
	}
	return nil
}
