package fs

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"oncefs/internal/once"
)

// A reader who is not allowed hears EACCES, whatever the reason wraps: the
// reason is for the log.
func TestC12_NotAllowedIsEACCES(t *testing.T) {
	for _, why := range []error{errors.New("who it is"), unix.ENOENT, once.ErrSpent} {
		if got := errno(fmt.Errorf("open: %w", &errNotAllowed{why})); got != unix.EACCES {
			t.Errorf("%v becomes %v", why, got)
		}
	}
}
