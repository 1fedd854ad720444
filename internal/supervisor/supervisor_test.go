package supervisor

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestRestart_PausesAreAKubelets(t *testing.T) {
	pause := time.Duration(0)
	for i, c := range []struct{ ran, want time.Duration }{
		{0, 10 * time.Second}, {0, 20 * time.Second}, {time.Minute, 40 * time.Second}, {0, 80 * time.Second},
		{0, 160 * time.Second}, {0, 5 * time.Minute}, {9 * time.Minute, 5 * time.Minute},
		{10 * time.Minute, 10 * time.Second}, {0, 20 * time.Second},
	} {
		if pause = next(pause, 10*time.Second, c.ran); pause != c.want {
			t.Errorf("pause %d is %v, want %v", i, pause, c.want)
		}
	}
}

// What cannot be waited for is no link: its first read would fail, and look like the
// other end's death.
func TestLinkCanBeWaitedFor(t *testing.T) {
	fd, err := unix.Open(filepath.Join(t.TempDir(), "file"), unix.O_CREAT|unix.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newLink(fd); err == nil || !strings.Contains(err.Error(), "epoll") {
		t.Errorf("a file that epoll does not take: %v", err)
	}
}
