package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"oncefs/internal/metrics"
	"oncefs/internal/mountpoint"
)

type installCmd struct {
	Dir string `arg:"" help:"Directory to copy it into."`
}

// Help is shown below the options.
func (installCmd) Help() string {
	return `For containers: an image with nothing but oncefs in it has no cp, and the image
of a program need not have oncefs. The link fusermount3 beside it is its own mount
helper, for containers whose root filesystem cannot be written to. oncefs-metrics goes
along if it lies beside oncefs, as in the image for --metrics.

Examples:
  oncefs install /shared`
}

// Run puts each program there whole or not at all: another container may be
// about to start it.
func (c *installCmd) Run(e *env) error {
	// It is looked for beside oncefs, so it goes along where it is there.
	err := c.put(filepath.Join(filepath.Dir(e.binary), metrics.Program), metrics.Program)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := c.put(e.binary, "oncefs"); err != nil {
		return err
	}
	return renameio.Symlink("oncefs", filepath.Join(c.Dir, mountpoint.HelperName))
}

// put copies a program into the directory under that name.
func (c *installCmd) put(program, name string) error {
	in, err := os.Open(program)
	if err != nil {
		return err
	}
	defer in.Close()
	path := filepath.Join(c.Dir, name)
	out, err := renameio.NewPendingFile(path, renameio.WithPermissions(0o755), renameio.IgnoreUmask(), renameio.WithTempDir(c.Dir))
	if err != nil {
		return err
	}
	defer out.Cleanup()
	if _, err := io.Copy(out, in); err != nil {
		return fmt.Errorf("copy %s to %s: %w", program, path, err)
	}
	return out.CloseAtomicallyReplace()
}

type copyCmd struct {
	From string `arg:"" help:"The passphrase file, on a volume that cannot be written to."`
	To   string `arg:"" help:"Its copy, which mount can remove: on a memory volume."`
}

// Help is shown below the options.
func (copyCmd) Help() string {
	return `A Kubernetes Secret is mounted read-only, and mount refuses a passphrase file that
it cannot remove. So an init container copies it to an emptyDir in memory, which the
Secret's own volume need not be shared with. The copy has mode 0600, and is there
whole or not at all.

Examples:
  oncefs copy /secret/passphrase /etc/init-secrets/secretfile_pw`
}

// Run lets the kernel copy, so that the passphrase is in no memory of ours.
func (c *copyCmd) Run(*env) error {
	in, err := os.Open(c.From)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return &fs.PathError{Op: "copy", Path: c.From, Err: mountpoint.ErrKind}
	}
	out, err := renameio.NewPendingFile(c.To, renameio.WithPermissions(0o600), renameio.IgnoreUmask(), renameio.WithTempDir(filepath.Dir(c.To)))
	if err != nil {
		return err
	}
	defer out.Cleanup()
	for left := info.Size(); left > 0; {
		n, err := unix.Sendfile(int(out.Fd()), int(in.Fd()), nil, int(min(left, 1<<30)))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return fmt.Errorf("copy %s to %s: %w", c.From, c.To, err)
		}
		left -= int64(n)
	}
	return out.CloseAtomicallyReplace()
}
