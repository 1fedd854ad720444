package supervisor

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Front says how to run a command from the process that a person, a container
// or an init started.
type Front struct {
	Binary string
	// Args are this binary's arguments for a role.
	Args func(r Role, control int) []string
	// Shared mounts where everybody in the caller's mount namespace sees it.
	Shared bool
	// Need refuses to run where no private mount namespace can be had.
	Need bool
	// Same tells that the command runs as the user who calls.
	Same bool
	// MayMount tells that this process may mount by itself.
	MayMount bool
	// NotifyFD gets a newline when the command was started; none if negative.
	NotifyFD int
	// Undump makes this process untraceable.
	Undump func() error
	// Warn is told what went wrong and stops nothing.
	Warn func(error)
}

// A NotPrivateError says that a private mount namespace is not to be had.
type NotPrivateError struct{ Why string }

func (e *NotPrivateError) Error() string { return "no private mount namespace: " + e.Why }

// relayed are the signals that are passed on to the command. The others are the
// kernel's own affair, cannot be caught, or stop and continue us as the shell
// wants it.
func relayed() []os.Signal {
	signals := []os.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM, unix.SIGWINCH, unix.SIGCONT}
	for n := 34; n <= 64; n++ { // real-time signals; 32 and 33 are libraries'
		signals = append(signals, syscall.Signal(n))
	}
	// Who ignores one (nohup) wants the command to ignore it.
	return slices.DeleteFunc(signals, signal.Ignored)
}

// Run starts the supervisor, in a mount namespace of its own if that can be,
// passes signals on, and returns the command's exit status.
func (f *Front) Run() (status int, err error) {
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, relayed()...)
	reap, err := newReaper()
	if err != nil {
		return 0, err
	}
	tty, _ := os.OpenFile("/dev/tty", os.O_RDWR|unix.O_NOCTTY, 0)
	sup, err := f.start(reap)
	if early := (*died)(nil); errors.As(err, &early) && early.status.Exited() && early.status.ExitStatus() != 0 {
		return early.status.ExitStatus(), nil // it has said why
	}
	if err != nil {
		return 0, err
	}
	// Only now: who writes a child's user mapping must be seen in /proc.
	if err := f.Undump(); err != nil {
		hangUp(sup, reap)
		return 0, err
	}
	for announced := false; !sup.ended; {
		select {
		case s := <-signals:
			n := int(s.(syscall.Signal))
			verb := "signal"
			if fromTerminal(tty, s) {
				// The command is in our process group and has had it.
				verb = "saw"
			}
			if stops(n) {
				f.systemd("STOPPING=1")
			}
			if err := sup.say(verb + " " + strconv.Itoa(n)); err != nil {
				f.Warn(err) // the supervisor takes all down
			}
		case line, ok := <-sup.lines:
			if !ok {
				sup.lines = nil
				if sup.broken != nil {
					f.Warn(sup.broken)
				}
			}
			if line == "started" && !announced {
				announced = true
				f.started()
			}
		case <-reap.wake:
			reap.reap(sup)
		}
	}
	sup.close()
	if sup.lost != nil {
		return 0, sup.lost
	}
	if sup.status.Signaled() {
		// Killed: what it had started has come to us, and is not to outlive us.
		f.Warn(fmt.Errorf("the supervisor ended by a signal: %v", sup.status.Signal()))
		killAll(reap, 0, leftGrace)
	}
	return code(sup.status), nil
}

// start tries the ways to a mount namespace of our own, from the best.
func (f *Front) start(reap *reaper) (*child, error) {
	type way struct {
		greeting string
		attr     *syscall.SysProcAttr
	}
	var ways []way
	if !f.Shared {
		if f.MayMount {
			ways = append(ways, way{"private", &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}})
		}
		if f.Same {
			ways = append(ways, way{"private", &syscall.SysProcAttr{
				Cloneflags:  unix.CLONE_NEWNS | unix.CLONE_NEWUSER,
				UidMappings: []syscall.SysProcIDMap{{ContainerID: os.Geteuid(), HostID: os.Geteuid(), Size: 1}},
				GidMappings: []syscall.SysProcIDMap{{ContainerID: os.Getegid(), HostID: os.Getegid(), Size: 1}},
				// To mount, and to give all of it up for good before the command.
				AmbientCaps: []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_SETPCAP},
			}})
		}
	}
	if !f.Need {
		ways = append(ways, way{"shared", &syscall.SysProcAttr{}})
	}
	var why []string
	if !f.Shared && len(ways) <= 1 {
		why = append(why, "it takes CAP_SYS_ADMIN to have one and another user too")
	}
	env := slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "NOTIFY_SOCKET=") })
	for _, w := range ways {
		sup, err := start(f.Binary, func(control int) []string { return f.Args(Supervisor, control) }, env, w.attr)
		if err != nil {
			if w.greeting == "shared" {
				return nil, err
			}
			why = append(why, err.Error())
			continue
		}
		if w.greeting == "shared" && !f.Shared {
			w.greeting += " " + strings.Join(why, "; ")
		}
		err = sup.say(w.greeting)
		line := <-sup.lines
		if line == "up" {
			return sup, nil
		}
		if err == nil && line == "" {
			err = sup.broken
		}
		hangUp(sup, reap) // one that could not tell that it is up ends by it
		if err = cmp.Or(err, sup.lost); err != nil {
			return nil, err
		}
		if no, ok := strings.CutPrefix(line, "no "); ok {
			why = append(why, no)
			continue
		}
		return nil, &died{sup.status}
	}
	return nil, &NotPrivateError{strings.Join(why, "; ")}
}

// hangUp lets the supervisor take down what it has, and waits for its end.
func hangUp(sup *child, reap *reaper) {
	sup.close()
	for !sup.ended {
		<-reap.wake
		reap.reap(sup)
	}
}

// A died is a supervisor that ended before it was up.
type died struct{ status unix.WaitStatus }

func (d *died) Error() string {
	return fmt.Sprintf("the supervisor ended before it was up: status %d", code(d.status))
}

// fromTerminal tells whether a signal is one that a terminal sends to all of its
// foreground process group, and that group is ours.
func fromTerminal(tty *os.File, s os.Signal) bool {
	if tty == nil || s != unix.SIGINT && s != unix.SIGQUIT && s != unix.SIGWINCH {
		return false
	}
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// started tells who waits that the command runs.
func (f *Front) started() {
	f.systemd("READY=1")
	if f.NotifyFD >= 0 {
		fd := os.NewFile(uintptr(f.NotifyFD), "notification descriptor")
		if _, err := io.WriteString(fd, "\n"); err != nil {
			f.Warn(err)
		}
		fd.Close()
	}
}

// systemd sends a datagram to the socket that $NOTIFY_SOCKET names,
// sd_notify(3). It comes from this process: the one that the unit started.
func (f *Front) systemd(state string) {
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err == nil {
		_, err = conn.Write([]byte(state))
		conn.Close()
	}
	if err != nil {
		f.Warn(fmt.Errorf("notify systemd: %w", err))
	}
}
