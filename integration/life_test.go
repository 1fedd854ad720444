package integration

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"oncefs/integration/rig"
)

// over runs a test over a directory and over a file path.
func over(t *testing.T, f func(t *testing.T, d *rig.Dir, target string)) {
	for _, what := range []string{"directory", "file"} {
		t.Run(what, func(t *testing.T) {
			d := rig.NewDir(t, bytesOf(300_000))
			target := d.Conf
			if what == "file" {
				target = d.Secret()
			}
			f(t, d, target)
		})
	}
}

func mountOn(t testing.TB, d *rig.Dir, target string, args ...string) *rig.Mount {
	t.Helper()
	m := rig.Start(t, exec.Command(rig.Binary(t), append([]string{"mount", target, "--enc", d.Enc, "--passphrase-file", d.Pass}, args...)...), target)
	m.WaitReady()
	return m
}

// gone shows that nobody finds the file by any question.
func gone(t testing.TB, d *rig.Dir) {
	t.Helper()
	r := rig.NewReader(t, nil)
	for _, op := range []string{"open", "stat", "lstat", "access", "opath"} {
		r.Want("ENOENT", op, d.Secret())
	}
	r.Want("", "list", d.Conf)
}

func TestC5_ReaderIsKilledHalfWay(t *testing.T) {
	over(t, func(t *testing.T, d *rig.Dir, target string) {
		m := mountOn(t, d, target)
		r := rig.NewReader(t, nil)
		r.Want("ok", "open", d.Secret())
		r.Do("read", "100000")
		r.Kill()
		if e := m.WaitEvent("delivery", 1); e["whole"] != false || e["sent"] != 100000.0 {
			t.Errorf("delivery: %v", e)
		}
		gone(t, d)
	})
}

// Killed before it read anything, a reader gives the file back.
func TestC4_ReaderIsKilledBeforeReading(t *testing.T) {
	over(t, func(t *testing.T, d *rig.Dir, target string) {
		m := mountOn(t, d, target)
		r := rig.NewReader(t, nil)
		r.Want("ok", "open", d.Secret())
		r.Kill()
		m.WaitEvent("give-back", 1)
		if got := rig.Cat(t, d.Secret()); got.Out != string(bytesOf(300_000)) {
			t.Errorf("%d bytes, %s", len(got.Out), got.Err)
		}
	})
}

// Descriptors that are copies of one another share the claim: forked, dup'ed,
// passed on. It is spent at the last close.
func TestC5_TheLastCloseSpends(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	m := d.MountOver()
	r := rig.NewReader(t, nil)
	r.Want("ok", "open", d.Secret())
	r.Want(`"user"`, "read", "4")
	r.Want("ok", "dup")
	r.Want("ok", "close")
	r.Want("0", "seek", "0", "0")
	r.Want(strconv.Quote(content), "read", "1000")
	r.Want("ok", "close")
	if e := m.WaitEvent("delivery", 1); e["whole"] != true {
		t.Errorf("delivery: %v", e)
	}
	gone(t, d)
}

// A child that inherited the descriptor reads on after its parent has closed
// it.
func TestC5_ForkedDescriptorsShareTheClaim(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	m := d.MountOver()
	f, err := os.Open(d.Secret())
	if err != nil {
		t.Fatal(err)
	}
	var b [4]byte
	if _, err := f.Read(b[:]); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", "read -r _; cat <&3")
	cmd.ExtraFiles = []*os.File{f}
	in, _ := cmd.StdinPipe()
	var out strings.Builder
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if n := len(m.Events("delivery")); n != 0 {
		t.Errorf("spent while a copy is open")
	}
	fmt.Fprintln(in)
	cmd.Wait()
	if out.String() != content[4:] {
		t.Errorf("the child read %q", out.String())
	}
	m.WaitEvent("delivery", 1)
	gone(t, d)
}

func TestC8_ReopenThroughProc(t *testing.T) {
	over(t, func(t *testing.T, d *rig.Dir, target string) {
		mountOn(t, d, target)
		a, b := rig.NewReader(t, nil), rig.NewReader(t, nil)
		a.Want("ok", "open", d.Secret())
		for range 2 {
			a.Want("ENOENT", "reopen")
			a.Want("ENOENT", "reopen-dev")
			path := fmt.Sprintf("/proc/%d/fd/%s", a.Cmd.Process.Pid, a.Do("fd"))
			if got := b.Do("open", path); got != "ENOENT" && got != "EACCES" {
				t.Errorf("another process, %s: %s", path, got)
			}
			a.Do("read", "10")
		}
	})
}

