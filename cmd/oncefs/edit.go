package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"

	"oncefs/crypto"
	"oncefs/internal/decryptor"
	"oncefs/internal/private"
	"oncefs/internal/sandbox"
	"oncefs/internal/secretmem"
)

type editCmd struct {
	File string `arg:"" help:"Encrypted file. If it does not exist you are asked whether to make it."`
	passphraseFlag
	MaxSize  size `default:"${maxsize}" help:"The most that the content may hold."`
	Writable bool `help:"Let the editor write elsewhere too. What it keeps of a file in the home directory (history, undo, copies) may then hold secrets."`
}

// Help is shown below the options.
func (editCmd) Help() string {
	return `The editor is $VISUAL, $EDITOR, editor or vi; the variable may hold arguments. It
gets the content as a file in memory that is never swapped, in a place that no
other program sees. Every other file is read-only for it, so that nothing of the
content gets to a disk; --writable lifts that.

When it ends, the file is encrypted with the same passphrase and algorithms,
decrypted again for comparison, and renamed into place. Unchanged content leaves
the file untouched. If the editor fails, or what it leaves is not valid YAML or
JSON (by the name: secrets.yaml.enc), you are asked whether to go on editing. If
somebody else has changed the file meanwhile, theirs stays, and yours is
encrypted to a file beside it.

An editor that hands the file to another process does not work: it must open the
file itself (not code, not emacsclient).

Examples:
  oncefs edit secrets.yaml.enc
  EDITOR='nano -l' oncefs edit secrets.yaml.enc --passphrase-file pw`
}

func (c *editCmd) Run(e *env) error {
	if isBundle(contentName(c.File)) {
		return &fs.PathError{Op: "edit", Path: c.File, Err: errEditBundle}
	}
	t, err := openTarget(c.File)
	if err != nil {
		return err
	}
	defer t.close()
	editor, err := findEditor()
	if err != nil {
		return err
	}
	if t.file == nil {
		if yes, asked := askYes(c.File + " does not exist. Make it?"); !asked || !yes {
			return fmt.Errorf("%s: %w", c.File, errNoEncrypted)
		}
	}
	// Before anything is secret: whether there can be a private place, and then
	// nobody may look in here.
	w, err := openWorkshop(e, editor, contentName(c.File), c.Writable, c.MaxSize)
	if err != nil {
		return err
	}
	defer w.close()
	if err := sandbox.Hide(); err != nil {
		return err
	}
	plain, passphrase, format, err := c.open(e, t)
	if err != nil {
		return err
	}
	defer plain.Wipe()
	defer clear(passphrase)

	edited, verdict, err := w.edit(plain, c.MaxSize)
	if err != nil {
		return err
	}
	defer edited.Wipe()
	switch {
	case verdict == givenUp:
		return fmt.Errorf("edit %s: %w", c.File, errGivenUp)
	case edited.Equal(plain) && (verdict == unasked || t.file == nil && plain.Size() == 0):
		return fmt.Errorf("edit %s: %w", c.File, errGivenUp)
	case edited.Equal(plain):
		e.printf("oncefs: %s: unchanged\n", c.File)
		return nil
	case verdict == unasked:
		err = errGivenUp
	default:
		err = t.replace(context.Background(), e, edited, passphrase, format)
	}
	if err == nil {
		e.printf("oncefs: %s: encrypted anew\n", c.File)
		return nil
	}
	err = fmt.Errorf("edit %s: %w", c.File, err)
	kept, keepErr := keepElsewhere(e, err, verdict == accepted, t, edited, passphrase, format)
	if keepErr != nil {
		return fmt.Errorf("%w; what was edited is lost: %w", err, keepErr)
	}
	return fmt.Errorf("%w; what was edited is encrypted in %s", err, kept)
}

// open decrypts the target, and says how to encrypt it again.
func (c *editCmd) open(e *env, t *target) (plain *secretmem.Buffer, passphrase []byte, format crypto.Format, err error) {
	if t.file == nil {
		store, err := secretmem.Open(false)
		if err != nil {
			return nil, nil, format, err
		}
		passphrase, err = readPassphrase(e, c.PassphraseFile, "passphrase for "+c.File, true)
		return store.NewBuffer(0), passphrase, crypto.Format{Profile: crypto.GPG}, err
	}
	report, err := inspectToReplace(e, t)
	if err != nil {
		return nil, nil, format, fmt.Errorf("edit %s: %w", c.File, err)
	}
	if passphrase, err = readPassphrase(e, c.PassphraseFile, "passphrase", false); err != nil {
		return nil, nil, format, err
	}
	plain, err = decryptKnowing(context.Background(), e, "decrypting "+filepath.Base(c.File), t.file, passphrase, c.MaxSize)
	return plain, passphrase, report.Format(), err
}

// inspectToReplace refuses a message that others can open in other ways: what is
// written in its place could not be opened by them.
func inspectToReplace(e *env, t *target) (*crypto.Report, error) {
	report, err := decryptor.Inspect(context.Background(), e.binary, t.file)
	if err != nil {
		return nil, err
	}
	if report.PublicKeys > 0 || len(report.Passphrases) != 1 {
		return nil, errSeveral
	}
	_, err = t.file.Seek(0, io.SeekStart)
	return report, err
}

