package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"time"
)

// age decrypts with a key file, which takes no stretching, and with a
// passphrase through its batchpass plugin; sops uses the key file.
type age struct {
	*bench
	dir, key, recipient string
}

func newAge(b *bench, dir string) (*age, error) {
	a := &age{bench: b, dir: dir, key: filepath.Join(dir, "age.key")}
	keygen, err := look("age-keygen")
	if err != nil {
		return a, nil // each of its measurements will say so
	}
	if err := quietly(exec.Command(keygen, "-o", a.key)); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(a.key)
	if err != nil {
		return nil, err
	}
	a.recipient = regexp.MustCompile(`age1[0-9a-z]+`).FindString(string(text))
	if a.recipient == "" {
		return nil, errors.New("age-keygen wrote no recipient")
	}
	return a, nil
}

// once makes the encrypted file of a plaintext with a command that writes to
// its standard output, unless it is there.
func (a *age) once(out string, cmd *exec.Cmd) (err error) {
	if _, err := os.Stat(out); err == nil {
		return nil
	}
	f, err := os.OpenFile(out, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	cmd.Stdout = f
	if err := errors.Join(quietly(cmd), f.Close()); err != nil {
		os.Remove(out)
		return err
	}
	return nil
}

func (a *age) startKey(plain string, text []byte) (float64, error) {
	program, err := look("age")
	if err != nil {
		return 0, err
	}
	enc := fmt.Sprintf("%s/%d.age", a.dir, len(text))
	if err := a.once(enc, exec.Command(program, "-r", a.recipient, "-a", plain)); err != nil {
		return 0, err
	}
	return a.fromPipe(exec.Command(program, "-d", "-i", a.key, enc), text)
}

func (a *age) startPassphrase(plain string, text []byte) (float64, error) {
	program, err := look("age")
	if err != nil {
		return 0, err
	}
	if _, err := look("age-plugin-batchpass"); err != nil {
		return 0, err
	}
	enc := fmt.Sprintf("%s/%d.passphrase.age", a.dir, len(text))
	with := func(cmd *exec.Cmd) *exec.Cmd {
		cmd.Env = append(os.Environ(), "AGE_PASSPHRASE="+passphrase)
		return cmd
	}
	if err := a.once(enc, with(exec.Command(program, "-e", "-j", "batchpass", "-a", plain))); err != nil {
		return 0, err
	}
	return a.fromPipe(with(exec.Command(program, "-d", "-j", "batchpass", enc)), text)
}

func (a *age) sops(args ...string) (*exec.Cmd, error) {
	program, err := look("sops")
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "SOPS_AGE_KEY_FILE="+a.key)
	return cmd, nil
}

func (a *age) encryptSops(plain string, size int) (enc string, err error) {
	if size > 1<<20 {
		return "", errors.New("it builds a JSON tree of the file")
	}
	enc = fmt.Sprintf("%s/%d.sops.bin", a.dir, size)
	cmd, err := a.sops("--encrypt", "--age", a.recipient, "--input-type", "binary", "--output-type", "binary", plain)
	if err != nil {
		return "", err
	}
	return enc, a.once(enc, cmd)
}

// startSops reads the FIFO that exec-file gives its command the name of.
func (a *age) startSops(plain string, text []byte) (float64, error) {
	enc, err := a.encryptSops(plain, len(text))
	if err != nil {
		return 0, err
	}
	cmd, err := a.sops("exec-file", "--input-type", "binary", "--output-type", "binary", enc, "cat {}")
	if err != nil {
		return 0, err
	}
	return a.fromPipe(cmd, text)
}

// fifo is a FIFO with a writer that gives the content to whoever opens it, as
// sops does: one after another.
func feedFIFO(path string, text []byte) (stop func(), err error) {
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return
		}
		f.Write(text)
		f.Close()
	}()
	return func() {
		// A reader of our own lets the writer's open end.
		f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if err == nil {
			f.SetReadDeadline(time.Now().Add(time.Second))
			io.Copy(io.Discard, f)
			f.Close()
		}
		<-done
	}, nil
}
