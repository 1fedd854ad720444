package decryptor

import (
	"io"

	"golang.org/x/sys/unix"
)

// readFull fills b from the descriptor. It returns io.ErrUnexpectedEOF if the
// other end closed before.
func readFull(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Read(fd, b)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case n == 0:
			return io.ErrUnexpectedEOF
		}
		b = b[n:]
	}
	return nil
}
