package integration

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"oncefs/integration/rig"
)

// copyOf copies a program to a path where any user may run it.
func copyOf(t testing.TB, d *rig.Dir, from, name string) string {
	t.Helper()
	b, err := os.ReadFile(rig.Need(t, from, "coreutils"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(d.Path, name)
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
	os.Chmod(path, 0o755)
	return path
}

// turnedAway shows that a program is refused, that nothing was claimed by it, and
// returns the n-th refusal's event.
func turnedAway(t testing.TB, d *rig.Dir, m *rig.Mount, n int, cmd *exec.Cmd) rig.Event {
	t.Helper()
	if r := rig.Exec(t, cmd); r.Code == 0 || r.Out != "" || !strings.Contains(r.Err, "Permission denied") {
		t.Errorf("%v: %+v", cmd.Args, r)
	}
	e := m.WaitEvent("refusal", n)
	if e["op"] != "open" || e["path"] != d.Secret() || e["why"] == nil {
		t.Errorf("refusal: %v", e)
	}
	if claims := m.Events("claim"); len(claims) > 0 {
		t.Errorf("claimed: %v", claims)
	}
	if s := rig.Run(t, "status", d.Conf); s.Code != 0 {
		t.Errorf("status: %+v", s)
	}
	return e
}

// letIn shows that a program gets all of it.
func letIn(t testing.TB, m *rig.Mount, cmd *exec.Cmd) {
	t.Helper()
	if r := rig.Exec(t, cmd); r.Out != content {
		t.Errorf("%v: %+v", cmd.Args, r)
	}
	m.WaitEvent("delivery", 1)
}

func why(t testing.TB, e rig.Event, want string) {
	t.Helper()
	if got, _ := e["why"].(string); !strings.Contains(got, want) {
		t.Errorf("refused because of %q, want %q", got, want)
	}
}

func as(uid, gid uint32, groups []uint32, name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid, Groups: groups}}
	return cmd
}

// Whoever comes first with another program is refused and reported, and the app
// still gets its read.
func TestC12_Exe(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	app := copyOf(t, d, "cat", "app")
	m := d.MountOver("--reader-exe", app)
	// An indexer, a backup, a shell. Looking is allowed to everybody.
	e := turnedAway(t, d, m, 1, exec.Command("cat", d.Secret()))
	why(t, e, "is not a reader's executable")
	cat, _ := filepath.EvalSymlinks(rig.Need(t, "cat", "coreutils"))
	if e["exe"] != cat || e["uid"] != float64(os.Getuid()) {
		t.Errorf("refusal: %v", e)
	}
	for _, c := range []string{"grep -r x " + d.Conf, "tar c " + d.Conf, "read x <" + d.Secret()} {
		if r := rig.Exec(t, exec.Command("bash", "-c", c)); r.Code == 0 || strings.Contains(r.Out, "hunter2") {
			t.Errorf("%s: %+v", c, r)
		}
	}
	r := rig.NewReader(t, nil)
	r.Want("EACCES", "open", d.Secret())
	r.Want("EACCES", "open-thread", d.Secret())
	r.Want(fmt.Sprintf("100400 %d", len(content)), "stat", d.Secret())
	r.Want("secrets.yaml", "list", d.Conf)
	letIn(t, m, exec.Command(app, d.Secret()))
	gone(t, d)
}