// keepElsewhere encrypts what was edited to another file: where the person says
// if there is one to ask, or beside the target.
func keepElsewhere(e *env, why error, ask bool, t *target, edited *secretmem.Buffer, passphrase []byte, format crypto.Format) (string, error) {
	for first := true; ; first = false {
		name := t.name + ".edited"
		for n := 2; exists(name); n++ {
			name = fmt.Sprintf("%s.edited-%d", t.name, n)
		}
		if tty, err := decryptor.OpenTerminal(); ask && err == nil {
			if first {
				fmt.Fprintf(tty, "oncefs: %s\n", printable(why.Error()))
			}
			var answer string
			answer, ask = readLine(tty, fmt.Sprintf("oncefs: encrypt what you edited to which file? [%s] ", printable(name)))
			tty.Close()
			if answer != "" {
				name = answer
			}
		} else {
			ask = false
		}
		path, wrote := filepath.Abs(name)
		if wrote == nil {
			wrote = writeMessage(context.Background(), e, path, 0o600, edited, passphrase, format, func(*os.File) error {
				if exists(path) {
					return &fs.PathError{Op: "write", Path: name, Err: errExists}
				}
				return nil
			})
		}
		if wrote == nil {
			return name, nil
		}
		if !ask {
			return "", wrote
		}
		e.warn(wrote.Error(), "")
	}
}

func exists(name string) bool {
	_, err := os.Lstat(name)
	return !errors.Is(err, fs.ErrNotExist)
}

// contentName is the name of what an encrypted file holds.
func contentName(enc string) string {
	base := filepath.Base(enc)
	if name, ok := servedName(base); ok {
		return name
	}
	return base
}

// A workshop is a private place with an editor in it: a child process and the
// two pipes to it.
type workshop struct {
	*env
	cmd     *exec.Cmd
	in, out *os.File
}

// The child says first that its place is ready, and at the end how it went.
const (
	placeReady = 'r'
	accepted   = 'a' // the content follows
	unasked    = 'u' // not accepted, and nobody was there to ask; the content follows
	givenUp    = 'g' // the person gave it up; nothing follows
)

func openWorkshop(e *env, editor []string, name string, writable bool, max size) (_ *workshop, err error) {
	w := &workshop{env: e}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	theirIn, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer theirIn.Close()
	w.in = in
	out, theirOut, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer theirOut.Close()
	w.out = out
	// The child is killed when the thread that started it ends.
	runtime.LockOSThread()
	w.cmd, err = private.Start(func() *exec.Cmd {
		cmd := exec.Command(e.binary, append([]string{internalEdit, name, strconv.FormatBool(writable), strconv.FormatInt(int64(max), 10)}, editor...)...)
		cmd.Args[0] = "oncefs"
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.ExtraFiles = []*os.File{theirIn, theirOut}
		return cmd
	})
	if err != nil {
		return nil, err
	}
	theirOut.Close()
	var b [1]byte
	if _, err := io.ReadFull(w.out, b[:]); err != nil {
		return nil, w.died(err)
	}
	return w, nil
}

// died is how the child ended without a verdict, once something that takes both
// had failed. What went wrong there it has said.
func (w *workshop) died(err error) error {
	// One that waits for us ends by it.
	closeAll(w.in)
	closeAll(w.out)
	ended := w.cmd.Wait()
	gone := errors.Is(err, unix.EPIPE) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	if code := w.cmd.ProcessState.ExitCode(); gone && code > 0 {
		return statusError(code)
	}
	if gone && ended != nil {
		err = ended
	}
	return fmt.Errorf("%w: the private place was destroyed: %w", errGivenUp, err)
}

// edit has the content edited and returns what came of it. Signals that the
// terminal sends are for the editor; those that end a process are passed on to
// the child, which then hands over what there is.
func (w *workshop) edit(plain *secretmem.Buffer, max size) (edited *secretmem.Buffer, verdict byte, err error) {
	store, err := secretmem.Open(false) // while nothing is edited that could be lost
	if err != nil {
		return nil, 0, err
	}
	signals, done := make(chan os.Signal, 4), make(chan struct{})
	signal.Notify(signals, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGHUP)
	defer close(done)
	go func() {
		for {
			select {
			case s := <-signals:
				if s == unix.SIGTERM || s == unix.SIGHUP {
					w.cmd.Process.Signal(s)
				}
			case <-done:
				// Not given back: what follows, saving, is not to be cut short.
				return
			}
		}
	}()
	var head [9]byte
	binary.BigEndian.PutUint64(head[:], uint64(plain.Size()))
	if _, err := w.in.Write(head[:8]); err != nil {
		return nil, 0, w.died(err)
	}
	if err := plain.Copy(int(w.in.Fd())); err != nil {
		return nil, 0, w.died(err)
	}
	w.in.Close()
	if _, err := io.ReadFull(w.out, head[:]); err != nil {
		return nil, 0, w.died(err)
	}
	edited = store.NewBuffer(int64(max))
	if err := edited.Fill(int(w.out.Fd()), int64(binary.BigEndian.Uint64(head[1:]))); err != nil {
		edited.Wipe()
		return nil, 0, fmt.Errorf("take over what was edited, which is lost: %w", err)
	}
	return edited, head[0], nil
}

// close ends the child and with it everything in the private place.
func (w *workshop) close() {
	if w.cmd != nil && w.cmd.ProcessState == nil {
		w.cmd.Process.Kill()
		w.cmd.Wait()
	}
	for _, f := range []*os.File{w.in, w.out} {
		closeAll(f)
	}
}
