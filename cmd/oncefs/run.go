package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/alecthomas/kong"
	"golang.org/x/sys/unix"

	"oncefs/internal/mountpoint"
	"oncefs/internal/once"
	"oncefs/internal/sandbox"
	"oncefs/internal/supervisor"
)

type runCmd struct {
	mountFlags
	Command      []string           `arg:"" help:"Program to run and its arguments, after --."`
	User         string             `placeholder:"USER[:GROUP]" help:"Run the command as this user, names or numbers; its groups are the user's, or the one group given. The files are served to this user unless --uid says otherwise."`
	KeepCap      []string           `name:"keep-cap" placeholder:"NAME" help:"Capability that the command keeps, for example net_bind_service; repeat for several. Default: none."`
	SharedMount  bool               `help:"Mount where everybody in this mount namespace can see it. Default: where only the command and its children can."`
	Restart      supervisor.Restart `enum:"no,on-failure,always" default:"no" placeholder:"WHEN" help:"Start the command again when it ends: no, on-failure or always. The secret then stays in memory and is served once per start."`
	RestartDelay time.Duration      `default:"10s" placeholder:"TIME" help:"Pause before the first restart. It doubles each time, up to thirty times, and is the first again after the command ran for sixty times as long."`

	Role    supervisor.Role `hidden:"" help:"What this process is for."`
	Control int             `hidden:"" default:"-1" help:"Descriptor of the process that started it."`
}

// Help is shown below the options.
func (runCmd) Help() string {
	return `Mounts, starts the command once the mount is ready, passes signals on to it and
ends with its exit status. When the command ends so does all that it started,
and the mount.

Others do not see the mount: it is in a mount namespace of its own. Root, and who
has CAP_SYS_ADMIN, makes one; another user gets one with a user namespace, where
the system allows that. Where it cannot be had, it is mounted for all to see and
the log says so; --require private refuses.

The command runs without a capability and can gain none. It has the descriptors
and the environment that oncefs was started with, less the passphrase's,
--notify-fd and NOTIFY_SOCKET; with --user, HOME is the user's.

Examples:
  oncefs run /config --enc secrets.yaml.enc --user app -- /usr/bin/app -c /config/secrets.yaml
  oncefs run ~/keys --enc keys/id.asc --passphrase-file /dev/fd/3 -- bash 3<pw

Exit status: the command's, or 128 and the number of the signal that ended it;
126 if it cannot be executed, 127 if there is none. What fails before it is
started has the statuses of mount; see docs/exit-codes.md.`
}

// requirePrivate is what --require calls a mount that others do not see.
const requirePrivate = "private"

func (r *runCmd) Validate(ctx *kong.Context) error {
	if r.SharedMount && slices.Contains(r.Require, requirePrivate) {
		return errors.New("--require private refuses what --shared-mount asks for")
	}
	if r.RestartDelay <= 0 {
		return errors.New("--restart-delay must be more than nothing")
	}
	return r.mountFlags.Validate(ctx)
}

// Run is one of four processes, see package supervisor; the first has no role.
func (r *runCmd) Run(e *env) error {
	switch r.Role {
	case supervisor.Supervisor:
		return r.supervise(e)
	case supervisor.Serving:
		return r.serve(e)
	case supervisor.Launching:
		return r.launch()
	}
	same, err := r.sameUser()
	if err != nil {
		return err
	}
	f := &supervisor.Front{
		Binary: e.binary, Args: r.args(e), NotifyFD: r.NotifyFD,
		Shared: r.SharedMount, Need: slices.Contains(r.Require, requirePrivate),
		Same: same, MayMount: mountpoint.MayMount(),
		Undump: sandbox.Undump,
		Warn:   func(err error) { e.warn(err.Error(), "") },
	}
	return answer(f.Run())
}

// answer makes a status the program's own.
func answer(status int, err error) error {
	if err == nil && status != 0 {
		err = statusError(status)
	}
	return err
}

// args are the arguments for a role: those that the front was called with, and
// two more before them.
func (r *runCmd) args(e *env) func(supervisor.Role, int) []string {
	given := e.args[2:]
	if r.Role != "" {
		given = given[2:]
	}
	return func(role supervisor.Role, control int) []string {
		return append([]string{e.args[1], "--role=" + string(role), "--control=" + strconv.Itoa(control)}, given...)
	}
}

func (r *runCmd) supervise(e *env) error {
	out, err := r.openLog()
	if err != nil {
		return err
	}
	ev := newEvents(out, r.LogFormat)
	defer ev.close()
	return answer(supervisor.Run(supervisor.Options{
		Binary: e.binary, Args: r.args(e), Control: r.Control,
		Private: mountpoint.Private, Undump: sandbox.Undump, Tell: ev.tell,
		Restart: r.Restart, Delay: r.RestartDelay, Fatal: exitIntrusion,
	}))
}