// Killed, the daemon leaves nothing on the disk and readers ENOTCONN; starting
// again heals that.
func TestC16_KilledAndStartedAgain(t *testing.T) {
	for _, when := range []string{"before", "during", "after"} {
		t.Run(when, func(t *testing.T) {
			over(t, func(t *testing.T, d *rig.Dir, target string) {
				if when == "after" && target == d.Secret() {
					return // the process ends by itself with the spend
				}
				m := mountOn(t, d, target)
				r := rig.NewReader(t, nil)
				switch when {
				case "during":
					r.Want("ok", "open", d.Secret())
					r.Do("read", "1000")
				case "after":
					r.Want("ok", "open", d.Secret())
					r.Do("read-all")
					r.Want("ok", "close")
				}
				m.Signal(syscall.SIGKILL)
				m.Wait()
				if when == "during" {
					r.Want("ENOTCONN", "read", "1000")
				}
				if when != "during" || target == d.Conf {
					r.Want("ENOTCONN", "open", d.Secret())
					if s := rig.Run(t, "status", target); s.Code != 92 {
						t.Errorf("status: %+v", s)
					}
				}
				d.WritePass()
				m = mountOn(t, d, target)
				if when != "during" || target == d.Conf {
					m.WaitEvent("dead-mount-removed", 1)
				}
				if got := rig.Cat(t, d.Secret()); got.Out != string(bytesOf(300_000)) {
					t.Errorf("%d bytes, %s", len(got.Out), got.Err)
				}
			})
		})
	}
}

// A dead mount can also be taken off by hand.
func TestC16_UmountOfADeadMount(t *testing.T) {
	over(t, func(t *testing.T, d *rig.Dir, target string) {
		m := mountOn(t, d, target)
		m.Signal(syscall.SIGKILL)
		m.Wait()
		if r := rig.Run(t, "umount", target); r.Code != 0 {
			t.Errorf("umount: %+v", r)
		}
		if rig.Mounted(t, target) {
			t.Error("still mounted")
		}
		if r := rig.Run(t, "umount", target); r.Code != 92 {
			t.Errorf("umount again: %+v", r)
		}
	})
}

func TestC17_SignalsEndIt(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		for _, held := range []bool{false, true} {
			t.Run(fmt.Sprint(s, held), func(t *testing.T) {
				over(t, func(t *testing.T, d *rig.Dir, target string) {
					m := mountOn(t, d, target)
					r := rig.NewReader(t, nil)
					if held {
						r.Want("ok", "open", d.Secret())
						r.Do("read", "1000")
					}
					m.Signal(s)
					if end := m.Wait(); end.Code != 0 {
						t.Errorf("end: %+v", end)
					}
					if rig.Mounted(t, target) {
						t.Error("still mounted")
					}
					if held {
						// The last page may have come before; further ones cannot.
						r.Want("ENOTCONN", "pread", "100", "200000")
					}
					if entries, err := os.ReadDir(d.Conf); err != nil || len(entries) != 0 {
						t.Errorf("the directory holds %v, %v", entries, err)
					}
				})
			})
		}
	}
}

// Stopped before it is ready, it has changed nothing.
func TestC17_SignalBeforeReady(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	r, w, _ := os.Pipe() // a passphrase that does not come
	defer w.Close()
	cmd := exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", "/dev/fd/3")
	cmd.ExtraFiles = []*os.File{r}
	was := snapshot(t, d)
	m := rig.Start(t, cmd, d.Conf)
	r.Close()
	// The decryptor child is there: all before it has been done.
	rig.WaitFor(t, "the decrypting child", func() bool {
		return rig.Child(cmd.Process.Pid, "internal-decryptor") != 0
	})
	m.Signal(syscall.SIGTERM)
	if end := m.Wait(); end.Code != 60 {
		t.Errorf("end: %+v", end)
	}
	if rig.Mounted(t, d.Conf) {
		t.Error("mounted")
	}
	for path, state := range snapshot(t, d) {
		if was[path] != state {
			t.Errorf("%s was %s and is %s", path, was[path], state)
		}
	}
}

