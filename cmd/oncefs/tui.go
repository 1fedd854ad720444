package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"oncefs/internal/decryptor"
)

// tui holds every word to a person outside the event log. Errors are one line,
// lower case, "oncefs: error: FILE: ACT: WHY"; what to do about it is a second
// line, "oncefs: hint: …", chosen in exit.go by the kind of error. Neither ever
// holds a byte of a secret or a passphrase. Names are others' words: what would
// command a terminal or forge a line is shown as an escape.
type tui struct {
	out, err io.Writer
	terminal *os.File // standard error, if a person sees it; nil if not
}

// printf prints strings and errors as printable makes them.
func (t *tui) printf(format string, a ...any) {
	for i := range a {
		switch v := a[i].(type) {
		case string:
			a[i] = printable(v)
		case error:
			a[i] = printable(v.Error())
		}
	}
	fmt.Fprintf(t.out, format, a...)
}

// printable is a text on one line in which everything can be seen.
func printable(s string) string {
	var b strings.Builder
	for i, r := range s {
		_, n := utf8.DecodeRuneInString(s[i:])
		if r == utf8.RuneError && n == 1 {
			fmt.Fprintf(&b, `\x%02x`, s[i])
		} else if unicode.IsPrint(r) {
			b.WriteRune(r)
		} else {
			quoted := strconv.QuoteRune(r)
			b.WriteString(quoted[1 : len(quoted)-1])
		}
	}
	return b.String()
}

func (t *tui) warn(warning, hint string) {
	fmt.Fprintf(t.err, "oncefs: warning: %s\n", printable(warning))
	t.hint(hint)
}

func (t *tui) hint(hint string) {
	if hint != "" {
		fmt.Fprintf(t.err, "oncefs: hint: %s\n", printable(hint))
	}
}

// fail tells an error and what to do about it, and returns the exit status.
func (t *tui) fail(err error) int {
	exit := exitFor(err)
	// A joined error has several lines; a reader of logs wants one.
	fmt.Fprintf(t.err, "oncefs: error: %s\n", printable(strings.ReplaceAll(err.Error(), "\n", "; ")))
	t.hint(exit.hint(err))
	return exit.code
}

// failUsage tells what is wrong with a command line, and where its command is
// explained.
func (t *tui) failUsage(err error, command string) {
	fmt.Fprintf(t.err, "oncefs: error: %s\n", printable(err.Error()))
	if command == "" {
		t.hint("oncefs --help lists the commands, oncefs COMMAND --help explains one")
	} else {
		t.hint("oncefs " + command + " --help explains it")
	}
}

// askYes asks a person at the terminal; no answer is yes. asked is false where
// there is nobody to ask.
func askYes(question string) (yes, asked bool) {
	tty, err := decryptor.OpenTerminal()
	if err != nil {
		return false, false
	}
	defer tty.Close()
	for {
		line, ok := readLine(tty, "oncefs: "+printable(question)+" [Y/n] ")
		if !ok {
			return false, false
		}
		switch strings.ToLower(line) {
		case "", "y", "yes":
			return true, true
		case "n", "no":
			return false, true
		}
	}
}

// readLine asks for a line at the terminal. It reads no further than its end.
func readLine(tty *os.File, prompt string) (line string, ok bool) {
	io.WriteString(tty, prompt)
	var b [1]byte
	for {
		if n, err := tty.Read(b[:]); err != nil || n == 0 {
			io.WriteString(tty, "\n")
			return "", false
		}
		if b[0] == '\n' {
			return strings.TrimSpace(line), true
		}
		line += string(b[:])
	}
}
