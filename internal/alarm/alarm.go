// Package alarm is the process that starts a command when the serving process,
// which can start nothing, says so. Which command is fixed when that process is
// started. It is there only where one was asked for.
package alarm

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Command is the first argument that makes the binary this process.
const Command = "internal-alarm"

// socketFD is the descriptor that it inherits: an end of a socket pair, for a
// line of JSON each way.
const socketFD = 3

// startPatience is how long it may take until it is set up, which is milliseconds:
// one that is not by then never will be.
const startPatience = 30 * time.Second

// limit is how long the command may run before it is killed.
const limit = time.Minute

// An Alarm is the running process.
type Alarm struct {
	cmd    *exec.Cmd
	socket *os.File
	in     *bufio.Reader
}

type answer struct {
	Error string `json:"error,omitempty"`
}

// Start starts the process that starts the command, which is a path.
func Start(binary, command string) (*Alarm, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	a := &Alarm{socket: os.NewFile(uintptr(fds[0]), "alarm")}
	theirs := os.NewFile(uintptr(fds[1]), "alarm's end")
	defer theirs.Close()
	a.in = bufio.NewReader(a.socket)
	a.cmd = exec.Command(binary, Command, command)
	a.cmd.Args[0] = "oncefs"
	a.cmd.Env = []string{"GOMAXPROCS=1"}
	a.cmd.ExtraFiles = []*os.File{theirs}
	// A terminal's interrupt is for the serving process, whose end is ours.
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := a.cmd.Start(); err != nil {
		a.socket.Close()
		return nil, fmt.Errorf("start the alarm: %w", err)
	}
	theirs.Close() // or its death could not be seen from ours
	err = a.socket.SetReadDeadline(time.Now().Add(startPatience))
	if err == nil {
		err = a.hear() // that it is set up
	}
	if err = errors.Join(err, a.socket.SetReadDeadline(time.Time{})); err != nil {
		a.Close()
		return nil, fmt.Errorf("start the alarm: %w", err)
	}
	return a, nil
}

// Raise starts the command with a line of JSON on its standard input and returns
// when it has ended: nil if with exit status 0. The command has no output, no
// environment but a PATH of the system's directories, no descriptor but its
// standard ones, and a minute. One goroutine at a time may call it.
func (a *Alarm) Raise(line []byte) error {
	if _, err := a.socket.Write(append(bytes.TrimSpace(line), '\n')); err != nil {
		return fmt.Errorf("the alarm is gone: %w", err)
	}
	return a.hear()
}

func (a *Alarm) hear() error {
	line, err := a.in.ReadBytes('\n')
	var said answer
	if err == nil {
		err = json.Unmarshal(line, &said)
	}
	switch {
	case err != nil:
		return fmt.Errorf("the alarm is gone: %w", err)
	case said.Error != "":
		return errors.New(said.Error)
	}
	return nil
}

// Close ends the process. One whose command runs still is left behind, and ends
// with it.
func (a *Alarm) Close() error {
	a.socket.Close()
	ended := make(chan error, 1)
	go func() { ended <- a.cmd.Wait() }()
	select {
	case err := <-ended:
		return err
	case <-time.After(100 * time.Millisecond):
		return nil // the serving process may kill nobody
	}
}

// Main is that process: `oncefs internal-alarm COMMAND`. It returns the exit
// status.
func Main(args []string) int {
	if len(args) != 1 {
		return 1
	}
	socket := os.NewFile(socketFD, "socket")
	say := func(err error) {
		var a answer
		if err != nil {
			a.Error = err.Error()
		}
		line, err := json.Marshal(a)
		if err == nil {
			_, err = socket.Write(append(line, '\n'))
		}
		if err != nil {
			socket.Close() // who waits for it must not wait for ever
		}
	}
	// What was inherited must not be passed on: the descriptor of a passphrase may
	// be among it.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		say(fmt.Errorf("close_range: %w", err))
		return 1
	}
	say(nil)
	for in := bufio.NewReader(socket); ; {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return 0 // the serving process is gone
		}
		say(start(args[0], line))
	}
}

func start(command string, line []byte) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, command)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdin = bytes.NewReader(line)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second
	return cmd.Run()
}
