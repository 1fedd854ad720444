package main

import (
	"bufio"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"

	"oncefs/internal/sandbox"
)

// A herald holds open what announcing takes, for once enclosed the process can
// open nothing.
type herald struct {
	systemd net.Conn // nil where systemd does not wait
	null    *os.File // nil where the session is not left
}

func (m *mounting) openHerald() (*herald, error) {
	h := &herald{}
	// sd_notify(3): a datagram to the socket that $NOTIFY_SOCKET names.
	if socket := os.Getenv("NOTIFY_SOCKET"); socket != "" {
		conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
		if err != nil {
			return nil, fmt.Errorf("notify systemd: %w", err)
		}
		h.systemd = conn
	}
	if m.detach {
		null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			h.close()
			return nil, err
		}
		h.null = null
	}
	return h, nil
}

func (h *herald) close() {
	if h.systemd != nil {
		h.systemd.Close()
	}
	if h.null != nil {
		h.null.Close()
	}
}

// settled is when memory that only the start took is given back: once, so that
// nothing wakes the process later, and when a first reader has most likely come.
const settled = time.Second

// announce tells everyone who waits that the mount is ready. From here on
// nothing can go back: what fails is told and left.
func (m *mounting) announce(h *herald) {
	time.AfterFunc(settled, sandbox.GiveBack)
	m.mu.Lock()
	m.readyAt = time.Now()
	m.mu.Unlock()
	var total int64
	for _, s := range m.secrets {
		total += s.once.Size()
	}
	m.events.tell(slog.LevelInfo, "ready", slog.String("path", m.point.Path), slog.Int("files", len(m.secrets)),
		slog.Int64("bytes", total), slog.String("memory", string(m.store.Kind())), slog.Any("sandbox", m.layers), slog.Int("reads", m.Reads))
	if !m.quiet {
		m.printf("oncefs: ready: %s\n", m.readyLine(total))
	}
	if h.null != nil {
		if err := h.detach(m.LogFile != ""); err != nil {
			m.events.tell(slog.LevelWarn, "detach", slog.String("error", err.Error()))
		}
	}
	if h.systemd != nil {
		if _, err := h.systemd.Write([]byte("READY=1")); err != nil {
			m.events.tell(slog.LevelWarn, "systemd-notification", slog.String("error", err.Error()))
		}
	}
	if m.NotifyFD >= 0 {
		f := os.NewFile(uintptr(m.NotifyFD), "notification descriptor")
		if _, err := f.WriteString("\n"); err != nil {
			m.events.tell(slog.LevelWarn, "notification-descriptor", slog.String("error", err.Error()))
		}
		f.Close()
	}
	if m.ready != nil {
		m.ready(m)
	}
}

func (m *mounting) readyLine(total int64) string {
	what := m.secrets[0].path
	if len(m.secrets) > 1 {
		what = fmt.Sprintf("%d files in %s", len(m.secrets), m.point.Path)
	}
	often := "once"
	if m.Reads > 1 {
		often = fmt.Sprintf("%d times", m.Reads)
	}
	return fmt.Sprintf("%s (%s) can be read %s", what, units.BytesSize(float64(total)), often)
}

// detach leaves the terminal's session and gives up standard input and output,
// for whoever reads them waits for their end. Standard error stays where the
// events go there.
func (h *herald) detach(withError bool) error {
	if _, err := unix.Setsid(); err != nil {
		return fmt.Errorf("setsid: %w", err)
	}
	last := 1
	if withError {
		last = 2
	}
	for fd := 0; fd <= last; fd++ {
		if err := unix.Dup3(int(h.null.Fd()), fd, 0); err != nil {
			return fmt.Errorf("dup3: %w", err)
		}
	}
	return nil
}

// endPatience is how long a process in the background that did not become ready
// may take to take everything down again.
const endPatience = 20 * time.Second

// background starts this command again as a process that detaches when it is
// ready, and returns then, or with its exit status if it fails before.
func (m *mountCmd) background(e *env) error {
	ours, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ours.Close()
	var extra []*os.File
	// A passphrase on a descriptor keeps its number in the child.
	if n, found := strings.CutPrefix(m.PassphraseFile, "/dev/fd/"); found {
		if fd, err := strconv.Atoi(n); err == nil && fd >= 3 {
			extra = make([]*os.File, fd-3+1)
			extra[fd-3] = os.NewFile(uintptr(fd), m.PassphraseFile)
		}
	}
	extra = append(extra, theirs)
	args := []string{"--detach", "--notify-fd=" + strconv.Itoa(3+len(extra)-1)}
	for _, a := range e.args[1:] {
		if path.Base(a) == a && (a == "--background" || strings.HasPrefix(a, "--background=")) {
			continue
		}
		args = append(args, a)
	}
	// The command comes first, then what was added.
	args = append([]string{args[2]}, append(args[:2:2], args[3:]...)...)
	cmd := exec.Command(e.binary, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = e.stdin, os.Stdout, os.Stderr, extra
	// What a terminal sends, both get; the one that decrypts gives the terminal back
	// as it was, and this one waits for that.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() {
		for s := range signals {
			if s == unix.SIGTERM {
				cmd.Process.Signal(s)
			}
		}
	}()
	theirs.Close()
	if _, err := bufio.NewReader(ours).ReadByte(); err == nil {
		return nil
	}
	waited := make(chan error, 1)
	go func() { waited <- cmd.Wait() }()
	select {
	case err = <-waited:
	case <-time.After(endPatience):
		// It goes on, so it is ready and could not say so.
		return fmt.Errorf("the process in the background (%d) did not say that it is ready; see oncefs status", cmd.Process.Pid)
	}
	if exit, ok := err.(*exec.ExitError); ok && exit.Exited() {
		return statusError(exit.ExitCode()) // it has said why
	}
	return fmt.Errorf("the process in the background ended before it was ready: %w", err)
}
