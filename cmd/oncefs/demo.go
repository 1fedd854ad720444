package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

type demoCmd struct{}

// Help is shown below the options.
func (demoCmd) Help() string {
	return `Makes a temporary directory, encrypts a sample in it, mounts it, reads it twice,
shows the events, unmounts and leaves nothing. As root it needs no package at
all; another user needs fusermount3 (Debian: fuse3).

Examples:
  oncefs demo`
}

// internalRead makes the binary a reader for the demo, where there is no cat.
const internalRead = "internal-read"

// demo shows commands as a person would type them. Each runs as a process of its
// own: what it shows is what a shell would.
type demo struct {
	*env
	ctx context.Context
	dir string
}

const demoSample = "user: app\npassword: correct horse battery staple\n"

func (demoCmd) Run(e *env) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	defer stop()
	dir, err := os.MkdirTemp("", "oncefs-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	d := &demo{env: e, ctx: ctx, dir: dir}
	err = d.run()
	if ctx.Err() != nil {
		return errStopped
	}
	if err == nil {
		if err = os.RemoveAll(dir); err == nil {
			d.say("Nothing is left: the temporary directory is gone.")
		}
	}
	return err
}

func (d *demo) run() error {
	for name, content := range map[string]string{"secrets.yaml": demoSample, "pw": "a long passphrase\n"} {
		if err := os.WriteFile(filepath.Join(d.dir, name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	if err := os.Mkdir(filepath.Join(d.dir, "config"), 0o755); err != nil {
		return err
	}
	d.say("A secret and a passphrase, in a directory of their own.")
	if err := d.list("."); err != nil {
		return err
	}
	d.say("Encrypt it. What is removed was decrypted again for comparison first.")
	if err := d.self("encrypt", "secrets.yaml", "--passphrase-file", "pw", "--remove-plaintext"); err != nil {
		return err
	}
	d.say("Decrypt it into memory and mount it.")
	d.prompt("oncefs", "mount", "config", "--enc", "secrets.yaml.enc", "--passphrase-file", "pw", "2> events", "&")
	mount, err := d.mount()
	if err != nil {
		return err
	}
	defer mount.end()
	d.say("There it is, an ordinary file. Looking does not consume it. The passphrase file is gone.")
	if err := d.list("config"); err != nil {
		return err
	}
	if err := d.list("."); err != nil {
		return err
	}
	d.say("The first reader gets all of it.")
	got, err := d.read("config/secrets.yaml")
	if err != nil {
		return err
	}
	if got != demoSample {
		return fmt.Errorf("%w: the reader got something else", errSelfCheck)
	}
	d.say("After that there is nothing: not for a reader, not in a listing, not in memory.")
	if _, err := d.read("config/secrets.yaml"); err == nil {
		return fmt.Errorf("%w: a second reader got something", errSelfCheck)
	}
	if err := d.list("config"); err != nil {
		return err
	}
	if err := d.self("status", "config"); err != nil && !as[statusError](err) {
		return err
	}
	d.say("What was seen meanwhile.")
	if err := mount.end(); err != nil {
		return err
	}
	d.prompt("oncefs", "umount", "config")
	d.prompt("cat", "events")
	fmt.Fprint(d.out, mount.events.String())
	return nil
}

func (d *demo) say(text string)        { d.printf("\n# %s\n", text) }
func (d *demo) prompt(words ...string) { d.printf("$ %s\n", strings.Join(words, " ")) }

// command is a process in the demo's directory that ends with the demo.
func (d *demo) command(program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(d.ctx, program, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.Dir, cmd.Stdout, cmd.Stderr = d.dir, d.out, d.err
	return cmd
}

func (d *demo) self(args ...string) error {
	d.prompt(append([]string{"oncefs"}, args...)...)
	err := d.command(d.binary, args...).Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return statusError(exit.ExitCode())
	}
	return err
}

// list shows a directory as ls -l does, which need not be installed.
func (d *demo) list(name string) error {
	d.prompt("ls", "-l", name)
	entries, err := os.ReadDir(filepath.Join(d.dir, name))
	if err != nil {
		return err
	}
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil {
			return err
		}
		d.printf("%s %5d %s %s\n", info.Mode(), info.Size(), info.ModTime().Format("15:04:05"), info.Name())
	}
	if len(entries) == 0 {
		d.printf("total 0\n")
	}
	return nil
}

// read reads in a process of its own: cat, or this binary where there is none.
func (d *demo) read(name string) (string, error) {
	d.prompt("cat", name)
	cmd := d.command(d.binary, internalRead, name)
	if cat, err := exec.LookPath("cat"); err == nil {
		cmd = d.command(cat, name)
	}
	var got strings.Builder
	cmd.Stdout, cmd.Stderr = io.MultiWriter(d.out, &got), d.out
	err := cmd.Run()
	return got.String(), err
}

// readMain is that process.
func readMain(args []string, stdout, stderr io.Writer) int {
	for _, name := range args {
		content, err := os.ReadFile(name)
		if err != nil {
			fmt.Fprintf(stderr, "cat: %v\n", err)
			return 1
		}
		stdout.Write(content)
	}
	return 0
}

// demoMount is the mount that the demo has started.
type demoMount struct {
	cmd    *exec.Cmd
	events strings.Builder
	ended  bool
}

func (d *demo) mount() (*demoMount, error) {
	m := &demoMount{}
	m.cmd = d.command(d.binary, "mount", "config", "--enc", "secrets.yaml.enc", "--passphrase-file", "pw")
	m.cmd.Stdout, m.cmd.Stderr = nil, &m.events
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := m.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		m.end()
		fmt.Fprint(d.out, m.events.String())
		if code := m.cmd.ProcessState.ExitCode(); code > 0 {
			return nil, statusError(code) // it has said why
		}
		return nil, errStopped
	}
	fmt.Fprint(d.out, line)
	return m, nil
}

func (m *demoMount) end() error {
	if m.ended {
		return nil
	}
	m.ended = true
	m.cmd.Process.Signal(unix.SIGTERM)
	return m.cmd.Wait()
}