func TestC17_TwiceIsAtOnce(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	m := d.MountOver()
	// A stopped warden does not unmount; the first signal waits for it.
	warden := rig.Child(m.Cmd.Process.Pid, "internal-warden")
	if warden == 0 {
		t.Fatal("no warden")
	}
	syscall.Kill(warden, syscall.SIGSTOP)
	defer syscall.Kill(warden, syscall.SIGKILL)
	m.Signal(syscall.SIGTERM)
	m.WaitEvent("stopping", 1)
	m.Signal(syscall.SIGTERM)
	if end := m.Wait(); end.Code != 60 {
		t.Errorf("end: %+v", end)
	}
}

// The decrypting child is killed: nothing was mounted, nothing removed.
func TestM2_DecryptorIsKilled(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	r, w, _ := os.Pipe()
	defer w.Close()
	cmd := exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", "/dev/fd/3")
	cmd.ExtraFiles = []*os.File{r}
	m := rig.Start(t, cmd, d.Conf)
	r.Close()
	var child int
	rig.WaitFor(t, "the decrypting child", func() bool {
		child = rig.Child(cmd.Process.Pid, "internal-decryptor")
		return child != 0
	})
	syscall.Kill(child, syscall.SIGKILL)
	if end := m.Wait(); end.Code != 52 || rig.Mounted(t, d.Conf) {
		t.Errorf("end: %+v", end)
	}
}

func TestC17_UnmountFromOutside(t *testing.T) {
	for _, held := range []bool{false, true} {
		over(t, func(t *testing.T, d *rig.Dir, target string) {
			m := mountOn(t, d, target)
			r := rig.NewReader(t, nil)
			if held {
				r.Want("ok", "open", d.Secret())
				r.Want(strconv.Quote(string(bytesOf(300_000)[:10])), "read", "10")
			}
			if u := rig.Run(t, "umount", target); held && target == d.Secret() {
				if u.Code != 92 { // the first byte took the mount away
					t.Errorf("umount: %+v", u)
				}
			} else if u.Code != 0 {
				t.Errorf("umount: %+v", u)
			}
			if held {
				// A lazy unmount: who has it open reads on.
				r.Want("0", "seek", "0", "0")
				r.Want(sum(bytesOf(300_000)), "read-all")
				r.Want("ok", "close")
			}
			if end := m.Wait(); end.Code != 0 {
				t.Errorf("end: %+v", end)
			}
			gone(t, d)
		})
	}
}

