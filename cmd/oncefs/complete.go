package main

import (
	_ "embed"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/alecthomas/kong"

	"oncefs/internal/mountpoint"
)

type completionCmd struct {
	Shell string `arg:"" enum:"bash,zsh,fish" help:"The shell: bash, zsh or fish."`
}

// Help is shown below the options.
func (completionCmd) Help() string {
	return `The script asks oncefs itself what can come next, and need not be made again
for another version.

Examples:
  . <(oncefs completion bash)        # this shell only
  oncefs completion bash >/etc/bash_completion.d/oncefs
  oncefs completion zsh >"${fpath[1]}/_oncefs"
  oncefs completion fish >~/.config/fish/completions/oncefs.fish`
}

//go:embed completion/oncefs.bash
var completionBash string

//go:embed completion/oncefs.zsh
var completionZsh string

//go:embed completion/oncefs.fish
var completionFish string

func (c *completionCmd) Run(e *env) error {
	script := map[string]string{"bash": completionBash, "zsh": completionZsh, "fish": completionFish}[c.Shell]
	_, err := io.WriteString(e.out, script)
	return err
}

// internalComplete makes the binary answer what can come next on a command
// line; for the scripts.
const internalComplete = "internal-complete"

// completeMain gets the words after the program's name, the last of which is
// the one at the cursor. It prints the kind of what can come there: words,
// files, directories, users, groups or nothing. After words follow the words
// themselves with their descriptions; those of --option=value are values.
func completeMain(args []string, stdout, stderr io.Writer) int {
	parser, err := newParser(&cli{}, stdout, stderr, func(int) {})
	if err != nil || len(args) == 0 {
		return exitUsage
	}
	kind, words := complete(parser.Model.Node, args)
	fmt.Fprintln(stdout, kind)
	for _, w := range words {
		fmt.Fprintf(stdout, "%s\t%s\n", w.text, w.help)
	}
	return 0
}

// The kinds of what can come at a place.
const (
	kindWords       = "words"
	kindFiles       = "files"
	kindDirectories = "directories"
	kindUsers       = "users"
	kindGroups      = "groups"
	kindNothing     = "nothing"

	kindMounts = "mounts" // a tag's; the words are the mounts that there are
)

// A word may come next.
type word struct{ text, help string }

// complete walks the words as the parser would and tells what can come as the
// last of them.
func complete(node *kong.Node, words []string) (kind string, next []word) {
	current := words[len(words)-1]
	var (
		pending *kong.Value // an option that waits for its value
		given   = map[*kong.Flag]bool{}
		args    int  // positional words so far
		literal bool // after --
	)
	for _, w := range words[:len(words)-1] {
		switch {
		case pending != nil:
			if w == "=" { // bash makes a word of it
				continue
			}
			pending = nil
		case !literal && w == "--":
			literal = true
		case !literal && strings.HasPrefix(w, "-") && w != "-":
			name, _, hasValue := strings.Cut(w, "=")
			flag := findFlag(node, name)
			if flag == nil {
				continue
			}
			given[flag] = true
			if !flag.IsBool() && !flag.IsCounter() && !hasValue && len(name) <= len(flagName(flag, name)) {
				pending = flag.Value
			}
		case child(node, w) != nil:
			node = child(node, w)
		default:
			args++
		}
	}
	if pending != nil {
		return values(pending, strings.TrimPrefix(current, "="))
	}
	if !literal && strings.HasPrefix(current, "-") {
		if name, value, found := strings.Cut(current, "="); found {
			if flag := findFlag(node, name); flag != nil {
				return values(flag.Value, value)
			}
			return kindNothing, nil
		}
		return kindWords, flags(node, current, given)
	}
	if len(node.Children) > 0 {
		for _, c := range node.Children {
			if !c.Hidden && strings.HasPrefix(c.Name, current) {
				next = append(next, word{c.Name, firstSentence(c.Help)})
			}
		}
		return kindWords, next
	}
	if n := len(node.Positional); n > 0 {
		if args < n {
			return values(node.Positional[args], current)
		}
		if last := node.Positional[n-1]; last.IsCumulative() {
			return values(last, current)
		}
	}
	if literal {
		return kindNothing, nil
	}
	return kindWords, flags(node, current, given)
}

func child(node *kong.Node, name string) *kong.Node {
	for _, c := range node.Children {
		if c.Name == name || slices.Contains(c.Aliases, name) {
			return c
		}
	}
	return nil
}

// findFlag finds --name, or -n with whatever sticks to it.
func findFlag(node *kong.Node, name string) *kong.Flag {
	for _, group := range node.AllFlags(true) {
		for _, f := range group {
			if flagName(f, name) != "" {
				return f
			}
		}
	}
	return nil
}

// flagName is the part of a word that names the flag, or "".
func flagName(f *kong.Flag, w string) string {
	if long := "--" + f.Name; w == long {
		return long
	}
	if short := "-" + string(f.Short); f.Short != 0 && !strings.HasPrefix(w, "--") && strings.HasPrefix(w, short) {
		return short
	}
	return ""
}

func flags(node *kong.Node, prefix string, given map[*kong.Flag]bool) (next []word) {
	for _, group := range node.AllFlags(true) {
		for _, f := range group {
			if given[f] && !f.IsCumulative() {
				continue
			}
			if long := "--" + f.Name; strings.HasPrefix(long, prefix) {
				next = append(next, word{long, firstSentence(f.Help)})
			}
		}
	}
	return next
}

// values tells what a value may be: one of its enumeration, or what its tag
// `complete` or its placeholder says.
func values(v *kong.Value, prefix string) (string, []word) {
	if v.Enum != "" {
		var next []word
		for _, e := range v.EnumSlice() {
			if e != "" && strings.HasPrefix(e, prefix) {
				next = append(next, word{e, ""})
			}
		}
		return kindWords, next
	}
	switch kind := v.Tag.Get("complete"); kind {
	case "":
	case kindMounts:
		var next []word
		for _, path := range mountpoint.All() {
			if strings.HasPrefix(path, prefix) {
				next = append(next, word{path, "mounted"})
			}
		}
		if next != nil {
			return kindWords, next
		}
		return kindFiles, nil
	default:
		return kind, nil
	}
	if v.Flag == nil {
		return kindFiles, nil
	}
	switch v.Flag.PlaceHolder {
	case "FILE", "OUT", "PATH", "EXE":
		return kindFiles, nil
	case "DIR", "DIRECTORY":
		return kindDirectories, nil
	case "USER":
		return kindUsers, nil
	case "GROUP":
		return kindGroups, nil
	}
	return kindNothing, nil
}

// firstSentence is the part of a help text that fits beside a word.
func firstSentence(help string) string {
	first, _, found := strings.Cut(help, ". ")
	if found {
		first += "."
	}
	return strings.ReplaceAll(first, "\n", " ")
}
