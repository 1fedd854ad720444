package main

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"

	oncefs "oncefs/fs"
	"oncefs/internal/mountpoint"
	"oncefs/internal/once"
	"oncefs/internal/sandbox"
)

type statusCmd struct {
	Target string `arg:"" complete:"mounts" help:"What was mounted over."`
	JSON   bool   `name:"json" help:"Print it as JSON."`
}

// Help is shown below the options.
func (statusCmd) Help() string {
	return `Asking never claims or consumes anything. Only root and the user who mounted
are told.

Examples:
  oncefs status /config
  oncefs status /config --json | jq -r '.files[].state'
  oncefs status /config >/dev/null && echo "nobody has read it yet"

Exit status: 0 ready and something is still to be read, 90 a reader has what is
left open, 91 all is spent, 92 no live oncefs is mounted there or it is not ready.`
}

func (s *statusCmd) Run(e *env) error {
	path, mounted, alive, err := mountpoint.Mounted(s.Target)
	if err != nil {
		return err
	}
	if !mounted {
		return &fs.PathError{Op: "status", Path: path, Err: mountpoint.ErrNotMounted}
	}
	if !alive {
		return fmt.Errorf("status %s: its process is dead: %w", path, mountpoint.ErrNotMounted)
	}
	st, err := askStatus(path)
	if err != nil {
		return &fs.PathError{Op: "status", Path: path, Err: err}
	}
	if s.JSON {
		text, err := json.Marshal(st)
		if err != nil {
			return err
		}
		e.printf("%s\n", text)
	} else {
		s.print(e, st)
	}
	return st.answer()
}

// askStatus asks for all parts of a mount's status. Between two of them files may
// change their state; what is told of each is true.
func askStatus(path string) (*mountStatus, error) {
	buf := make([]byte, 64<<10) // XATTR_SIZE_MAX of linux/limits.h
	var st mountStatus
	for attr := oncefs.StatusAttr; ; attr = fmt.Sprintf("%s.%d", oncefs.StatusAttr, st.More) {
		n, err := unix.Lgetxattr(path, attr, buf)
		if err != nil {
			return nil, err
		}
		files, before := st.Files, st.More
		st = mountStatus{}
		if err := json.Unmarshal(buf[:n], &st); err != nil {
			return nil, err
		}
		st.Files = append(files, st.Files...)
		if st.More <= before {
			st.More = 0
			return &st, nil
		}
	}
}

func (s *statusCmd) print(e *env, st *mountStatus) {
	ready := "not ready"
	if st.Ready {
		ready = "ready since " + st.ReadyAt.Format(time.DateTime)
	}
	e.printf("%s: %s, process %d, memory %s, sandbox %s\n", st.Path, ready, st.PID, st.Memory, list(st.Sandbox))
	table := tabwriter.NewWriter(e.out, 0, 0, 2, ' ', 0)
	for _, f := range st.Files {
		fmt.Fprintf(table, "%s\t%s\t%s", printable(f.Name), units.BytesSize(float64(f.Size)), f.State)
		if f.State == once.Sealed {
			fmt.Fprintf(table, ", %d left to read", f.Left)
		}
		if f.Reader != nil {
			fmt.Fprintf(table, "\topened %s by %s (pid %d, uid %d), %d bytes went out", f.ReadAt.Format(time.DateTime), printable(name(f.Reader.Exe)), f.Reader.PID, f.Reader.UID, f.Sent)
		}
		if f.Attempts > 0 {
			fmt.Fprintf(table, "\t%d late or refused attempts", f.Attempts)
		}
		fmt.Fprintln(table)
	}
	table.Flush()
}

func list(layers []sandbox.Layer) string {
	if len(layers) == 0 {
		return "none"
	}
	names := make([]string, len(layers))
	for i, l := range layers {
		names[i] = string(l)
	}
	return strings.Join(names, " ")
}

func name(exe string) string {
	if exe == "" {
		return "an unknown program"
	}
	return exe
}

// answer is the exit status: what is still to be had decides.
func (st *mountStatus) answer() error {
	if !st.Ready {
		return statusError(exitNotReady)
	}
	answer := exitSpent
	for _, f := range st.Files {
		switch f.State {
		case once.Sealed:
			return nil
		case once.Claimed:
			answer = exitClaimed
		}
	}
	return statusError(answer)
}
