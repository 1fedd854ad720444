package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"oncefs/integration/rig"
)

// The reader may look again; anybody else who comes late is an intruder.
func TestC20_IntrusionIsLogged(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	m := d.MountOver()
	r := rig.NewReader(t, nil)
	r.Want("ok", "open", d.Secret())
	r.Want(sum([]byte(content)), "read-all")
	r.Want("ENOENT", "stat", d.Secret())
	if e := m.WaitEvent("late", 1); e["intrusion"] != nil {
		t.Errorf("the reader itself: %v", e)
	}
	r.Want("ok", "close")
	another := rig.NewReader(t, nil) // another process of the same program
	another.Want("ENOENT", "open", d.Secret())
	if e := m.WaitEvent("late", 2); e["intrusion"] != nil {
		t.Errorf("the same program: %v", e)
	}
	rig.Cat(t, d.Secret())
	e := m.WaitEvent("late", 3)
	if exe, _ := e["exe"].(string); e["intrusion"] != true || !strings.HasSuffix(exe, "cat") {
		t.Errorf("another program: %v", e)
	}
	if r := m.Stop(); r.Code != 0 {
		t.Errorf("%+v", r)
	}
}

// A refused change is none: entrypoints chown what they find.
func TestC20_ChangeIsNoIntrusion(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	m := d.MountOver("--on-intrusion", "exit")
	r := rig.NewReader(t, nil)
	r.Want("EROFS", "change", "chmod", d.Secret())
	r.Want("EROFS", "change", "chown", d.Secret())
	r.Want("ok", "open", d.Secret())
	m.WaitEvent("claim", 1)
	for _, e := range m.Events("refusal") {
		if e["intrusion"] != nil {
			t.Errorf("%v", e)
		}
	}
}

func TestC20_OnIntrusionExit(t *testing.T) {
	ended := func(t *testing.T, d *rig.Dir, m *rig.Mount, who string) {
		t.Helper()
		r := m.Wait()
		if r.Code != 70 || !strings.Contains(r.Err, who) || !strings.Contains(r.Err, "oncefs: hint: ") || strings.Contains(r.Err, "hunter2") {
			t.Errorf("%+v", r)
		}
		if rig.Mounted(t, d.Conf) {
			t.Error("it is mounted still")
		}
	}
	t.Run("late", func(t *testing.T) {
		d := rig.NewDir(t, []byte(content))
		m := d.MountOver("--on-intrusion", "exit")
		r := rig.NewReader(t, nil)
		r.Want("ok", "open", d.Secret())
		r.Want(`"user"`, "read", "4")
		if got := rig.Cat(t, d.Secret()); got.Code == 0 || got.Out != "" {
			t.Errorf("%+v", got)
		}
		ended(t, d, m, "late lookup by ")
		if got := r.Do("read", "10"); got != "ENOTCONN" && got != "ESTALE" && got != "ECONNABORTED" {
			t.Errorf("the claim goes on: %s", got)
		}
	})
	t.Run("refused", func(t *testing.T) {
		d := rig.NewDir(t, []byte(content))
		m := d.MountOver("--on-intrusion", "exit", "--reader-exe", copyOf(t, d, "cat", "app"))
		if got := rig.Cat(t, d.Secret()); got.Code == 0 || got.Out != "" {
			t.Errorf("%+v", got)
		}
		ended(t, d, m, "refusal open by ")
	})
}

// Under run the program is ended too, and nothing of it is left.
func TestC20_OnIntrusionExitEndsTheProgram(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	cmd := exec.Command(rig.Binary(t), "run", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass, "--on-intrusion", "exit",
		"--", "sh", "-c", `cat "$0"; head "$0"; read x; echo after`, d.Secret())
	in, err := cmd.StdinPipe() // it waits for this one
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	r := rig.Exec(t, cmd)
	if r.Code != 70 || r.Out != content || !strings.Contains(r.Err, `"intrusion":true`) {
		t.Errorf("%+v", r)
	}
}

// Also where the program's last act is the attempt, and it ends by itself.
func TestC20_OnIntrusionExitIsNotMasked(t *testing.T) {
	for range 5 {
		d := rig.NewDir(t, []byte(content))
		cmd := exec.Command(rig.Binary(t), "run", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass, "--on-intrusion", "exit",
			"--", "sh", "-c", `cat "$0"; exec head "$0"`, d.Secret())
		if r := rig.Exec(t, cmd); r.Code != 70 || r.Out != content {
			t.Errorf("%+v", r)
		}
	}
}

