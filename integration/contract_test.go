package integration

import (
	"bufio"
	"fmt"
	"hash/fnv"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"oncefs/integration/rig"
)

const content = "user: app\npassword: hunter2\n"

func TestC3_OneReaderGetsAll(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	m := d.MountOver()
	if got := rig.Cat(t, d.Secret()); got.Out != content {
		t.Fatalf("got %+v", got)
	}
	if got := rig.Cat(t, d.Secret()); got.Code == 0 || got.Out != "" {
		t.Fatalf("second read: %+v", got)
	}
	if e := m.WaitEvent("delivery", 1); e["whole"] != true {
		t.Fatalf("delivery: %v", e)
	}
	if _, err := os.Lstat(d.Pass); err == nil {
		t.Fatal("C14: the passphrase file is there")
	}
	if r := m.Stop(); r.Code != 0 {
		t.Fatalf("exit: %+v", r)
	}
}

func TestC1_LookingClaimsNothing(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	d.MountOver()
	r := rig.NewReader(t, nil)
	for range 2 {
		r.Want(fmt.Sprintf("100400 %d", len(content)), "stat", d.Secret())
		r.Want("ok", "access", d.Secret())
		r.Want("secrets.yaml", "list", d.Conf)
		r.Want("ENODATA", "getxattr", d.Secret(), "user.x")
		r.Want("ok", "opath", d.Secret())
	}
	r.Want("ok", "open", d.Secret())
	r.Want(`"user"`, "read", "4")
}

func TestC2_ClaimedIsGoneForOthers(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	d.MountOver()
	a, b := rig.NewReader(t, nil), rig.NewReader(t, nil)
	a.Want("ok", "open", d.Secret())
	b.Want("ENOENT", "open", d.Secret())
	b.Want("ENOENT", "stat", d.Secret())
	b.Want("", "list", d.Conf)
	a.Want("ENOENT", "reopen") // C8
	a.Want("ok", "close")      // C4: given back
	b.Want("ok", "open", d.Secret())
	b.Want(`"u"`, "read", "1")
	b.Want("ok", "close") // C5: spent by one byte
	a.Want("ENOENT", "open", d.Secret())
}

func TestC7_ChangesAreRefused(t *testing.T) {
	d := rig.NewDir(t, []byte(content))
	os.WriteFile(d.Conf+"/other.txt", []byte("x"), 0o600)
	d.MountOver()
	r := rig.NewReader(t, nil)
	for _, how := range []string{"write", "read-write", "truncate-open", "append", "truncate", "chmod", "chown", "utimes", "unlink", "rename", "rename-over", "link", "symlink", "create", "mkdir", "mknod", "setxattr", "removexattr"} {
		r.Want("EROFS", "change", how, d.Secret())
	}
	r.Want("ok", "open", d.Secret())
}

func TestC3_Race(t *testing.T) {
	rounds := 3
	if os.Getenv("ONCEFS_ROUNDS") != "" {
		fmt.Sscan(os.Getenv("ONCEFS_ROUNDS"), &rounds)
	}
	program := racers(t)
	for _, procs := range []string{"", "1"} {
		for _, over := range []string{"directory", "file"} {
			t.Run(over+procs, func(t *testing.T) {
				d := rig.NewDir(t, []byte(content))
				for range rounds {
					raceOnce(t, program, d, over, procs)
				}
			})
		}
	}
}

// racers compiles the program that races.
func racers(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "racers")
	cc := exec.Command(rig.Need(t, "gcc", "gcc libc6-dev"), "-O1", "-o", path, "testdata/racers.c")
	if r := rig.Exec(t, cc); r.Code != 0 {
		t.Fatalf("gcc: %s", r.Err)
	}
	return path
}

func raceOnce(t *testing.T, racers string, d *rig.Dir, over, procs string) {
	d.WritePass()
	target := d.Conf
	if over == "file" {
		target = d.Secret()
	}
	cmd := exec.Command(rig.Binary(t), "mount", target, "--enc", d.Enc, "--passphrase-file", d.Pass)
	if procs != "" {
		cmd.Env = append(os.Environ(), "GOMAXPROCS="+procs)
	}
	m := rig.Start(t, cmd, target)
	m.WaitReady()
	gate, open, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	readers := exec.Command(racers, d.Secret(), "200")
	readers.ExtraFiles, readers.Stderr = []*os.File{gate}, os.Stderr
	out, err := readers.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := readers.Start(); err != nil {
		t.Fatal(err)
	}
	gate.Close()
	got := map[string]int{}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if lines.Text() == "ready" {
			open.Close() // all of them stand at the gate
			continue
		}
		got[lines.Text()]++
	}
	if err := readers.Wait(); err != nil {
		t.Fatal(err)
	}
	h := fnv.New64a()
	h.Write([]byte(content))
	whole := fmt.Sprintf("%d bytes %016x", len(content), h.Sum64())
	if len(got) != 2 || got[whole] != 1 || got["ENOENT"] != 199 {
		t.Fatalf("%v", got)
	}
	m.Signal(syscall.SIGTERM)
	if r := m.Wait(); r.Code != 0 {
		t.Fatalf("%+v", r)
	}
}
