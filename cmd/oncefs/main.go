// Oncefs serves a decrypted file exactly once. See README.md.
package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"github.com/alecthomas/kong"

	"oncefs/internal/alarm"
	"oncefs/internal/decryptor"
	"oncefs/internal/mountpoint"
	"oncefs/internal/warden"
)

func main() {
	os.Exit(run(os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// linkedWithC tells a binary that cannot keep its promises, see cgo.go.
var linkedWithC bool

// run is the whole program; it returns the exit status.
func run(args []string, stdin *os.File, stdout, stderr *os.File) int {
	if linkedWithC {
		ui := &tui{out: stdout, err: stderr}
		return ui.fail(errLinkedWithC)
	}
	if mountpoint.IsHelper(args[0]) {
		return mountpoint.Helper(args[1:], stderr)
	}
	if len(args) > 1 {
		switch args[1] {
		case internalComplete:
			return completeMain(args[2:], stdout, stderr)
		case decryptor.Command:
			return decryptor.Main(args[2:])
		case alarm.Command:
			return alarm.Main(args[2:])
		case warden.Command:
			return warden.Main(args[2:])
		case internalEdit:
			return editMain(args[2:], stdout, stderr)
		case internalRead:
			return readMain(args[2:], stdout, stderr)
		}
	}
	ui := &tui{out: stdout, err: stderr, terminal: terminalOf(stderr)}
	exited := -1
	if c := parseOne(args[1:]); c != nil {
		return start(c, ui, stdin, args)
	}
	parser, err := newParser(&cli{}, stdout, stderr, func(code int) { exited = code })
	if err != nil {
		return ui.fail(err)
	}
	if len(args) < 2 {
		parser.Stdout = stderr
		_, _ = parser.Parse([]string{"--help"}) // prints it
		ui.failUsage(errNoCommand, "")
		return exitUsage
	}
	ctx, err := parser.Parse(asked(args[1:]))
	if exited >= 0 { // --help was asked for and given
		return exited
	}
	if err != nil {
		ui.failUsage(err, selected(err))
		return exitUsage
	}
	return start(chosen(ctx), ui, stdin, args)
}

// A command is what was asked for, with its flags.
type command interface{ Run(*env) error }

// chosen is the command alone: the parser's context grows with the square of the
// number of flags, and would be kept for as long as the command serves.
func chosen(ctx *kong.Context) command {
	return ctx.Selected().Target.Addr().Interface().(command)
}

// start does what was asked.
func start(c command, ui *tui, stdin *os.File, args []string) int {
	binary, err := os.Executable()
	if err != nil {
		return ui.fail(err)
	}
	if binary, err = filepath.EvalSymlinks(binary); err != nil {
		return ui.fail(err)
	}
	err = c.Run(&env{tui: ui, binary: binary, stdin: stdin, args: args})
	var status statusError
	if errors.As(err, &status) {
		return int(status)
	}
	if err != nil {
		return ui.fail(err)
	}
	return 0
}

// parseOne parses with the one command that is named first: to make the parser of
// all of them takes longer than to start a process. Whatever is not a plain use
// of it is nil and left to that parser, which knows what to say.
func parseOne(args []string) command {
	if len(args) == 0 {
		return nil
	}
	command, known := reflect.TypeFor[cli]().FieldByNameFunc(func(name string) bool { return strings.ToLower(name) == args[0] })
	if !known {
		return nil
	}
	asksHelp := false
	one := reflect.New(reflect.StructOf([]reflect.StructField{command})).Interface()
	parser, err := newParser(one, io.Discard, io.Discard, func(int) { asksHelp = true })
	if err != nil {
		return nil
	}
	ctx, err := parser.Parse(args)
	if err != nil || asksHelp {
		return nil
	}
	return chosen(ctx)
}

// newParser makes the parser of the command line, or of a part of it.
func newParser(cli any, stdout, stderr io.Writer, exit func(int)) (*kong.Kong, error) {
	return kong.New(cli, kong.Name("oncefs"), kong.Description(description),
		kong.Writers(stdout, stderr), kong.Exit(exit),
		kong.Vars{"passphrase": defaultPassphraseFile, "maxsize": "64MiB"},
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 80}))
}

// asked makes of the other ways to ask for help or the version the one that the
// parser knows.
func asked(args []string) []string {
	switch args[0] {
	case "help":
		return append(args[1:len(args):len(args)], "--help")
	case "--version":
		return []string{"version"}
	}
	return args
}

// selected is the command in which the error is, or "".
func selected(err error) string {
	var parse *kong.ParseError
	if errors.As(err, &parse) && parse.Context != nil && parse.Context.Selected() != nil {
		return parse.Context.Selected().Name
	}
	return ""
}

// env is what a command gets from main.
type env struct {
	*tui
	binary string // this program's file
	stdin  *os.File
	args   []string
}

// A statusError ends the program with a status that is an answer, not a
// failure; nothing is printed.
type statusError int

func (statusError) Error() string { return "status" }

const description = `Serve a decrypted file exactly once, from memory.

The first program that reads it gets all of it; after that it does not exist.

    oncefs demo                                  # see it first
    oncefs encrypt secrets.yaml                  # asks for a passphrase
    oncefs mount /config --enc secrets.yaml.enc  # asks for it again, and serves
    cat /config/secrets.yaml                     # elsewhere: works once`

type cli struct {
	Mount   mountCmd   `cmd:"" help:"Decrypt into memory and mount, to be read once."`
	Run     runCmd     `cmd:"" help:"Run a program with a mount of its own."`
	Umount  umountCmd  `cmd:"" help:"Unmount, zero the memory and end the serving process."`
	Status  statusCmd  `cmd:"" help:"Tell whether a mount is ready, and who has read it."`
	Encrypt encryptCmd `cmd:"" help:"Encrypt a file or directory with a passphrase, for gpg and for mount."`
	Decrypt decryptCmd `cmd:"" help:"Decrypt to standard output or a file."`
	Edit    editCmd    `cmd:"" help:"Edit an encrypted file, in memory only."`
	Rekey   rekeyCmd   `cmd:"" help:"Change the passphrase or the algorithms of an encrypted file."`
	Check   checkCmd   `cmd:"" help:"Tell what encrypted files are, how strong, and whether they can be served."`
	Install installCmd `cmd:"" help:"Copy this program into a directory, for containers."`
	Copy    copyCmd    `cmd:"" help:"Copy a passphrase from a read-only volume to where mount can remove it."`
	Demo    demoCmd    `cmd:"" help:"Show all of it in a temporary directory."`
	Version versionCmd `cmd:"" help:"Print the version."`

	Completion completionCmd `cmd:"" help:"Print a script that completes oncefs commands in a shell."`
}
