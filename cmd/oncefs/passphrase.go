package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"oncefs/internal/decryptor"
	"oncefs/internal/erase"
	"oncefs/internal/secretmem"
)

// passphraseFlag is the option of every command that leaves the passphrase file
// alone.
type passphraseFlag struct {
	PassphraseFile string `placeholder:"FILE" help:"File whose first line is the passphrase; it is left alone. /dev/fd/N and pipes work. Default: ${passphrase} if it exists, else you are asked."`
}

// A source of a passphrase is a file, or the terminal.
type source struct {
	file *erase.File // nil where the terminal is asked
	tty  *os.File
	name string
}

// openPassphrase opens the file, or the terminal where there is no file.
func openPassphrase(e *env, path string) (*source, error) {
	if path == "" {
		path = defaultPassphraseFile
		if _, err := os.Stat(path); err != nil {
			tty, err := decryptor.OpenTerminal()
			if err != nil {
				return nil, fmt.Errorf("%w (%s does not exist)", errNoPassphrase, path)
			}
			return &source{tty: tty}, nil
		}
	}
	f, err := erase.Open(path, false)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errPassphraseFile, err)
	}
	if f.Exposed {
		e.warn(path+" can be read by others", "chmod 600 "+path)
	}
	return &source{file: f, name: path}, nil
}

func (s *source) close() {
	if s.file != nil {
		s.file.Close()
	}
	if s.tty != nil {
		s.tty.Close()
	}
}

// read reads the passphrase into this process; with confirm a person types it
// twice.
func (s *source) read(prompt string, confirm bool) ([]byte, error) {
	if s.tty != nil {
		defer keepTerminal(s.tty)()
		return decryptor.Ask(s.tty, "oncefs: "+printable(prompt), confirm)
	}
	p, err := decryptor.FirstLine(s.file.File())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	return p, nil
}

// keepTerminal sees to it that a terminal that is asked without echo is given
// back as it was, also where a signal ends us. The function it returns ends
// that.
func keepTerminal(tty *os.File) (release func()) {
	fd := int(tty.Fd())
	state, err := term.GetState(fd)
	if err != nil {
		return func() {}
	}
	signals, done := make(chan os.Signal, 1), make(chan struct{})
	for _, s := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT} {
		if !signal.Ignored(s) { // one that is (nohup) ends nobody
			signal.Notify(signals, s)
		}
	}
	go func() {
		select {
		case <-done:
		case s := <-signals:
			term.Restore(fd, state)
			io.WriteString(tty, "\n")
			signal.Reset()
			unix.Kill(os.Getpid(), s.(unix.Signal))
		}
	}()
	return func() {
		signal.Stop(signals)
		close(done)
		term.Restore(fd, state)
	}
}

// readPassphrase opens, reads and closes.
func readPassphrase(e *env, path, prompt string, confirm bool) ([]byte, error) {
	s, err := openPassphrase(e, path)
	if err != nil {
		return nil, err
	}
	defer s.close()
	return s.read(prompt, confirm)
}

// askPassphrase asks for a new one, twice; no file stands in for the terminal.
func askPassphrase(prompt string) ([]byte, error) {
	tty, err := decryptor.OpenTerminal()
	if err != nil {
		return nil, errNoNew
	}
	s := &source{tty: tty}
	defer s.close()
	return s.read(prompt, true)
}

// decryptWith decrypts one open file in a child of its own. The passphrase is
// read there, and what comes back is authenticated to its end.
func decryptWith(e *env, f *os.File, s *source, max size) (*secretmem.Buffer, error) {
	pass := decryptor.Passphrase{File: s.tty, Terminal: true}
	if s.file != nil {
		pass = decryptor.Passphrase{File: s.file.File()}
	} else {
		defer keepTerminal(s.tty)()
	}
	contents, err := decryptChild(context.Background(), e, "decrypting "+filepath.Base(f.Name()), decryptor.Message{File: f}, pass, max)
	if err != nil {
		return nil, err
	}
	return contents[0].Bytes, nil
}

// decryptKnowing is decryptWith where the passphrase is known here already. what is
// how a person is told of it.
func decryptKnowing(ctx context.Context, e *env, what string, f *os.File, passphrase []byte, max size) (*secretmem.Buffer, error) {
	contents, err := contentsKnowing(ctx, e, what, decryptor.Message{File: f}, passphrase, max)
	if err != nil {
		return nil, err
	}
	return contents[0].Bytes, nil
}

// contentsKnowing is decryptKnowing for a message that may be a bundle.
func contentsKnowing(ctx context.Context, e *env, what string, m decryptor.Message, passphrase []byte, max size) ([]decryptor.Content, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	// A passphrase is shorter than a pipe holds: this cannot wait.
	line := append(append(make([]byte, 0, len(passphrase)+1), passphrase...), '\n')
	_, err = w.Write(line)
	clear(line)
	if err = errors.Join(err, w.Close()); err != nil {
		return nil, err
	}
	return decryptChild(ctx, e, what, m, decryptor.Passphrase{File: r}, max)
}

func decryptChild(ctx context.Context, e *env, what string, m decryptor.Message, pass decryptor.Passphrase, max size) ([]decryptor.Content, error) {
	store, err := secretmem.Open(false)
	if err != nil {
		return nil, err
	}
	files := []*os.File{m.File}
	stop := e.progress(what, sizes(files), readSoFar(files))
	all, err := decryptor.Decrypt(ctx, e.binary, []decryptor.Message{m}, pass, int64(max), store)
	stop()
	var file *decryptor.FileError
	if errors.As(err, &file) {
		err = file.Err
	}
	if err != nil {
		return nil, fmt.Errorf("decrypt %s: %w", m.File.Name(), err)
	}
	return all[0], nil
}

// wipe zeroes what is not wanted any more.
func wipe(contents []decryptor.Content) {
	for _, c := range contents {
		if c.Bytes != nil {
			_ = c.Bytes.Wipe() // it holds zeros in any case
		}
	}
}

// openMessage opens an encrypted file; - is standard input.
func openMessage(e *env, name string) (*os.File, error) {
	if name == "-" {
		return e.stdin, nil
	}
	f, err := os.Open(name)
	return f, notThere(err, name)
}