// A command that hangs does not keep us from ending.
func TestC20_OnIntrusionExecThatHangs(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	started := filepath.Join(d.Path, "started")
	script := d.Write("alarm.sh", []byte("#!/bin/sh\necho $$ >"+started+".new; mv "+started+".new "+started+"\nread x <"+filepath.Join(d.Path, "fifo")+"\n"))
	os.Chmod(script, 0o755)
	syscall.Mkfifo(filepath.Join(d.Path, "fifo"), 0o600)
	m := d.MountOver("--on-intrusion", "exec:"+script, "--reader-exe", copyOf(t, d, "cat", "app"))
	rig.Cat(t, d.Secret())
	var pid []byte
	rig.WaitFor(t, "the command", func() bool { pid, _ = os.ReadFile(started); return len(pid) > 0 })
	begun := time.Now()
	if r := m.Stop(); r.Code != 0 || time.Since(begun) > 30*time.Second { // its minute is longer
		t.Errorf("%+v after %v", r, time.Since(begun))
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(pid)))
	syscall.Kill(n, syscall.SIGKILL)
}

// The command gets the event, and nothing else of ours.
func TestC20_OnIntrusionExec(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	out := filepath.Join(d.Path, "alarm")
	script := d.Write("alarm.sh", []byte(`#!/bin/sh
# Children of a shell have its descriptors and variables.
{ cat; env | grep -v -e ^PWD= -e ^_= -e ^SHLVL= -e ^OLDPWD=; readlink /proc/$$/fd/*; } >`+out+`.new 2>&1
mv `+out+`.new `+out+`
`))
	os.Chmod(script, 0o755)
	cmd := exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", "/dev/fd/3", "--on-intrusion", "exec:"+script)
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(pw, rig.Passphrase)
	pw.Close()
	spare, err := os.Open(d.Pass) // another that the command must not get
	if err != nil {
		t.Fatal(err)
	}
	defer spare.Close()
	cmd.ExtraFiles = []*os.File{pr, spare, spare}
	cmd.Env = append(os.Environ(), "SECRET_OF_OURS=1")
	m := rig.Start(t, cmd, d.Conf)
	pr.Close()
	m.WaitReady()
	r := rig.NewReader(t, nil)
	r.Want("ok", "open", d.Secret())
	r.Want(sum([]byte(content)), "read-all")
	r.Want("ok", "close")
	rig.Cat(t, d.Secret())
	var b []byte
	rig.WaitFor(t, "the command", func() bool { b, err = os.ReadFile(out); return err == nil })
	line, rest, _ := strings.Cut(string(b), "\n")
	var e rig.Event
	if err := json.Unmarshal([]byte(line), &e); err != nil || e.Name() != "late" || e["intrusion"] != true || e["path"] != d.Secret() {
		t.Errorf("%v: %s", err, line)
	}
	for _, secret := range []string{"hunter2", rig.Passphrase} {
		if strings.Contains(string(b), secret) {
			t.Errorf("a secret: %s", b)
		}
	}
	for i, l := range strings.Split(strings.TrimSpace(rest), "\n") {
		switch {
		case i == 0 && strings.HasPrefix(l, "PATH=/usr/"):
		case i > 0 && (strings.HasPrefix(l, "pipe:") || l == "/dev/null" || l == script || strings.HasPrefix(l, out)):
			// Its standard input and output, and the script itself.
		default:
			t.Errorf("the command also has %q", l)
		}
	}
	if e := m.Events("intrusion-command"); len(e) != 0 {
		t.Errorf("%v", e)
	}
}

// A command that does not end, or is wrong, stalls nobody and is told.
func TestC20_OnIntrusionExecNeverBlocks(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	fifo, started := filepath.Join(d.Path, "fifo"), filepath.Join(d.Path, "started")
	syscall.Mkfifo(fifo, 0o600)
	script := d.Write("alarm.sh", []byte("#!/bin/sh\necho >>"+started+"\nread x <"+fifo+"\nexit 3\n"))
	os.Chmod(script, 0o755)
	m := d.MountOver("--on-intrusion", "exec:"+script, "--reads", "2", "--reader-exe", copyOf(t, d, "cat", "app"))
	rig.Cat(t, d.Secret())
	rig.WaitFor(t, "the command", func() bool { _, err := os.Stat(started); return err == nil })
	for range 10 { // it hangs; attempts by other processes go on
		if got := rig.Cat(t, d.Secret()); got.Code == 0 {
			t.Errorf("%+v", got)
		}
	}
	if r := rig.Exec(t, exec.Command(filepath.Join(d.Path, "app"), d.Secret())); r.Out != content {
		t.Errorf("the app: %+v", r)
	}
	if b, _ := os.ReadFile(started); len(b) != 1 {
		t.Errorf("it was started %d times at once", len(b))
	}
	w, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	fmt.Fprintln(w, "go on")
	if e := m.WaitEvent("intrusion-command", 1); e["error"] != "exit status 3" {
		t.Errorf("%v", e)
	}
	fmt.Fprintln(w, "go on") // for the one that waited
	m.WaitEvent("intrusion-command", 2)
	m.Stop()
	d.WritePass()
	refused(t, d, 80, "--on-intrusion", "exec:/nonexistent/command")
	refused(t, d, 80, "--on-intrusion", "mail")
}
