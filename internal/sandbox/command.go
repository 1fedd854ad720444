package sandbox

import (
	"errors"
	"fmt"
	"slices"

	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// A User is who a command is to run as.
type User struct {
	UID, GID int
	Groups   []int // supplementary
}

// ErrCapability is a name that is no capability's.
var ErrCapability = errors.New("there is no such capability")

// capabilityOf is the capability of a name like net_bind_service, with or
// without cap_ before it.
func capabilityOf(name string) (cap.Value, error) {
	for _, full := range []string{name, "cap_" + name} {
		if v, err := cap.FromName(full); err == nil {
			return v, nil
		}
	}
	return 0, fmt.Errorf("%w: %s", ErrCapability, name)
}

// Command gives up what a command that we start is not to have: it becomes the
// user, unless that is nil, and loses every capability but those to keep, also
// from the bounding set, for good: no program that it starts can gain any.
func Command(u *User, keep []string) error {
	kept := make([]cap.Value, 0, len(keep))
	for _, name := range keep {
		v, err := capabilityOf(name)
		if err != nil {
			return err
		}
		kept = append(kept, v)
	}
	if err := noNewPrivs(); err != nil {
		return err
	}
	if err := dropBounding(kept); err != nil {
		return err
	}
	if u != nil {
		if err := become(u, len(kept) > 0); err != nil {
			return err
		}
	}
	set := cap.NewSet()
	for _, flag := range []cap.Flag{cap.Permitted, cap.Effective, cap.Inheritable} {
		if err := set.SetFlag(flag, true, kept...); err != nil {
			return fmt.Errorf("capset: %w", err)
		}
	}
	if err := set.SetProc(); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	if err := cap.ResetAmbient(); err != nil {
		return fmt.Errorf("prctl PR_CAP_AMBIENT_CLEAR_ALL: %w", err)
	}
	if len(kept) > 0 {
		if err := cap.SetAmbient(true, kept...); err != nil {
			return fmt.Errorf("prctl PR_CAP_AMBIENT_RAISE: %w", err)
		}
	}
	return nil
}

// dropBounding empties the bounding set but for what is kept. Who may not change
// it (no CAP_SETPCAP) does without: with no_new_privs an exec gives nothing that
// was not there before.
func dropBounding(kept []cap.Value) error {
	for v := cap.Value(0); v < cap.MaxBits(); v++ {
		if slices.Contains(kept, v) {
			continue
		}
		if err := cap.DropBound(v); errors.Is(err, unix.EPERM) {
			return nil
		} else if err != nil {
			return fmt.Errorf("prctl PR_CAPBSET_DROP: %w", err)
		}
	}
	return nil
}

func become(u *User, keepCapabilities bool) error {
	if keepCapabilities {
		if err := ll.AllThreadsPrctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("prctl PR_SET_KEEPCAPS: %w", err)
		}
	}
	if err := unix.Setgroups(u.Groups); err != nil {
		return fmt.Errorf("setgroups: %w", err)
	}
	if err := unix.Setresgid(u.GID, u.GID, u.GID); err != nil {
		return fmt.Errorf("setresgid %d: %w", u.GID, err)
	}
	if err := unix.Setresuid(u.UID, u.UID, u.UID); err != nil {
		return fmt.Errorf("setresuid %d: %w", u.UID, err)
	}
	return nil
}