// The executable is a file and not a path.
func TestC12_ExeIsTheFile(t *testing.T) {
	t.Run("replaced", func(t *testing.T) {
		d := rig.NewDir(t, []byte(content))
		app := copyOf(t, d, "cat", "app")
		m := d.MountOver("--reader-exe", app)
		if err := os.Rename(app, app+".real"); err != nil {
			t.Fatal(err)
		}
		copyOf(t, d, "cat", "app") // the same bytes, and not the same file
		why(t, turnedAway(t, d, m, 1, exec.Command(app, d.Secret())), "another file than it was when mounted")
		letIn(t, m, exec.Command(app+".real", d.Secret()))
	})
	t.Run("removed", func(t *testing.T) {
		// The inode number of the removed file must not come to be another's.
		d := rig.NewDir(t, []byte(content))
		app := copyOf(t, d, "cat", "app")
		m := d.MountOver("--reader-exe", app)
		os.Remove(app)
		copyOf(t, d, "cat", "app")
		turnedAway(t, d, m, 1, exec.Command(app, d.Secret()))
	})
	t.Run("mounted-over", func(t *testing.T) {
		rig.Root(t)
		d := rig.NewDir(t, []byte(content))
		app, other := copyOf(t, d, "cat", "app"), copyOf(t, d, "cat", "other")
		link := filepath.Join(d.Path, "link")
		os.Link(app, link)
		m := d.MountOver("--reader-exe", app)
		if err := syscall.Mount(other, app, "", syscall.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		defer syscall.Unmount(app, 2 /* MNT_DETACH */)
		why(t, turnedAway(t, d, m, 1, exec.Command(app, d.Secret())), "another file than it was when mounted")
		letIn(t, m, exec.Command(link, d.Secret())) // the same file by another name
	})
}

func TestC12_SHA256(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	app := copyOf(t, d, "cat", "app")
	b, _ := os.ReadFile(app)
	m := d.MountOver("--reader-sha256", strings.ToUpper(fmt.Sprintf("%x", sha256.Sum256(b))))
	other := copyOf(t, d, "head", "other")
	b, _ = os.ReadFile(other)
	e := turnedAway(t, d, m, 1, exec.Command(other, d.Secret()))
	why(t, e, fmt.Sprintf("SHA-256 is %x", sha256.Sum256(b)))
	// The same bytes at another place are the same program.
	letIn(t, m, exec.Command(copyOf(t, d, "cat", "copy"), d.Secret()))
}

// Of one kind one rule must fit, of the kinds given all must.
func TestC12_KindsAddUp(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	app, second, third := copyOf(t, d, "cat", "app"), copyOf(t, d, "head", "second"), copyOf(t, d, "cat", "third")
	b, _ := os.ReadFile(app)
	m := d.MountOver("--reader-exe", app, "--reader-exe", second, "--reader-sha256", fmt.Sprintf("%x", sha256.Sum256(b)), "--reader-uid", fmt.Sprint(os.Getuid()))
	why(t, turnedAway(t, d, m, 1, exec.Command(second, d.Secret())), "SHA-256 is ")
	letIn(t, m, exec.Command(app, d.Secret()))
	d.WritePass()
	m.Stop()
	m = d.MountOver("--reader-exe", app, "--reader-exe", second, "--reader-uid", fmt.Sprint(os.Getuid()))
	why(t, turnedAway(t, d, m, 1, exec.Command(third, d.Secret())), "is not a reader's executable")
	letIn(t, m, exec.Command(second, d.Secret()))
}

func TestC12_UID(t *testing.T) {
	rig.Root(t)
	d := rig.NewDir(t, []byte(content))
	m := d.MountOver("--reader-uid", "12345", "--mode", "0444")
	for i, cmd := range []*exec.Cmd{exec.Command("cat", d.Secret()), as(12346, 12345, nil, "cat", d.Secret())} {
		e := turnedAway(t, d, m, 1, cmd)
		if i == 0 {
			why(t, e, "uid 0 is not a reader's")
		}
	}
	letIn(t, m, as(12345, 12345, nil, "cat", d.Secret()))
	// Alone, the reader is also the owner: the mode lets nobody else come as far.
	d.WritePass()
	m.Stop()
	m = d.MountOver("--reader-uid", "nobody")
	r := rig.NewReader(t, nil)
	r.Want("65534 0", "owner", d.Secret())
	r.Want("EACCES", "open", d.Secret()) // root passes any mode, not the policy
	letIn(t, m, as(65534, 65534, nil, "cat", d.Secret()))
	// With an executable, both count.
	d.WritePass()
	m.Stop()
	app := copyOf(t, d, "cat", "app")
	m = d.MountOver("--reader-uid", "nobody", "--mode", "0444", "--reader-exe", app)
	turnedAway(t, d, m, 1, exec.Command(app, d.Secret()))
	r.Want("EACCES", "open", d.Secret())
	letIn(t, m, as(65534, 65534, nil, app, d.Secret()))
}

func TestC12_GID(t *testing.T) {
	rig.Root(t)
	d := rig.NewDir(t, []byte(content))
	m := d.MountOver("--reader-gid", "4242", "--reader-gid", "4343", "--mode", "0444")
	why(t, turnedAway(t, d, m, 1, as(1000, 1000, []uint32{1001, 1002}, "cat", d.Secret())), "none of its groups")
	letIn(t, m, as(1000, 1000, []uint32{1001, 4343}, "cat", d.Secret())) // a supplementary one
	d.WritePass()
	m.Stop()
	m = d.MountOver("--reader-gid", "4242", "--mode", "0444")
	letIn(t, m, as(1000, 4242, nil, "cat", d.Secret()))
}

// A thread asks by its own number; it is its process's executable that counts.
func TestC12_Thread(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	m := d.MountOver("--reader-exe", self)
	r := rig.NewReader(t, nil)
	r.Want("ok", "open-thread", d.Secret())
	r.Want(sum([]byte(content)), "read-all")
	r.Want("ok", "close")
	m.WaitEvent("delivery", 1)
}

// While a reader is looked up nobody else waits, and if it is killed meanwhile
// nothing is consumed.
func TestC12_KilledWhileLookedUp(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	app := copyOf(t, d, "cat", "app")
	m := d.MountOver("--reader-exe", app)
	warden := rig.Child(m.Cmd.Process.Pid, "internal-warden")
	if warden == 0 {
		t.Fatal("there is no warden")
	}
	syscall.Kill(warden, syscall.SIGSTOP)
	defer syscall.Kill(warden, syscall.SIGCONT)
	cmd := exec.Command(app, d.Secret())
	out := &strings.Builder{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	rig.WaitFor(t, "the reader in its open", func() bool {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/wchan", cmd.Process.Pid))
		return strings.Contains(string(b), "request_wait")
	})
	r := rig.NewReader(t, nil)
	r.Want(fmt.Sprintf("100400 %d", len(content)), "stat", d.Secret())
	r.Want("secrets.yaml", "list", d.Conf)
	cmd.Process.Kill()
	syscall.Kill(warden, syscall.SIGCONT)
	cmd.Wait()
	if out.String() != "" {
		t.Errorf("it got %q", out)
	}
	if n := len(m.Events("delivery")); n != 0 {
		t.Errorf("%d deliveries", n)
	}
	rig.WaitFor(t, "the file to be free", func() bool { return rig.Run(t, "status", d.Conf).Code == 0 })
	letIn(t, m, exec.Command(app, d.Secret()))
}

// A warden that does not answer, or is dead, lets nobody in.
func TestC12_NoWarden(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	app := copyOf(t, d, "cat", "app")
	m := d.MountOver("--reader-exe", app)
	syscall.Kill(rig.Child(m.Cmd.Process.Pid, "internal-warden"), syscall.SIGKILL)
	why(t, turnedAway(t, d, m, 1, exec.Command(app, d.Secret())), "who it is cannot be told")
	syscall.Unmount(d.Conf, 2 /* MNT_DETACH */)
	exec.Command("fusermount3", "-u", "-z", d.Conf).Run()
	m.Wait()
}

// A reader that has no number in the mount's pid namespace cannot be told from
// others by its executable, and can by its user. One that has is found, also
// where /proc is another namespace's.
func TestC12_PidNamespace(t *testing.T) {
	rig.Root(t)
	inside := func(d *rig.Dir, args ...string) *rig.Mount {
		args = append([]string{"--pid", "--fork", "--kill-child", rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass}, args...)
		m := rig.Start(t, exec.Command("unshare", args...), d.Conf)
		m.WaitReady()
		return m
	}
	d := rig.NewDir(t, []byte(content))
	app := copyOf(t, d, "cat", "app")
	m := inside(d, "--reader-exe", app)
	e := turnedAway(t, d, m, 1, exec.Command(app, d.Secret()))
	why(t, e, "the process is outside of this pid namespace; share the pid namespace with it")
	if e["pid"] != 0.0 {
		t.Errorf("refusal: %v", e)
	}
	daemon := rig.Child(m.Cmd.Process.Pid, "mount")
	letIn(t, m, exec.Command("nsenter", "--pid", "--target", fmt.Sprint(daemon), app, d.Secret()))
	rig.Run(t, "umount", d.Conf)
	m.Wait()

	d = rig.NewDir(t, []byte(content))
	m = inside(d, "--reader-uid", "0")
	letIn(t, m, exec.Command("cat", d.Secret()))
	rig.Run(t, "umount", d.Conf)
	m.Wait()
}

func TestC12_OptionsThatCannotBe(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	script := d.Write("script", []byte("#!/bin/sh\n"))
	os.Chmod(script, 0o755)
	for _, args := range [][]string{
		{"--reader-exe", script},
		{"--reader-exe", filepath.Join(d.Path, "missing")},
		{"--reader-exe", d.Enc},
		{"--reader-exe", d.Path},
		{"--reader-sha256", "abc"},
		{"--reader-uid", "no-such-user"},
		{"--reader-gid", "no-such-group"},
		{"--reader-uid", "1", "--uid", "2"},
	} {
		refused(t, d, 80, args...)
	}
}