// serve is mount, for a command.
func (r *runCmd) serve(e *env) error {
	link, err := supervisor.NewServed(r.Control)
	if err != nil {
		return err
	}
	u, err := r.user()
	if err != nil {
		return err
	}
	if u != nil && r.UID == "" {
		r.UID = strconv.Itoa(u.UID)
	}
	if u != nil && r.GID == "" {
		r.GID = strconv.Itoa(u.GID)
	}
	// The front announces, when the command runs.
	r.NotifyFD = -1
	r.Require = slices.DeleteFunc(r.Require, func(s string) bool { return s == requirePrivate })
	ctx, stop := untilSignal()
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	var mounted atomic.Pointer[mounting]
	go func() {
		defer cancel()
		link.Obey(func(o supervisor.Order) error {
			m := mounted.Load()
			if m == nil {
				return errors.New("not ready")
			}
			if o == supervisor.Arm {
				return m.each((*once.Secret).Rearm)
			}
			return m.each((*once.Secret).Disarm)
		})
	}()
	// Standard output is the command's.
	e.out = e.err
	return serve(ctx, e, &r.mountFlags, serving{
		detach: true, quiet: true, keep: r.Restart != supervisor.Never,
		ready: func(m *mounting) {
			mounted.Store(m)
			if err := link.Ready(); err != nil {
				m.events.tell(slog.LevelError, "failure", slog.String("error", err.Error()))
				cancel() // the supervisor waits for our word, or our end
			}
		},
		within: os.Getppid(),
	})
}

// launch becomes the command.
func (r *runCmd) launch() error {
	u, err := r.user()
	if err != nil {
		return err
	}
	l := &supervisor.Launcher{
		Control: r.Control, Args: r.Command,
		Prepare: func() (string, error) {
			if err := sandbox.Command(credential(u), r.KeepCap); err != nil {
				return "", fmt.Errorf("%w: %w", errBecome, err)
			}
			return exec.LookPath(r.Command[0])
		},
		Env: func() []string { return environment(u) },
	}
	if fd, ok := descriptor(r.PassphraseFile); ok && fd > 2 {
		l.Close = append(l.Close, fd)
	}
	if r.NotifyFD > 2 {
		l.Close = append(l.Close, r.NotifyFD)
	}
	err = l.Run()
	switch {
	case err == nil:
		return statusError(exitStopped) // who stopped us says why
	case errors.Is(err, errBecome), errors.Is(err, sandbox.ErrCapability):
		return err
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: %w", errMissing, err)
	case errors.Is(err, exec.ErrDot), as[*exec.Error](err), as[*supervisor.ExecError](err):
		return fmt.Errorf("%w: %w", errNotExecutable, err)
	}
	return err
}

// descriptor is the number in a path like /dev/fd/3.
func descriptor(path string) (int, bool) {
	for _, dir := range []string{"/dev/fd/", "/proc/self/fd/"} {
		if n, found := strings.CutPrefix(path, dir); found {
			fd, err := strconv.Atoi(n)
			return fd, err == nil
		}
	}
	return 0, false
}

// account is who the command runs as.
type account struct {
	sandbox.User
	home string // "" where there is no entry for the user
}

func credential(a *account) *sandbox.User {
	if a == nil {
		return nil
	}
	return &a.User
}

// environment is the caller's, without what was meant for us.
func environment(a *account) []string {
	env := slices.DeleteFunc(os.Environ(), func(s string) bool {
		return a != nil && a.home != "" && strings.HasPrefix(s, "HOME=")
	})
	if a != nil && a.home != "" {
		env = append(env, "HOME="+a.home)
	}
	return env
}

// user looks up --user; nil is who calls.
func (r *runCmd) user() (*account, error) {
	if r.User == "" {
		return nil, nil
	}
	wrap := func(err error) error { return fmt.Errorf("%w: --user %s: %w", errNotFit, r.User, err) }
	name, group, withGroup := strings.Cut(r.User, ":")
	a := &account{}
	entry, err := user.Lookup(name)
	if err != nil {
		if uid, numeric := strconv.ParseUint(name, 10, 32); numeric == nil {
			a.UID = int(uid)
			entry, err = user.LookupId(name)
			if err != nil && withGroup { // not every user has an entry
				entry, err = nil, nil
			}
		}
	}
	if err != nil {
		return nil, wrap(err)
	}
	if entry != nil {
		a.home = entry.HomeDir
		if a.UID, err = strconv.Atoi(entry.Uid); err == nil {
			a.GID, err = strconv.Atoi(entry.Gid)
		}
		if err != nil {
			return nil, wrap(err)
		}
	}
	if withGroup {
		gid, err := strconv.ParseUint(group, 10, 32)
		if err != nil {
			g, err := user.LookupGroup(group)
			if err != nil {
				return nil, wrap(err)
			}
			if gid, err = strconv.ParseUint(g.Gid, 10, 32); err != nil {
				return nil, wrap(err)
			}
		}
		a.GID, a.Groups = int(gid), []int{}
		return a, nil
	}
	ids, err := entry.GroupIds()
	if err != nil {
		return nil, wrap(err)
	}
	for _, id := range ids {
		if gid, err := strconv.Atoi(id); err == nil && gid != a.GID {
			a.Groups = append(a.Groups, gid)
		}
	}
	return a, nil
}

// sameUser tells whether the command runs as who calls.
func (r *runCmd) sameUser() (bool, error) {
	u, err := r.user()
	if u == nil || err != nil {
		return u == nil, err
	}
	return u.UID == unix.Geteuid() && u.GID == unix.Getegid(), nil
}
