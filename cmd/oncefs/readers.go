package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"

	"oncefs/internal/policy"
)

// readerFlags say who may read.
type readerFlags struct {
	ReaderUID    []string `name:"reader-uid" placeholder:"USER" help:"Only this user may read, a number or a name; repeat for several. One alone is also the default of --uid."`
	ReaderGID    []string `name:"reader-gid" placeholder:"GROUP" help:"Only a process in this group may read, also if the group is supplementary; a number or a name, repeatable."`
	ReaderExe    []string `name:"reader-exe" sep:"none" placeholder:"PATH" help:"Only a process that runs this executable file may read; repeatable. Of a script that is its interpreter."`
	ReaderSHA256 []string `name:"reader-sha256" placeholder:"HEX" help:"Only a process whose executable has this SHA-256 may read; repeatable."`
}

func (f *readerFlags) validate() error {
	for i, digest := range f.ReaderSHA256 {
		b, err := hex.DecodeString(digest)
		if err != nil || len(b) != 32 {
			return fmt.Errorf("--reader-sha256 %s is not 64 hexadecimal digits, as sha256sum prints them", digest)
		}
		f.ReaderSHA256[i] = strings.ToLower(digest)
	}
	return nil
}

// policy opens the executables; what is at their paths later does not matter.
func (f *readerFlags) policy() (*policy.Policy, error) {
	p := &policy.Policy{Digests: f.ReaderSHA256}
	for _, name := range f.ReaderUID {
		uid, err := userID("--reader-uid", name)
		if err != nil {
			return nil, err
		}
		p.UIDs = append(p.UIDs, uid)
	}
	for _, name := range f.ReaderGID {
		gid, err := groupID("--reader-gid", name)
		if err != nil {
			return nil, err
		}
		p.GIDs = append(p.GIDs, gid)
	}
	for _, path := range f.ReaderExe {
		exe, err := policy.OpenExecutable(path)
		if err != nil {
			p.Close()
			return nil, fmt.Errorf("%w: --reader-exe: %w", errNotFit, err)
		}
		p.Exes = append(p.Exes, exe)
	}
	return p, nil
}

// allow is what the mount asks about each reader; nil where everybody is let in.
func (m *mounting) allow() func(pid, uid, gid uint32) error {
	if m.policy.Open() {
		return nil
	}
	return func(pid, uid, gid uint32) error {
		err := m.policy.Decide(pid, uid, gid, m.warden.Look)
		if errors.Is(err, policy.ErrOutside) {
			// What to do belongs beside it: in the log nobody sees a hint.
			return fmt.Errorf("%w; share the pid namespace with it, or tell it by --reader-uid alone", err)
		}
		return err
	}
}

// readable says whether a reader of the policy can get as far as the policy:
// before that the kernel asks owner and mode.
func (m *mounting) readable(owner uint32, mode mode) error {
	for _, uid := range m.policy.UIDs {
		if uid == 0 || uid == owner && mode&0o400 != 0 || mode&0o044 != 0 {
			return nil
		}
	}
	if len(m.policy.UIDs) == 0 {
		return nil
	}
	return fmt.Errorf("%w: no --reader-uid may open a file of owner %d and mode %04o", errNotFit, owner, mode)
}

// othersRead tells whether a rule names somebody else than who mounts.
func (m *mounting) othersRead() bool {
	return len(m.policy.GIDs) > 0 || slices.ContainsFunc(m.policy.UIDs, func(uid uint32) bool { return uid != uint32(os.Geteuid()) })
}

// userID is the number of a user, who may be named.
func userID(option, name string) (uint32, error) {
	return id(option, name, func() (string, error) {
		u, err := user.Lookup(name)
		if err != nil {
			return "", err
		}
		return u.Uid, nil
	})
}

// groupID is the number of a group, which may be named.
func groupID(option, name string) (uint32, error) {
	return id(option, name, func() (string, error) {
		g, err := user.LookupGroup(name)
		if err != nil {
			return "", err
		}
		return g.Gid, nil
	})
}

func id(option, name string, lookup func() (string, error)) (uint32, error) {
	n, err := strconv.ParseUint(name, 10, 32)
	if err != nil {
		var found string
		if found, err = lookup(); err == nil {
			n, err = strconv.ParseUint(found, 10, 32)
		}
	}
	if err != nil {
		return 0, fmt.Errorf("%w: %s %s: %w", errNotFit, option, name, err)
	}
	return uint32(n), nil
}
