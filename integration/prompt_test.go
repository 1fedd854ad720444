package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"oncefs/integration/rig"
)

// echoes tells whether the terminal shows what is typed.
func (tt *terminal) echoes() bool {
	tt.t.Helper()
	state, err := unix.IoctlGetTermios(int(tt.ours.Fd()), unix.TCGETS)
	if err != nil {
		tt.t.Fatal(err)
	}
	return state.Lflag&unix.ECHO != 0
}

// askingTerminal runs a command line of ours in a shell on a terminal. The last
// line that it shows is the exit status.
func askingTerminal(t *testing.T, d *rig.Dir, args ...string) *terminal {
	t.Helper()
	cmd := exec.Command("sh", append([]string{"-c", `trap : INT; "$0" "$@"; echo status=$?`, rig.Binary(t)}, args...)...)
	cmd.Dir = d.Path
	return newTerminal(t, cmd)
}

// What is typed for a passphrase is not shown, and the terminal is as it was
// afterwards, also when it was interrupted.
func TestC14_PromptDoesNotEcho(t *testing.T) {
	if _, err := os.Stat("/etc/init-secrets/secretfile_pw"); err == nil {
		t.Skip("SKIPPED: this machine has a passphrase file where no other is named")
	}
	const typed = "typed-and-not-shown"
	for name, c := range map[string]struct {
		args    []string
		prompts []string
		end     string
	}{
		"encrypt": {[]string{"encrypt", "plain", "-o", "new.enc"}, []string{"passphrase for new.enc: ", "passphrase for new.enc again: "}, "status=0"},
		"decrypt": {[]string{"decrypt", "typed.enc", "-o", "out"}, []string{"passphrase: "}, "status=0"},
		"check":   {[]string{"check", "--verify", "typed.enc"}, []string{"passphrase: "}, "status=93"},
		"rekey":   {[]string{"rekey", "typed.enc"}, []string{"old passphrase: ", "new passphrase for typed.enc: ", "again: "}, "status=0"},
		"mount":   {[]string{"mount", "config", "--enc", "typed.enc", "--background", "--log", "log"}, []string{"passphrase: "}, "status=0"},
	} {
		t.Run(name, func(t *testing.T) {
			d := rig.NewDir(t, []byte(content))
			d.Write("plain", []byte(content))
			d.Write("typed.enc", rig.GPG(t, []byte(content), typed, "--symmetric", "--s2k-count", "65536"))
			tt := askingTerminal(t, d, c.args...)
			for _, prompt := range c.prompts {
				tt.expect(prompt)
				tt.write(typed + "\n")
			}
			tt.expect(c.end)
			if tt.count(typed) != 0 {
				t.Errorf("it was shown: %q", tt.text)
			}
			if !tt.echoes() {
				t.Error("the terminal does not echo afterwards")
			}
			rig.Run(t, "umount", d.Conf)
			os.Remove(filepath.Join(d.Path, "out"))

			tt = askingTerminal(t, d, c.args...)
			tt.expect(c.prompts[0])
			tt.write("half\x03") // Ctrl-C
			tt.expect("status=")
			if !tt.echoes() {
				t.Error("interrupted, the terminal does not echo afterwards")
			}
			if tt.count("half") != 0 {
				t.Errorf("it was shown: %q", tt.text)
			}
			if rig.Mounted(t, d.Conf) {
				t.Error("it is mounted")
			}
		})
	}
}

// Names are others' words: what would command a terminal, or look like another
// line, is shown as an escape.
func TestWords_NamesAreEscaped(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	name := "a\x1b]0;b\a\r\u202e\nc.yaml"
	enc := d.Write(name+".enc", rig.GPG(t, []byte(content), rig.Passphrase, "--symmetric", "--s2k-count", "65536"))
	broken := d.Write(name+".asc", []byte("nothing"))
	conf := filepath.Join(d.Path, "con\x1b[31mf")
	if err := os.Mkdir(conf, 0o755); err != nil {
		t.Fatal(err)
	}
	m := rig.Start(t, exec.Command(rig.Binary(t), "mount", conf, "--enc", enc, "--passphrase-file", d.Pass, "--keep-passphrase"), conf)
	m.WaitReady()
	results := map[string]rig.Result{
		"status": rig.Run(t, "status", conf),
		"check":  rig.Run(t, "check", enc, broken),
		"rekey":  rig.Run(t, "rekey", enc, "--passphrase-file", d.Pass, "--same-passphrase"),
		"error":  rig.Run(t, "decrypt", broken, "--passphrase-file", d.Pass),
		"exists": rig.Run(t, "decrypt", enc, "--passphrase-file", d.Pass, "-o", broken),
		"usage":  rig.Run(t, "mount", conf, "--enc", enc, "--mode", "\x1b[31m"),
		"umount": rig.Run(t, "umount", d.Pass+"\x1b"),
		"mount":  m.Stop(),
	}
	for what, r := range results {
		if text := r.Out + r.Err; strings.ContainsAny(text, "\x1b\a\r\u202e") || !strings.Contains(text, `\x1b`) {
			t.Errorf("%s: %q", what, text)
		}
		for line := range strings.Lines(r.Out + r.Err) {
			if strings.HasPrefix(line, "c.yaml") {
				t.Errorf("%s: a line of the name's own: %q", what, line)
			}
		}
	}
}
