package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"oncefs/internal/sandbox"
	"oncefs/internal/secretmem"
)

type decryptCmd struct {
	File   string `arg:"" help:"Encrypted file; - is standard input."`
	Output string `short:"o" placeholder:"OUT" help:"Write to a file of mode 0600, whole or not at all. Default: standard output."`
	passphraseFlag
	TTY     bool `name:"tty" help:"Write to a terminal all the same."`
	Force   bool `help:"Overwrite OUT."`
	MaxSize size `default:"${maxsize}" help:"The most that the content may hold."`
}

// Help is shown below the options.
func (decryptCmd) Help() string {
	return `Not one byte is written before the whole message was authenticated: of a damaged
or cut file nothing comes out. A terminal is refused, for it keeps what it shows:
in its scrollback, in a recording, on a shared screen.

Examples:
  oncefs decrypt secrets.yaml.enc | yq .database
  oncefs decrypt secrets.yaml.enc --tty
  oncefs decrypt certs.tar.enc | tar t`
}

func (c *decryptCmd) Run(e *env) error {
	if err := sandbox.Hide(); err != nil {
		return err
	}
	switch {
	case c.Output == "" && !c.TTY && term.IsTerminal(int(os.Stdout.Fd())):
		return errTerminal
	case c.Output != "":
		if err := c.mayWrite(); err != nil {
			return err
		}
	}
	f, err := openMessage(e, c.File)
	if err != nil {
		return err
	}
	defer f.Close()
	pass, err := openPassphrase(e, c.PassphraseFile)
	if err != nil {
		return err
	}
	defer pass.close()
	plain, err := decryptWith(e, f, pass, c.MaxSize)
	if err != nil {
		return err
	}
	defer plain.Wipe()
	if c.Output != "" {
		ctx, stop := untilSignal()
		defer stop()
		if err := writePlain(ctx, c.Output, plain); err != nil {
			return fmt.Errorf("decrypt %s to %s: %w", c.File, c.Output, err)
		}
		return nil
	}
	err = plain.Copy(int(os.Stdout.Fd()))
	if errors.Is(err, unix.EPIPE) {
		return statusError(exitOther) // who reads has had enough, and knows
	}
	if err != nil {
		return fmt.Errorf("write to standard output: %w", err)
	}
	return nil
}

// mayWrite refuses to replace a file without being told to, and anything else,
// such as a device, even so.
func (c *decryptCmd) mayWrite() error {
	info, err := os.Lstat(c.Output)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !c.Force {
		return &fs.PathError{Op: "write", Path: c.Output, Err: errExists}
	}
	if !info.Mode().IsRegular() {
		return &fs.PathError{Op: "write", Path: c.Output, Err: errNotRegular}
	}
	return nil
}

// writePlain makes the file whole or not at all: a signal, too, leaves nothing of
// it.
func writePlain(ctx context.Context, path string, plain *secretmem.Buffer) error {
	out, err := pendingFile(path, 0o600)
	if err != nil {
		return err
	}
	defer out.Cleanup()
	if err := plain.Copy(int(out.Fd())); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return errStopped
	}
	return out.CloseAtomicallyReplace()
}
