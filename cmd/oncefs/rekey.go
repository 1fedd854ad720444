package main

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/alecthomas/kong"

	"oncefs/crypto"
	"oncefs/internal/sandbox"
)

type rekeyCmd struct {
	File string `arg:"" help:"Encrypted file."`
	passphraseFlag
	NewPassphraseFile string `placeholder:"FILE" help:"File whose first line is the new passphrase; it is left alone. Default: you are asked twice."`
	SamePassphrase    bool   `xor:"new" help:"Keep the passphrase, and only encrypt anew: with the strongest S2K of the profile."`
	Profile           string `enum:"same,gpg,rfc9580" default:"same" help:"Algorithms: same, gpg or rfc9580, as for encrypt."`
	MaxSize           size   `default:"${maxsize}" help:"The most that the content may hold."`
}

// Help is shown below the options.
func (rekeyCmd) Help() string {
	return `The content is decrypted into memory, encrypted to a temporary file beside FILE,
decrypted again for comparison, synced and renamed into place, with FILE's mode,
owner, access control list and extended attributes. Whatever goes wrong on the way, FILE is as it was. Copies of the old file,
and its other names (hard links), still open with the old passphrase: if that is
known to others, change the secrets in it too.

Examples:
  oncefs rekey secrets.yaml.enc
  oncefs rekey secrets.yaml.enc --passphrase-file old --new-passphrase-file new
  oncefs rekey secrets.yaml.enc --same-passphrase --profile rfc9580`
}

func (c *rekeyCmd) Validate(*kong.Context) error {
	if c.SamePassphrase && c.NewPassphraseFile != "" {
		return fmt.Errorf("--same-passphrase and --new-passphrase-file exclude each other")
	}
	return nil
}

func (c *rekeyCmd) Run(e *env) error {
	if err := sandbox.Hide(); err != nil {
		return err
	}
	t, err := openTarget(c.File)
	if err != nil {
		return err
	}
	defer t.close()
	if t.file == nil {
		return fmt.Errorf("%s: %w", c.File, errNoEncrypted)
	}
	report, err := inspectToReplace(e, t)
	if err != nil {
		return fmt.Errorf("rekey %s: %w", c.File, err)
	}
	format := report.Format()
	if c.Profile != "same" {
		format = format.In(crypto.Profile(c.Profile))
	}
	passphrase, err := readPassphrase(e, c.PassphraseFile, "old passphrase", false)
	if err != nil {
		return err
	}
	defer clear(passphrase)
	plain, err := decryptKnowing(context.Background(), e, "decrypting "+filepath.Base(c.File), t.file, passphrase, c.MaxSize)
	if err != nil {
		return err
	}
	defer plain.Wipe()
	if !c.SamePassphrase {
		fresh, err := c.newPassphrase(e)
		if err != nil {
			return err
		}
		defer clear(fresh)
		passphrase = fresh
	}
	ctx, stop := untilSignal()
	defer stop()
	err = t.replace(ctx, e, plain, passphrase, format)
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("%w; the file is as it was", errStopped)
	}
	if err != nil {
		return fmt.Errorf("rekey %s: %w", c.File, err)
	}
	e.printf("oncefs: %s: encrypted anew\n", c.File)
	return nil
}

// newPassphrase never comes from the default file: that holds the old one.
func (c *rekeyCmd) newPassphrase(e *env) ([]byte, error) {
	if c.NewPassphraseFile != "" {
		return readPassphrase(e, c.NewPassphraseFile, "", false)
	}
	return askPassphrase("new passphrase for " + c.File)
}