// Everything else in the directory is there to be read, and to be read only.
func TestC13_TheRestOfTheDirectory(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	d.Write("config/other.txt", []byte("other"))
	os.Mkdir(filepath.Join(d.Conf, "sub"), 0o755)
	d.Write("config/sub/deep.txt", []byte("deep"))
	os.Symlink("other.txt", filepath.Join(d.Conf, "link"))
	os.Symlink("/etc/hostname", filepath.Join(d.Conf, "out"))
	if err := os.WriteFile(filepath.Join(d.Conf, "big"), bytesOf(1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	d.MountOver()
	r := rig.NewReader(t, nil)
	r.Want("big link other.txt out secrets.yaml sub", "list", d.Conf)
	for path, want := range map[string]string{"other.txt": "other", "sub/deep.txt": "deep", "link": "other", "big": string(bytesOf(1 << 20)), "secrets.yaml": content} {
		if got := rig.Cat(t, filepath.Join(d.Conf, path)); got.Out != want {
			t.Errorf("%s: %d bytes, %s", path, len(got.Out), got.Err)
		}
	}
	r.Want("big link other.txt out sub", "list", d.Conf)
	r.Want("EROFS", "change", "create", d.Secret())
	r.Want("EROFS", "change", "unlink", filepath.Join(d.Conf, "other.txt"))
	r.Want("EROFS", "change", "write", filepath.Join(d.Conf, "sub/deep.txt"))
	r.Want("EROFS", "change", "tmpfile", filepath.Join(d.Conf, "sub/deep.txt"))
	// What changes beneath is seen: through the descriptor, not from a copy.
	r.Want("ENOENT", "open", filepath.Join(d.Conf, "nothing"))
}

// Over a file the rest of the directory stays native and writable; when it is
// spent, mount and placeholder are gone and so are we.
func TestC13_OverAFile(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	m := mountOn(t, d, d.Secret())
	// Only from another mount namespace does the name go in one instant.
	if rig.Child(m.Cmd.Process.Pid, "unlink") == 0 {
		t.Error("no process that could remove the name in one instant")
	}
	r := rig.NewReader(t, nil)
	r.Want("ok", "change", "create", d.Secret())
	os.Remove(filepath.Join(d.Conf, "new"))
	r.Want(fmt.Sprintf("100400 %d", len(content)), "stat", d.Secret())
	r.Want("ok", "open", d.Secret())
	r.Want(strconv.Quote(content), "read", "1000")
	// The name went before the first byte came.
	r.Want("ENOENT", "lstat", d.Secret())
	r.Want("", "list", d.Conf)
	r.Want("ok", "close")
	if end := m.Wait(); end.Code != 0 {
		t.Errorf("end: %+v", end)
	}
	if rig.Mounted(t, d.Secret()) {
		t.Error("still mounted")
	}
	gone(t, d)
	// The name is free.
	r.Want("ok", "change", "create", filepath.Join(d.Conf, "secrets.yaml"))
	os.Remove(filepath.Join(d.Conf, "new"))
}

// Several files under one mount, each with its own once.
func TestC3_SeveralFiles(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	other := d.Write("other.json.enc", rig.GPG(t, []byte("other"), rig.Passphrase, "--symmetric", "--s2k-count", "65536"))
	m := d.MountOver("--enc", other)
	r := rig.NewReader(t, nil)
	r.Want("other.json secrets.yaml", "list", d.Conf)
	if got := rig.Cat(t, filepath.Join(d.Conf, "other.json")); got.Out != "other" {
		t.Errorf("%+v", got)
	}
	r.Want("secrets.yaml", "list", d.Conf)
	if s := rig.Run(t, "status", d.Conf); s.Code != 0 {
		t.Errorf("status: %+v", s)
	}
	if got := rig.Cat(t, d.Secret()); got.Out != content {
		t.Errorf("%+v", got)
	}
	m.WaitEvent("delivery", 2)
	gone(t, d)
	// One that cannot be decrypted: none is served.
	d = rig.NewDir(t, []byte(content))
	other = d.Write("other.json.enc", rig.GPG(t, []byte("other"), "another passphrase", "--symmetric", "--s2k-count", "65536"))
	if r := refused(t, d, 31, "--enc", other); !strings.Contains(r.Err, other) {
		t.Errorf("it does not name the file: %s", r.Err)
	}
}

func TestC15_WaitsForTheFile(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	b, _ := os.ReadFile(d.Enc)
	os.Remove(d.Enc)
	m := d.Start("--wait")
	m.WaitEvent("waiting", 1)
	if rig.Mounted(t, d.Conf) {
		t.Error("mounted while waiting")
	}
	if s := rig.Run(t, "status", d.Conf); s.Code != 92 {
		t.Errorf("status: %+v", s)
	}
	if _, err := os.Stat(d.Pass); err != nil {
		t.Errorf("the passphrase file: %v", err)
	}
	d.Write("secrets.yaml.enc", b)
	m.WaitReady()
	if got := rig.Cat(t, d.Secret()); got.Out != content {
		t.Errorf("%+v", got)
	}
}

func TestC15_WaitingIsStopped(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	os.Remove(d.Enc)
	m := d.Start("--wait")
	m.WaitEvent("waiting", 1)
	if end := m.Stop(); end.Code != 60 {
		t.Errorf("end: %+v", end)
	}
}

func TestC11_Expire(t *testing.T) {
	over(t, func(t *testing.T, d *rig.Dir, target string) {
		m := mountOn(t, d, target, "--expire", "1s")
		if e := m.WaitEvent("expiry", 1); e["limit"] != "expire" {
			t.Errorf("expiry: %v", e)
		}
		if target == d.Secret() {
			m.Wait()
		}
		gone(t, d)
	})
}

// The time counts from ready: a start that takes longer loses nothing.
func TestC11_ExpireIsShorterThanTheStart(t *testing.T) {
	over(t, func(t *testing.T, d *rig.Dir, target string) {
		m := mountOn(t, d, target, "--expire", "1ms")
		if e := m.WaitEvent("expiry", 1); e["limit"] != "expire" {
			t.Errorf("expiry: %v", e)
		}
		if _, err := os.Lstat(d.Pass); !os.IsNotExist(err) {
			t.Errorf("the passphrase file: %v", err)
		}
	})
}

// What cannot be unmounted is told by the exit status, with what is left.
func TestC17_UnmountFails(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	m := d.MountOver()
	syscall.Kill(child(t, m.Cmd.Process.Pid, "internal-warden"), syscall.SIGKILL)
	r := m.Stop()
	if r.Code != 14 || !strings.Contains(r.Err, "oncefs: error: the mount could not be taken off") || !strings.Contains(r.Err, d.Conf) || !strings.Contains(r.Err, "oncefs: hint: take it off with: oncefs umount") {
		t.Errorf("%+v", r)
	}
	if r := rig.Run(t, "umount", d.Conf); r.Code != 0 || rig.Mounted(t, d.Conf) {
		t.Errorf("%+v", r)
	}
}

// To ask for the status is no attempt to read, whatever stands in its way.
func TestC20_StatusIsNoAttempt(t *testing.T) {
	over(t, func(t *testing.T, d *rig.Dir, target string) {
		m := mountOn(t, d, target)
		r := rig.NewReader(t, nil)
		r.Want("ok", "open", d.Secret())
		for range 3 {
			if st := rig.Run(t, "status", target, "--json"); st.Code != 90 || !strings.Contains(st.Out, `"attempts":0,`) {
				t.Errorf("%+v", st)
			}
		}
		r.Want("ok", "close")
		m.Stop()
		if late := m.Events("late"); len(late) != 0 {
			t.Errorf("%v", late)
		}
	})
}

// To open it and not to read does not keep it; a read that has begun goes on,
// and is the last.
func TestC11_ExpireWhileOpen(t *testing.T) {
	over(t, func(t *testing.T, d *rig.Dir, target string) {
		r := rig.NewReader(t, nil)
		m := mountOn(t, d, target, "--expire", "3s", "--reads", "3")
		r.Want("ok", "open", d.Secret())
		if e := m.WaitEvent("expiry", 1); e["limit"] != "expire" || e["pid"] != float64(r.Cmd.Process.Pid) {
			t.Errorf("expiry: %v", e)
		}
		r.Want("ESTALE", "read", "10")
		r.Want("ok", "close")
		gone(t, d)
	})
	d := rig.NewDir(t, []byte(content))
	r := rig.NewReader(t, nil)
	m := d.MountOver("--enc", d.Enc, "--name", "secrets.yaml", "--name", "clock", "--expire", "3s", "--reads", "3")
	r.Want("ok", "open", d.Secret())
	r.Want(`"user"`, "read", "4")
	if e := m.WaitEvent("expiry", 1); e["path"] != filepath.Join(d.Conf, "clock") {
		t.Errorf("expiry: %v", e)
	}
	r.Want(strconv.Quote(content[4:]), "read", "100")
	r.Want("ok", "close")
	m.WaitEvent("expiry", 2)
	gone(t, d)
}

func TestC11_Hold(t *testing.T) {
	over(t, func(t *testing.T, d *rig.Dir, target string) {
		m := mountOn(t, d, target, "--hold", "100ms", "--reads", "3")
		r := rig.NewReader(t, nil)
		r.Want("ok", "open", d.Secret())
		r.Do("read", "1000")
		if e := m.WaitEvent("expiry", 1); e["limit"] != "hold" {
			t.Errorf("expiry: %v", e)
		}
		r.Want("ESTALE", "read", "1000")
		r.Want("ESTALE", "pread", "10", "0")
		r.Want("ok", "close")
		gone(t, d)
	})
}

// What a reader has mapped is taken back too.
func TestC11_HoldOfAMapping(t *testing.T) {
	over(t, func(t *testing.T, d *rig.Dir, target string) {
		m := mountOn(t, d, target, "--hold", "1s")
		r := rig.NewReader(t, nil)
		r.Want("ok", "open", d.Secret())
		r.Want("ok", "map", "300000")
		r.Want(strconv.Quote(string(bytesOf(300_000)[:1])), "touch", "0")
		r.Want("ok", "close") // the mapping holds the claim
		m.WaitEvent("expiry", 1)
		// The event is told as the memory is zeroed, and the pages go after it.
		rig.WaitFor(t, "the pages to go", func() bool { return r.Do("touch", "0") == "EFAULT" })
		r.Want("EFAULT", "touch", "200000")
		r.End()
		gone(t, d)
	})
}

// Ready is announced to systemd, to s6 and by the return of --background, and
// never before everything holds.
func TestC19_Notifications(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	socket := filepath.Join(d.Path, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r, w, _ := os.Pipe()
	cmd := exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass, "--notify-fd", "3")
	cmd.ExtraFiles = []*os.File{w}
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+socket)
	rig.Start(t, cmd, d.Conf)
	w.Close()
	buf := make([]byte, 100)
	n, err := conn.Read(buf)
	if err != nil || string(buf[:n]) != "READY=1" {
		t.Errorf("systemd was told %q, %v", buf[:n], err)
	}
	readyNow(t, d)
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil || line != "\n" {
		t.Errorf("s6 was told %q, %v", line, err)
	}
}

func readyNow(t testing.TB, d *rig.Dir) {
	t.Helper()
	if !rig.Mounted(t, d.Conf) {
		t.Error("ready and not mounted")
	}
	if _, err := os.Lstat(d.Pass); !os.IsNotExist(err) {
		t.Errorf("ready and the passphrase file: %v", err)
	}
	if _, err := os.Lstat(d.Secret()); err != nil {
		t.Errorf("ready and %v", err)
	}
}

func TestC19_Background(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	log := filepath.Join(d.Path, "log")
	r := rig.Run(t, "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass, "--background", "--log", log)
	if r.Code != 0 || !strings.Contains(r.Out, "oncefs: ready:") {
		t.Fatalf("%+v", r)
	}
	t.Cleanup(func() { rig.Run(t, "umount", d.Conf) })
	readyNow(t, d)
	if got := rig.Cat(t, d.Secret()); got.Out != content {
		t.Errorf("%+v", got)
	}
	if s := rig.Run(t, "status", d.Conf); s.Code != 91 {
		t.Errorf("status: %+v", s)
	}
	// One that fails says so by its own status.
	rig.Run(t, "umount", d.Conf)
	d.Write("pw", []byte("wrong\n"))
	if r := rig.Run(t, "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass, "--background"); r.Code != 31 {
		t.Errorf("wrong passphrase in the background: %+v", r)
	}
	// A passphrase on a descriptor goes along.
	pr, pw, _ := os.Pipe()
	fmt.Fprintln(pw, rig.Passphrase)
	pw.Close()
	c := exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", "/dev/fd/3", "--background", "--log", log)
	c.ExtraFiles = []*os.File{pr}
	if r := rig.Exec(t, c); r.Code != 0 {
		t.Errorf("descriptor in the background: %+v", r)
	}
}

// Over a file the path that is asked is the claimed one, and the one who asks is
// not the reader.
func TestC19_StatusOverAClaimedFile(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	mountOn(t, d, d.Secret())
	if r := rig.Run(t, "status", d.Secret()); r.Code != 0 {
		t.Errorf("sealed: %+v", r)
	}
	r := rig.NewReader(t, nil)
	r.Want("ok", "open", d.Secret())
	if r := rig.Run(t, "status", d.Secret()); r.Code != 90 || !strings.Contains(r.Out, "claimed") {
		t.Errorf("claimed: %+v", r)
	}
	r.Want("ok", "close")
	if r := rig.Run(t, "status", d.Secret()); r.Code != 0 {
		t.Errorf("given back: %+v", r)
	}
}

// Whom the kernel lets ask, the daemon still refuses: only root and the user who
// mounted see who read.
func TestC19_StatusIsNotForOthers(t *testing.T) {
	rig.Root(t)
	d := rig.NewDir(t, []byte(content))
	m := mountOn(t, d, d.Secret())
	other := rig.NewReader(t, &syscall.Credential{Uid: 65534, Gid: 65534})
	root := rig.NewReader(t, nil)
	ask := func() {
		t.Helper()
		root.Want("ok", "getxattr", d.Secret(), "system.oncefs.status")
		other.Want("EACCES", "getxattr", d.Secret(), "system.oncefs.status")
	}
	ask()
	root.Want("ok", "open", d.Secret())
	ask()
	root.Want("ok", "close")
	m.WaitEvent("give-back", 1)
	ask()
}

func TestC19_Status(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	d.MountOver()
	status := func(code int, state string) map[string]any {
		t.Helper()
		r := rig.Run(t, "status", d.Conf, "--json")
		var st struct {
			Ready   bool
			Sandbox []string
			Files   []map[string]any
		}
		if err := json.Unmarshal([]byte(r.Out), &st); err != nil {
			t.Fatalf("%v: %s", err, r.Out)
		}
		if r.Code != code || !st.Ready || st.Files[0]["state"] != state {
			t.Errorf("status %d, want %d: %s", r.Code, code, r.Out)
		}
		if r := rig.Run(t, "status", d.Conf); r.Code != code || !strings.Contains(r.Out, state) {
			t.Errorf("status for people: %+v", r)
		}
		return st.Files[0]
	}
	status(0, "sealed")
	r := rig.NewReader(t, nil)
	r.Want("ok", "open", d.Secret())
	f := status(90, "claimed")
	if who, _ := f["reader"].(map[string]any); who["pid"] != float64(r.Cmd.Process.Pid) {
		t.Errorf("status names %v", f["reader"])
	}
	r.Want(strconv.Quote(content), "read", "1000")
	r.Want("ok", "close")
	f = status(91, "spent")
	if f["sent"] != float64(len(content)) || f["whole"] != true {
		t.Errorf("status: %v", f)
	}
	if r := rig.Run(t, "status", d.Path); r.Code != 92 {
		t.Errorf("status of another directory: %+v", r)
	}
}

// Every event is one line with all its fields, and never a byte of content.
func TestC20_EventsTellWho(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	m := d.MountOver()
	r := rig.NewReader(t, nil)
	pid := float64(r.Cmd.Process.Pid)
	exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", r.Cmd.Process.Pid))
	want := func(e rig.Event, fields map[string]any) {
		t.Helper()
		for k, v := range fields {
			if e[k] != v {
				t.Errorf("%s: %s is %v, want %v", e.Name(), k, e[k], v)
			}
		}
		for k, v := range map[string]any{"path": d.Secret(), "pid": pid, "uid": float64(os.Getuid()), "gid": float64(os.Getgid()), "exe": exe} {
			if e[k] != v {
				t.Errorf("%s: %s is %v, want %v", e.Name(), k, e[k], v)
			}
		}
		if e["time"] == nil || e["cgroup"] == nil {
			t.Errorf("%s has no time or no cgroup: %v", e.Name(), e)
		}
	}
	r.Want("ok", "open", d.Secret())
	want(m.WaitEvent("claim", 1), nil)
	r.Want("ok", "close")
	want(m.WaitEvent("give-back", 1), map[string]any{"path": d.Secret()})
	r.Want("EROFS", "change", "unlink", d.Secret())
	r.Want("ok", "open", d.Secret())
	r.Want(`"user"`, "read", "4")
	r.Want("ok", "close")
	want(m.WaitEvent("delivery", 1), map[string]any{"sent": 4.0, "of": float64(len(content)), "whole": false})
	r.Want("ENOENT", "open", d.Secret())
	want(m.WaitEvent("late", 1), map[string]any{"op": "lookup"})
	for _, e := range m.Events("") {
		line, _ := json.Marshal(e)
		if strings.Contains(string(line), "hunter2") || strings.Contains(string(line), rig.Passphrase) {
			t.Errorf("a secret in the log: %s", line)
		}
	}
}

// A flood of attempts is counted and not printed.
func TestC20_FloodIsCounted(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	m := d.MountOver()
	rig.Cat(t, d.Secret())
	r := rig.NewReader(t, nil)
	const n = 3000
	for range n {
		r.Want("ENOENT", "open", d.Secret())
	}
	s := rig.Run(t, "status", d.Conf, "--json")
	var st struct{ Files []struct{ Attempts int } }
	if err := json.Unmarshal([]byte(s.Out), &st); err != nil || st.Files[0].Attempts < n {
		t.Errorf("%v: %s", err, s.Out)
	}
	m.WaitEvent("late", 1)
	if told := len(m.Events("late")); told > n/10 {
		t.Errorf("%d of %d attempts are in the log", told, n)
	}
}

// A log that nobody reads stalls no reader.
func TestC20_StuckLogStallsNobody(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	r, w, _ := os.Pipe()
	defer r.Close()
	cmd := exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass, "--reads", "1000000", "--background")
	cmd.Stderr = w
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v %s", err, out)
	}
	w.Close()
	t.Cleanup(func() { rig.Run(t, "umount", d.Conf) })
	reader := rig.NewReader(t, nil)
	for range 2000 { // a pipe holds 64 KiB, the queue 1024 lines
		reader.Want("ok", "open", d.Secret())
		reader.Want(`"u"`, "read", "1")
		reader.Want("ok", "close")
	}
}
