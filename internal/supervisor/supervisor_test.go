package supervisor

import (
	"fmt"
	"log/slog"
	"os"
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

// A signal that comes while the launcher becomes the command waits for that: the
// command may have told already that it runs.
func TestSignalsWaitForTheCommand(t *testing.T) {
	reap, err := newReaper()
	if err != nil {
		t.Fatal(err)
	}
	launcher, err := start("/bin/bash", func(control int) []string {
		return []string{"-c", fmt.Sprintf("read -r go <&%[1]d; trap 'exit 3' USR1; exec %[1]d<&-; sleep 1000 & wait", control)}
	}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer launcher.close()
	void, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer void.Close()
	lines := make(chan string, 1)
	lines <- fmt.Sprintf("signal %d", unix.SIGUSR1)
	s := &supervisor{Options: Options{Restart: Never, Tell: func(slog.Level, string, ...slog.Attr) {}},
		reap: reap, front: &link{f: void, lines: lines}, launcher: launcher, prepared: true, ready: true}
	late := time.AfterFunc(30*time.Second, func() { unix.Kill(launcher.pid, unix.SIGKILL) })
	defer late.Stop()
	if err := s.command(); err != nil {
		t.Fatal(err)
	}
	if got := code(launcher.status); got != 3 {
		t.Errorf("the command ended with %d, not by the signal", got)
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

// Who cannot say a line hangs up: who waits for it must not wait for ever.
func TestLinkHangsUp(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*link
	for i, fd := range fds {
		if ends[i], err = newLink(fd); err != nil {
			t.Fatal(err)
		}
		defer ends[i].close()
	}
	// Any failure will do.
	if err := ends[0].f.SetWriteDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := ends[0].say("go"); err == nil {
		t.Error("it said a line that it could not")
	}
	select {
	case line, ok := <-ends[1].lines:
		if ok {
			t.Errorf("heard %q", line)
		}
	case <-time.After(30 * time.Second):
		t.Error("the other end waits")
	}
	// What the other end says still arrives; and that it is gone is no error.
	if err := ends[1].say("late"); err != nil {
		t.Error(err)
	}
	if line := <-ends[0].lines; line != "late" {
		t.Errorf("heard %q", line)
	}
	ends[0].close()
	if err := ends[1].say("nobody there"); err != nil {
		t.Error(err)
	}
}
