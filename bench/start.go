package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

var sizes = []struct {
	name   string
	bytes  int
	rounds int
}{{"1 KiB", 1 << 10, 25}, {"64 KiB", 64 << 10, 11}, {"1 MiB", 1 << 20, 11}, {"64 MiB", 64 << 20, 9}}

// smallS2K takes no time to speak of. gpg takes a count of 1024 for none, and uses
// its largest.
var smallS2K = []string{"--s2k-count", "65536"}

var stretches = []struct {
	name string
	args []string
}{
	{"default S2K", nil},
	{"small S2K", smallS2K},
}

// oldWayName is what the scripts of 2021 did.
const oldWayName = "gpg + inotify"

// start measures from exec to the last byte in the reader's hands. The reader
// is this process, for every peer.
func (b *bench) start() error {
	dir, err := b.fresh()
	if err != nil {
		return err
	}
	age, err := newAge(b, dir)
	if err != nil {
		return err
	}
	for _, size := range sizes {
		if b.short && size.bytes != 1<<10 && size.bytes != 1<<20 {
			continue
		}
		text := content(size.bytes)
		plain := filepath.Join(dir, "plain")
		if err := os.WriteFile(plain, text, 0o600); err != nil {
			return err
		}
		for _, stretch := range stretches {
			of := size.name + ", " + stretch.name
			enc := filepath.Join(dir, "secrets.yaml.enc")
			os.Remove(enc)
			if err := b.encrypt(enc, text, append([]string{"--armor"}, stretch.args...)...); err != nil {
				return err
			}
			all := []measurement{
				{peer: "gpg -d", must: true, run: func() (float64, error) { return b.startGPG(enc, text) }},
				{peer: "oncefs mount", must: true, run: func() (float64, error) { return b.startMount(enc, text) }},
				{peer: "oncefs mount, over a file", run: func() (float64, error) { return b.startMountFile(enc, text) }},
				{peer: "oncefs run", run: func() (float64, error) { return b.startRun(enc, text) }},
				{peer: oldWayName, every: 3, run: func() (float64, error) { return b.startOldWay(enc, text) }},
			}
			if stretch.args == nil {
				// These stretch no passphrase, or in their own way; once is enough.
				all = append(all,
					measurement{peer: "age -d, key file", every: 3, run: func() (float64, error) { return age.startKey(plain, text) }},
					measurement{peer: "age -d, passphrase", every: 3, run: func() (float64, error) { return age.startPassphrase(plain, text) }},
					measurement{peer: "sops exec-file", every: 3, run: func() (float64, error) { return age.startSops(plain, text) }},
					measurement{peer: "gocryptfs", every: 3, run: func() (float64, error) { return b.startGocryptfs(text) }},
					measurement{peer: "tmpfs file", run: func() (float64, error) { return b.startTmpfs(text) }},
				)
			}
			for i := range all {
				all[i].work, all[i].of = "start", of
			}
			if err := b.interleave(b.rounds(size.rounds), "ms", all); err != nil {
				return err
			}
		}
		// What encrypt writes is ours to choose.
		ours := filepath.Join(dir, "ours.yaml.enc")
		os.Remove(ours)
		pw := filepath.Join(dir, "pw")
		if err := os.WriteFile(pw, []byte(passphrase+"\n"), 0o600); err != nil {
			return err
		}
		if err := quietly(exec.Command(b.oncefs, "encrypt", plain, "-o", ours, "--passphrase-file", pw)); err != nil {
			return err
		}
		of := size.name + ", written by oncefs encrypt"
		err := b.interleave(b.rounds(size.rounds/2+1), "ms", []measurement{
			{work: "start", peer: "gpg -d", of: of, must: true, run: func() (float64, error) { return b.startGPG(ours, text) }},
			{work: "start", peer: "oncefs mount", of: of, must: true, run: func() (float64, error) { return b.startMount(ours, text) }},
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// fromPipe times a command that writes the content to its standard output, up
// to the last byte of it.
func (b *bench) fromPipe(cmd *exec.Cmd, text []byte) (float64, error) {
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	took, err := b.arrival(text, func(got []byte) error {
		if err := cmd.Start(); err != nil {
			return err
		}
		_, err := io.ReadFull(out, got)
		return err
	})
	if cmd.Process == nil {
		return 0, err
	}
	io.Copy(io.Discard, out)
	if waited := cmd.Wait(); waited != nil {
		return 0, fmt.Errorf("%v: %w", cmd.Args, waited)
	}
	return ms(took), err
}

func (b *bench) startGPG(enc string, text []byte) (float64, error) {
	pw := b.passphraseFile()
	if err := os.WriteFile(pw, []byte(passphrase+"\n"), 0o600); err != nil {
		return 0, err
	}
	defer os.Remove(pw)
	return b.fromPipe(b.gpg("--no-autostart", "--passphrase-file", pw, "-d", enc), text)
}

func (b *bench) startMount(enc string, text []byte) (float64, error) {
	dir, err := b.fresh()
	if err != nil {
		return 0, err
	}
	served, _ := cutExt(enc)
	return b.mountAndRead(dir, text, func() (*daemon, string, error) {
		d, err := b.mount(dir, []string{enc})
		return d, filepath.Join(dir, "config", served), err
	})
}

// startRun has cat pass the content on.
func (b *bench) startRun(enc string, text []byte) (float64, error) {
	dir, err := b.fresh()
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	target, pw := filepath.Join(dir, "config"), b.passphraseFile()
	if err := errors.Join(os.Mkdir(target, 0o700), os.WriteFile(pw, []byte(passphrase+"\n"), 0o600)); err != nil {
		return 0, err
	}
	served, _ := cutExt(enc)
	return b.fromPipe(exec.Command(b.oncefs, "run", target, "--enc", enc, "--passphrase-file", pw, "--", "cat", filepath.Join(target, served)), text)
}

func cutExt(path string) (string, bool) {
	base := filepath.Base(path)
	ext := filepath.Ext(base)
	return base[:len(base)-len(ext)], ext != ""
}

func (b *bench) startMountFile(enc string, text []byte) (float64, error) {
	dir, err := b.fresh()
	if err != nil {
		return 0, err
	}
	pw, target := b.passphraseFile(), filepath.Join(dir, "secrets.yaml")
	if err := os.WriteFile(pw, []byte(passphrase+"\n"), 0o600); err != nil {
		return 0, err
	}
	return b.mountAndRead(dir, text, func() (*daemon, string, error) {
		d, err := launch(dir, exec.Command(b.oncefs, "mount", target, "--enc", enc, "--passphrase-file", pw, "--notify-fd", "3"))
		return d, target, err
	})
}

// mountAndRead times a mount and the read of what it serves, and takes it away with
// its directory.
func (b *bench) mountAndRead(dir string, text []byte, mount func() (d *daemon, served string, err error)) (float64, error) {
	var d *daemon
	took, err := b.arrival(text, func(got []byte) (err error) {
		var served string
		if d, served, err = mount(); err != nil {
			return err
		}
		return readInto(served, got)
	})
	if d == nil {
		return 0, err
	}
	return ms(took), errors.Join(err, d.stop(), os.RemoveAll(dir))
}

// startOldWay is what the scripts did: gpg to a file, a watcher that deletes it
// at the first open, and a program that reads it.
func (b *bench) startOldWay(enc string, text []byte) (float64, error) {
	dir, err := b.fresh()
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	o, took, err := b.oldWay(dir, enc)
	if err != nil {
		return 0, err
	}
	read, err := b.arrival(text, func(got []byte) error { return readInto(o.path, got) })
	return ms(took + read), errors.Join(err, o.stop())
}

// oldWay is the scripts' way, running: the plaintext is there, and inotify waits
// for its first open to delete it. Debian's busybox has no inotifyd, so this is
// inotifywait, which does the same.
type oldWay struct {
	path    string
	watcher *exec.Cmd
}

const deleteAtOpen = `inotifywait -qq -e open "$1" && rm -f "$1"`

// oldWay starts it. took leaves out how this program waits for the watch.
func (b *bench) oldWay(dir, enc string) (_ *oldWay, took time.Duration, err error) {
	if _, err := look("inotifywait"); err != nil {
		return nil, 0, err
	}
	pw, path := b.passphraseFile(), filepath.Join(dir, "secrets.yaml")
	if err := os.WriteFile(pw, []byte(passphrase+"\n"), 0o600); err != nil {
		return nil, 0, err
	}
	begin := time.Now()
	if err := quietly(b.gpg("--no-autostart", "--passphrase-file", pw, "-o", path, "-d", enc)); err != nil {
		return nil, 0, err
	}
	if err := os.Remove(pw); err != nil {
		return nil, 0, err
	}
	w := exec.Command("sh", "-c", deleteAtOpen, "watcher", path)
	w.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := w.Start(); err != nil {
		return nil, 0, err
	}
	took = time.Since(begin)
	o := &oldWay{path: path, watcher: w}
	if err := waitFor(func() bool { return watches(tree(w.Process.Pid)) }); err != nil {
		return nil, 0, errors.Join(err, o.stop())
	}
	return o, took, nil
}

func (o *oldWay) stop() error {
	syscall.Kill(-o.watcher.Process.Pid, syscall.SIGKILL)
	o.watcher.Wait()
	return nil
}

func (b *bench) startTmpfs(text []byte) (float64, error) {
	path := filepath.Join("/dev/shm", fmt.Sprintf("oncefs-bench-%d", os.Getpid()))
	if err := os.WriteFile(path, text, 0o600); err != nil {
		return 0, err
	}
	defer os.Remove(path)
	took, err := b.arrival(text, func(got []byte) error { return readInto(path, got) })
	return ms(took), err
}

func (b *bench) startGocryptfs(text []byte) (float64, error) {
	program, err := look("gocryptfs")
	if err != nil {
		return 0, err
	}
	dir, err := b.fresh()
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	cipher, mnt, pw := filepath.Join(dir, "cipher"), filepath.Join(dir, "mnt"), filepath.Join(dir, "pw")
	err = errors.Join(os.Mkdir(cipher, 0o700), os.Mkdir(mnt, 0o700), os.WriteFile(pw, []byte(passphrase+"\n"), 0o600))
	if err != nil {
		return 0, err
	}
	mount := func() error { return quietly(exec.Command(program, "-q", "-passfile", pw, cipher, mnt)) }
	path := filepath.Join(mnt, "secrets.yaml")
	err = quietly(exec.Command(program, "-q", "-init", "-passfile", pw, cipher))
	if err == nil {
		err = mount()
	}
	if err == nil {
		err = errors.Join(os.WriteFile(path, text, 0o600), unmountBelow(mnt))
	}
	if err != nil {
		return 0, err
	}
	took, err := b.arrival(text, func(got []byte) error {
		if err := mount(); err != nil {
			return err
		}
		return readInto(path, got)
	})
	return ms(took), errors.Join(err, unmountBelow(mnt))
}
