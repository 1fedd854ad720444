package integration

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"oncefs/integration/rig"
)

// script runs the scripts whose names begin with a command's. In them oncefs is
// the program under test; gpg has an empty home and pw is a passphrase file.
func script(t *testing.T, command string) {
	rig.Need(t, "gpg", "gnupg")
	files, err := filepath.Glob("testdata/script-cli/" + command + "-*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no script for %s: %v", command, err)
	}
	bin := rig.Binary(t)
	testscript.Run(t, testscript.Params{
		Files:               files,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Defer(func() { unmountBelow(env.WorkDir) })
			home := filepath.Join(env.WorkDir, ".home")
			dir := filepath.Join(env.WorkDir, ".bin")
			env.Setenv("HOME", home)
			env.Setenv("GNUPGHOME", filepath.Join(home, "gnupg"))
			env.Setenv("PATH", dir+":"+env.Getenv("PATH"))
			return errors.Join(os.MkdirAll(filepath.Join(home, "gnupg"), 0o700), os.Mkdir(dir, 0o755),
				os.Symlink(bin, filepath.Join(dir, "oncefs")),
				os.WriteFile(filepath.Join(env.WorkDir, "pw"), []byte(rig.Passphrase+"\n"), 0o600))
		},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, errors.New("unknown condition")
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":     exits,
			"gpg":       gpg,
			"corrupt":   corrupt,
			"mode":      mode,
			"files":     onlyFiles,
			"unmounted": unmounted,
			"deserted":  deserted,
		},
	})
}

// exits N PROGRAM ARGS... runs a program that must end with that status.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits N PROGRAM ARGS...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("%s ended with %d, not %d", args[1], got, want)
	}
}

// gpg ARGS... runs gpg with the passphrase in pw.
func gpg(ts *testscript.TestScript, neg bool, args []string) {
	err := ts.Exec("gpg", append([]string{"--batch", "--yes", "--quiet", "--no-autostart", "--pinentry-mode", "loopback", "--passphrase-file", "pw", "--s2k-count", "1048576"}, args...)...)
	if (err == nil) == neg {
		ts.Fatalf("gpg %v: %v", args, err)
	}
}

// corrupt FILE OFFSET changes one bit; a negative offset counts from the end.
func corrupt(ts *testscript.TestScript, _ bool, args []string) {
	path := ts.MkAbs(args[0])
	b, err := os.ReadFile(path)
	ts.Check(err)
	at, err := strconv.Atoi(args[1])
	ts.Check(err)
	if at < 0 {
		at += len(b)
	}
	b[at] ^= 1
	ts.Check(os.WriteFile(path, b, 0o600))
}

// mode FILE OCTAL checks permission bits.
func mode(ts *testscript.TestScript, _ bool, args []string) {
	info, err := os.Stat(ts.MkAbs(args[0]))
	ts.Check(err)
	want, err := strconv.ParseUint(args[1], 8, 32)
	ts.Check(err)
	if info.Mode().Perm() != os.FileMode(want) {
		ts.Fatalf("%s has mode %v", args[0], info.Mode())
	}
}

// files DIR NAMES... checks that a directory holds these and nothing else.
func onlyFiles(ts *testscript.TestScript, _ bool, args []string) {
	entries, err := os.ReadDir(ts.MkAbs(args[0]))
	ts.Check(err)
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if want := strings.Join(args[1:], " "); strings.Join(got, " ") != want {
		ts.Fatalf("%s holds %v, not %s", args[0], got, want)
	}
}

// unmounted PATH checks that nothing of ours is mounted there.
func unmounted(ts *testscript.TestScript, neg bool, args []string) {
	for _, m := range mountsBelow(ts.MkAbs(args[0])) {
		ts.Fatalf("%s is mounted", m)
	}
}

// mountsBelow lists the mounts at or below a path, the innermost first.
func mountsBelow(path string) (below []string) {
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && (f[1] == path || strings.HasPrefix(f[1], path+"/")) {
			below = append([]string{f[1]}, below...)
		}
	}
	return below
}

// unmountBelow takes away what a script that failed half-way has left.
func unmountBelow(path string) {
	for _, m := range mountsBelow(path) {
		exec.Command("fusermount3", "-u", "-z", m).Run()
		syscall.Unmount(m, 2 /* MNT_DETACH */)
	}
}

// deserted PATH waits until no process names the path in its command line, or
// is in it, and checks that nothing is mounted there.
func deserted(ts *testscript.TestScript, neg bool, args []string) {
	path := ts.MkAbs(args[0])
	unmounted(ts, false, args)
	uses := func() (who string) {
		procs, _ := filepath.Glob("/proc/[0-9]*")
		for _, p := range procs {
			line, _ := os.ReadFile(p + "/cmdline")
			cwd, _ := os.Readlink(p + "/cwd")
			if strings.Contains(string(line), path) || strings.HasPrefix(cwd+"/", path+"/") {
				who = p + " " + strings.ReplaceAll(string(line), "\x00", " ")
			}
		}
		return who
	}
	for deadline := time.Now().Add(time.Minute); uses() != ""; runtime.Gosched() {
		if time.Now().After(deadline) {
			ts.Fatalf("%s is used by %s", path, uses())
		}
	}
}

func TestC21_Mount(t *testing.T)        { script(t, "mount") }
func TestC22_Encrypt(t *testing.T)      { script(t, "encrypt") }
func TestC19_UmountStatus(t *testing.T) { script(t, "umount") }
func TestVersion(t *testing.T)          { script(t, "version") }
func TestDemo(t *testing.T)             { script(t, "demo") }

func TestC23_Decrypt(t *testing.T) { script(t, "decrypt") }

// TestC23_DecryptLarge: nothing comes out of a message whose last byte is bad,
// however long it is.
func TestC23_DecryptLarge(t *testing.T) {
	content := bytes.Repeat([]byte("sixteen bytes..\n"), 5<<16)
	d := rig.NewDir(t, content)
	if got := rig.Run(t, "decrypt", d.Enc, "--passphrase-file", d.Pass); got.Code != 0 || got.Out != string(content) {
		t.Fatalf("code %d, %d bytes, %s", got.Code, len(got.Out), got.Err)
	}
	whole, err := os.ReadFile(d.Enc)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string][]byte{
		"the last bit changed": append(whole[:len(whole)-1:len(whole)-1], whole[len(whole)-1]^1),
		"cut by one byte":      whole[:len(whole)-1],
		"cut in half":          whole[:len(whole)/2],
		"one byte more":        append(whole[:len(whole):len(whole)], 0),
	} {
		if got := rig.Run(t, "decrypt", d.Write("bad.enc", bad), "--passphrase-file", d.Pass); got.Code != 40 || got.Out != "" {
			t.Errorf("%s: code %d, %d bytes came out, %s", name, got.Code, len(got.Out), got.Err)
		}
	}
}

func TestEdit(t *testing.T) { script(t, "edit") }

func TestCheck(t *testing.T)  { script(t, "check") }
func TestRekey(t *testing.T)  { script(t, "rekey") }
func TestBundle(t *testing.T) { script(t, "bundle") }
