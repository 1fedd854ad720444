// Package metrics is how the serving process, which has no network, tells its
// counters to the program that shows them. That program is another binary,
// cmd/oncefs-metrics: what a server of HTTP and the Prometheus library take is a
// third of this program's size, and what talks to the network has no need of the
// rest of it. It knows nothing but the counters.
package metrics

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Program is the name of the program that shows the counters. It is looked for
// beside ours and nowhere else: what lies there was installed by who installed
// ours.
const Program = "oncefs-metrics"

// protocol is the first argument of the program, so that one of another version
// says so.
const protocol = "1"

// socketFD is the descriptor that it inherits: an end of a socket pair. It says
// once that it is set up, and is told all samples from then on, a line of JSON
// each time.
const socketFD = 3

// A Sample is what is known of one secret. The counters only ever grow.
type Sample struct {
	Mount      string `json:"mount"`  // where it is mounted
	Secret     string `json:"secret"` // the name that is served
	Left       int    `json:"left"`   // reads that are left
	Sealed     int64  `json:"sealed"`
	Claimed    int64  `json:"claimed"`
	GivenBack  int64  `json:"given_back"`
	Delivered  int64  `json:"delivered"`
	Expired    int64  `json:"expired"`
	Refused    int64  `json:"refused"`
	Late       int64  `json:"late"`
	Intrusions int64  `json:"intrusions"`
}

// startPatience is how long the program may take until it is set up, which is
// milliseconds: one that is not by then never will be.
const startPatience = 30 * time.Second

// ErrMissing says that the program is not installed.
var ErrMissing = errors.New(Program + " is not there")

// Metrics is the running program.
type Metrics struct {
	cmd    *exec.Cmd
	socket *os.File
	last   []byte        // that was told
	ended  chan struct{} // closed when the process is gone
}

// Start starts the program that lies in the directory. address is where it
// listens (TCP), or ""; file is the one that it keeps, or "". Both are known to
// be usable when it returns. The process's other descriptors, which may be a
// passphrase's, are not passed on to it, nor to any later child.
func Start(dir, address, file string) (*Metrics, error) {
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("close_range: %w", err)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	m := &Metrics{socket: os.NewFile(uintptr(fds[0]), "metrics"), ended: make(chan struct{})}
	theirs := os.NewFile(uintptr(fds[1]), "metrics' end")
	defer theirs.Close()
	m.cmd = exec.Command(filepath.Join(dir, Program), protocol, address, file)
	m.cmd.Args[0] = Program
	m.cmd.Env = []string{"GOMAXPROCS=1"}
	m.cmd.ExtraFiles = []*os.File{theirs}
	// A terminal's interrupt is for the serving process, whose end is ours.
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := m.cmd.Start(); err != nil {
		m.socket.Close()
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: %w", ErrMissing, err)
		}
		return nil, err
	}
	theirs.Close() // or its death could not be seen from ours
	go func() { m.cmd.Wait(); close(m.ended) }()
	var line []byte
	if err = m.socket.SetReadDeadline(time.Now().Add(startPatience)); err == nil {
		line, err = bufio.NewReader(m.socket).ReadBytes('\n')
	}
	var said setUp
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		m.cmd.Process.Kill()
		err = fmt.Errorf("%s was not set up within %v", Program, startPatience)
	case err != nil:
		err = errors.New(Program + " ended before it was set up")
	case json.Unmarshal(line, &said) != nil:
		err = errors.New(Program + " is of another version")
	case said.Error != "":
		err = errors.New(said.Error)
	}
	if err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// Tell passes the samples on if they are others than last time. It waits for the
// program to take them; one goroutine at a time may call it.
func (m *Metrics) Tell(samples []Sample) error {
	line, err := json.Marshal(samples)
	if err != nil || bytes.Equal(line, m.last) {
		return err
	}
	m.last = line
	_, err = m.socket.Write(append(line[:len(line):len(line)], '\n'))
	return err
}

// Ended is closed when the program has ended, by whatever.
func (m *Metrics) Ended() <-chan struct{} { return m.ended }

// Close ends the program, which first shows what it was told. One that hangs is
// left behind after a second.
func (m *Metrics) Close() error {
	m.socket.Close()
	select {
	case <-m.ended:
		return nil
	case <-time.After(time.Second):
		return errors.New(Program + " does not end")
	}
}

// setUp is what the program says once.
type setUp struct {
	Error string `json:"error"`
}

// A Source is the program's end.
type Source struct {
	socket *os.File
	lines  *bufio.Reader
}

// ErrStarted says that the program was not started as Start does.
var ErrStarted = errors.New("this program is started by oncefs mount and oncefs run, with --metrics or --metrics-textfile")

// Inherit is for the program: its source of samples, where it is to listen and
// the file that it is to keep.
func Inherit(args []string) (s *Source, address, file string, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(socketFD, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK || len(args) < 2 {
		return nil, "", "", ErrStarted
	}
	s = &Source{socket: os.NewFile(socketFD, "socket")}
	s.lines = bufio.NewReader(s.socket)
	if len(args) != 4 || args[1] != protocol {
		err := errors.New("oncefs and " + Program + " are of different versions")
		s.SetUp(err)
		return nil, "", "", err
	}
	return s, args[2], args[3], nil
}

// SetUp says that the program is ready, or why it is not.
func (s *Source) SetUp(err error) {
	var said setUp
	if err != nil {
		said.Error = err.Error()
	}
	if line, err := json.Marshal(said); err == nil {
		s.socket.Write(append(line, '\n'))
	}
}

// Next waits for the samples that follow. An error means that the serving process
// is gone.
func (s *Source) Next() (samples []Sample, err error) {
	line, err := s.lines.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &samples)
	}
	return samples, err
}
