package decryptor

import (
	"bytes"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// maxPassphrase is what gpg reads at most as a passphrase's line.
const maxPassphrase = 4096

// FirstLine reads a passphrase as gpg --passphrase-file does: the first line,
// without its newline; a carriage return stays. The bytes live on the heap of
// the calling process, which should be one that ends soon.
func FirstLine(r io.Reader) ([]byte, error) {
	// Read byte by byte no further than the newline: a pipe's other lines may be
	// meant for somebody else.
	var line []byte
	var b [1]byte
	for {
		n, err := r.Read(b[:])
		if n == 1 {
			if b[0] == '\n' {
				break
			}
			if line = append(line, b[0]); len(line) > maxPassphrase {
				return nil, ErrTooLong
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, ErrUnread
		}
	}
	if len(line) == 0 {
		return nil, ErrEmpty
	}
	return line, nil
}

// Ask asks for a passphrase at the terminal, without echo; with confirm it asks
// twice. The bytes live on the heap, see FirstLine.
func Ask(tty *os.File, prompt string, confirm bool) ([]byte, error) {
	restore, err := hush(int(tty.Fd()))
	if err != nil {
		return nil, ErrUnread
	}
	defer restore()
	read := func(prompt string) ([]byte, error) {
		io.WriteString(tty, prompt)
		defer io.WriteString(tty, "\n")
		return FirstLine(tty)
	}
	first, err := read(prompt + ": ")
	if err != nil {
		return nil, err
	}
	if confirm {
		second, err := read(prompt + " again: ")
		if errors.Is(err, ErrUnread) {
			return nil, err
		}
		if !bytes.Equal(first, second) {
			return nil, ErrMismatch
		}
	}
	return first, nil
}

// hush turns the echo off, until the function that it returns turns it on again. It
// is off before the prompt is there, for who types as soon as it is; and nothing is
// set after that, so that a signal that gives the terminal back is the last to.
func hush(fd int) (restore func(), err error) {
	was, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, err
	}
	quiet := *was
	quiet.Iflag |= unix.ICRNL
	quiet.Lflag &^= unix.ECHO
	quiet.Lflag |= unix.ICANON | unix.ISIG
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &quiet); err != nil {
		return nil, err
	}
	return func() { unix.IoctlSetTermios(fd, unix.TCSETS, was) }, nil
}

// ErrNoTerminal says that there is nobody to ask.
var ErrNoTerminal = errors.New("no terminal to ask for the passphrase at")

// OpenTerminal opens the controlling terminal.
func OpenTerminal() (*os.File, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, ErrNoTerminal
	}
	return tty, nil
}

func askTerminal(tty *os.File) ([]byte, error) { return Ask(tty, "oncefs: passphrase", false) }
