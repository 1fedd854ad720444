package integration

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"oncefs/integration/rig"
)

// shown mounts with the log on a terminal, reads once, and returns what it shows.
func shown(t testing.TB, env []string, args ...string) string {
	t.Helper()
	d := rig.NewDir(t, []byte(content))
	ours, theirs := openTerminal(t)
	cmd := exec.Command(rig.Binary(t), append([]string{"mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass, "--background"}, args...)...)
	cmd.Env = append(append(os.Environ(), "NO_COLOR=", "TERM=xterm"), env...)
	cmd.Stderr = theirs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	rig.Cat(t, d.Secret())
	rig.Cat(t, d.Secret())
	rig.Run(t, "umount", d.Conf)
	theirs.Close()
	var all strings.Builder
	buf := make([]byte, 10_000)
	for {
		// EIO: the last of the other end's descriptors is closed.
		n, err := ours.Read(buf)
		all.Write(buf[:n])
		if err != nil {
			return all.String()
		}
	}
}

func TestC20_LogOnATerminal(t *testing.T) {
	text := shown(t, nil)
	for _, event := range []string{"ready", "claim", "delivery", "late", "unmounted"} {
		if !regexp.MustCompile(`(?m)^\S*\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S* \S*(INF|WRN)\S* ` + event + ` `).MatchString(text) {
			t.Errorf("no line for %s:\n%s", event, text)
		}
	}
	if !strings.Contains(text, "\x1b[") {
		t.Errorf("no colour:\n%q", text)
	}
	for _, env := range []string{"NO_COLOR=1", "TERM=dumb"} {
		if text := shown(t, []string{env}); strings.Contains(text, "\x1b") || !strings.Contains(text, " INF ready ") {
			t.Errorf("%s:\n%q", env, text)
		}
	}
	if text := shown(t, nil, "--log-format", "json"); !json.Valid([]byte(strings.SplitN(text, "\n", 2)[0])) {
		t.Errorf("it is no JSON:\n%q", text)
	}
}

func TestC20_LogInAFile(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	log := filepath.Join(d.Path, "log")
	m := rig.Start(t, exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass, "--log", log, "--log-format", "text"), d.Conf)
	m.WaitReady()
	rig.Cat(t, d.Secret())
	m.Stop()
	b, err := os.ReadFile(log)
	if err != nil || strings.Contains(string(b), "\x1b") || !regexp.MustCompile(`(?m)^\S+ \S+ INF delivery path=\S+ sent=28 of=28 whole=true left=0 pid=`).Match(b) {
		t.Errorf("%v\n%s", err, b)
	}
	refused(t, d, 80, "--log-format", "xml")
}

// A program is named by whoever starts it; its name cannot forge a line or write
// to the terminal.
func TestC20_HostileName(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		d := rig.NewDir(t, []byte(content))
		log := filepath.Join(d.Path, "log")
		m := rig.Start(t, exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass, "--log", log, "--log-format", format), d.Conf)
		m.WaitReady()
		app := copyOf(t, d, "cat", "a\n2026-01-01 00:00:00 INF forged\x1b[31m \"x=y")
		if r := rig.Exec(t, exec.Command(app, d.Secret())); r.Out != content {
			t.Errorf("%+v", r)
		}
		m.Stop()
		b, err := os.ReadFile(log)
		if err != nil || strings.Contains(string(b), "\x1b") || !strings.Contains(string(b), "forged") {
			t.Errorf("%v\n%q", err, b)
		}
		for line := range strings.Lines(string(b)) {
			if strings.HasPrefix(line, "2026-01-01 ") || format == "json" && !json.Valid([]byte(line)) {
				t.Errorf("forged: %q", line)
			}
		}
	}
}

// Times are in the local zone, also those that are told from inside the sandbox.
func TestC20_LocalTime(t *testing.T) {
	if _, err := os.Stat("/usr/share/zoneinfo/Asia/Tokyo"); err != nil {
		t.Fatal("apt-get install tzdata")
	}
	d := rig.NewDir(t, []byte(content))
	cmd := exec.Command(rig.Binary(t), "mount", d.Conf, "--enc", d.Enc, "--passphrase-file", d.Pass)
	cmd.Env = append(os.Environ(), "TZ=Asia/Tokyo")
	m := rig.Start(t, cmd, d.Conf)
	m.WaitReady()
	rig.Cat(t, d.Secret())
	e := m.WaitEvent("delivery", 1)
	text, _ := e["time"].(string)
	at, err := time.Parse(time.RFC3339Nano, text)
	if err != nil || !strings.HasSuffix(text, "+09:00") || time.Since(at).Abs() > time.Hour {
		t.Errorf("%q: %v", text, err)
	}
}

// Who reads is named by the program that opens, also where the same process looked
// at the file, or read it, as another one a moment before.
func TestC20_WhoOpensIsNamed(t *testing.T) {
	program := func(name, debianPackage string) string {
		path, err := filepath.EvalSymlinks(rig.Need(t, name, debianPackage))
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	sh, cat := program("sh", "dash"), program("cat", "coreutils")
	d := rig.NewDir(t, []byte(content))
	m := d.MountOver("--reads", "60")
	n := 0
	for range 20 {
		for _, c := range []struct {
			script  string
			readers []string
		}{
			{`test -r "$0"; exec cat "$0"`, []string{cat}},
			{`read -r line <"$0"; exec cat "$0"`, []string{sh, cat}},
		} {
			if r := rig.Exec(t, exec.Command(sh, "-c", c.script, d.Secret())); r.Out != content {
				t.Fatalf("%s: %+v", c.script, r)
			}
			for _, reader := range c.readers {
				n++
				for _, event := range []string{"claim", "delivery"} {
					if e := m.WaitEvent(event, n); e["exe"] != reader {
						t.Errorf("%s: %s %d: %v, want %s", c.script, event, n, e, reader)
					}
				}
			}
		}
	}
}
