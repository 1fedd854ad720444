package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const passphrase = "correct horse battery staple"

func same(got, want []byte) error {
	if !bytes.Equal(got, want) {
		return errors.New("what was read is not what was meant")
	}
	return nil
}

// look finds a peer's program.
func look(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "", errMissing
	}
	return path, nil
}

// content is config text of that size: keys, and values that do not compress
// well, as secrets do not.
func content(size int) []byte {
	var out bytes.Buffer
	out.Grow(size + 100)
	const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
	x := uint64(0x9e3779b97f4a7c15) // xorshift, the same text in every run
	var value [43]byte
	for i := 0; out.Len() < size; i++ {
		for j := range value {
			x ^= x << 13
			x ^= x >> 7
			x ^= x << 17
			value[j] = digits[x>>58]
		}
		fmt.Fprintf(&out, "service-%d-password: %s\n", i, value[:])
	}
	return out.Bytes()[:size]
}

func (b *bench) gpg(args ...string) *exec.Cmd {
	cmd := exec.Command("gpg", append([]string{"--homedir", b.gpgHome, "--batch", "--quiet", "--pinentry-mode", "loopback"}, args...)...)
	return cmd
}

// passphraseFile is a name for one, in memory, where a pod has it: oncefs
// overwrites and syncs the file, and the old way does not.
func (b *bench) passphraseFile() string {
	b.last++
	return filepath.Join(b.shm, fmt.Sprint("pw", b.last))
}

// encrypt writes content to a file with gpg. Its default S2K count is what its
// agent finds to take 100 ms on this machine.
func (b *bench) encrypt(path string, content []byte, args ...string) error {
	pw := path + ".pw"
	if err := os.WriteFile(pw, []byte(passphrase+"\n"), 0o600); err != nil {
		return err
	}
	defer os.Remove(pw)
	cmd := b.gpg(append([]string{"--passphrase-file", pw, "--symmetric", "--output", path}, args...)...)
	cmd.Stdin = bytes.NewReader(content)
	return quietly(cmd)
}

// quietly runs a command to its end; its error holds what it said.
func quietly(cmd *exec.Cmd) error {
	var said bytes.Buffer
	if cmd.Stderr == nil {
		cmd.Stderr = &said
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %.300s", filepath.Base(cmd.Path), err, strings.TrimSpace(said.String()))
	}
	return nil
}

// A daemon is a peer that runs until it is stopped.
type daemon struct {
	cmd    *exec.Cmd
	target string
	said   *bytes.Buffer
}

// launch starts a daemon that writes a newline to descriptor 3 when it is
// ready, and waits for that.
func launch(target string, cmd *exec.Cmd) (*daemon, error) {
	d := &daemon{cmd: cmd, target: target, said: new(bytes.Buffer)}
	ours, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer ours.Close()
	cmd.ExtraFiles = []*os.File{theirs}
	// A file and not a pipe: nothing of ours wakes up for it.
	log, err := os.CreateTemp("", "oncefs-bench-log-")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	defer os.Remove(log.Name())
	cmd.Stderr = log
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return nil, err
	}
	var ready [1]byte
	if _, err := io.ReadFull(ours, ready[:]); err != nil {
		cmd.Wait()
		said, _ := os.ReadFile(log.Name())
		return nil, fmt.Errorf("%v ended before it was ready: %.500s", cmd.Args, said)
	}
	return d, nil
}

// stop ends the daemon and takes its mount off.
func (d *daemon) stop() error {
	d.cmd.Process.Signal(syscall.SIGTERM)
	ended := make(chan error, 1)
	go func() { ended <- d.cmd.Wait() }()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		d.cmd.Process.Kill()
		<-ended
		return fmt.Errorf("%v did not end", d.cmd.Args)
	}
	return unmountBelow(d.target)
}

// unmountBelow takes off everything that is mounted on or below a directory.
func unmountBelow(dir string) error {
	for range 1000 {
		mounts, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			return err
		}
		found := ""
		for line := range strings.Lines(string(mounts)) {
			if f := strings.Fields(line); len(f) > 1 && (f[1] == dir || strings.HasPrefix(f[1], dir+"/")) {
				found = f[1] // the last one is on top
			}
		}
		if found == "" {
			return nil
		}
		if err := unix.Unmount(found, unix.MNT_DETACH); err != nil {
			if err := exec.Command("fusermount3", "-u", "-z", found).Run(); err != nil {
				return fmt.Errorf("unmount %s: %w", found, err)
			}
		}
	}
	return fmt.Errorf("%s does not come off", dir)
}

// mount starts `oncefs mount` over a fresh directory. The passphrase file is
// made anew, for it is removed.
func (b *bench) mount(dir string, enc []string, args ...string) (*daemon, error) {
	target, pw := filepath.Join(dir, "config"), b.passphraseFile()
	if err := errors.Join(os.MkdirAll(target, 0o700), os.WriteFile(pw, []byte(passphrase+"\n"), 0o600)); err != nil {
		return nil, err
	}
	all := []string{"mount", target, "--passphrase-file", pw, "--notify-fd", "3"}
	for _, e := range enc {
		all = append(all, "--enc", e)
	}
	return launch(target, exec.Command(b.oncefs, append(all, args...)...))
}
