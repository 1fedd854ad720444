package main

import (
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
)

func model(t *testing.T) *kong.Application {
	t.Helper()
	parser, err := newParser(&cli{}, io.Discard, io.Discard, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	return parser.Model
}

func TestComplete(t *testing.T) {
	app := model(t).Node
	for _, c := range []struct {
		words string // separated by |, the last is at the cursor
		kind  string
		has   string // one of the words, if not empty
		lacks string
	}{
		{"", kindWords, "mount", "--help"},
		{"mo", kindWords, "mount", "umount"},
		{"-", kindWords, "--help", "mount"},
		{"mount|", kindFiles, "", ""},
		{"mount|x|", kindWords, "--enc", "--detach"},
		{"mount|--e", kindWords, "--expire", "--wait"},
		{"mount|x|--enc|", kindFiles, "", ""},
		{"mount|x|--enc|a|--e", kindWords, "--enc", ""},            // may be repeated
		{"mount|x|--wait|--", kindWords, "--background", "--wait"}, // may not
		{"mount|x|--enc|=|a|--wa", kindWords, "--wait", ""},        // as bash cuts it
		{"mount|x|--enc=a|--wa", kindWords, "--wait", ""},
		{"mount|x|--enc=", kindFiles, "", ""},
		{"mount|--uid|", kindUsers, "", ""},
		{"mount|--gid=", kindGroups, "", ""},
		{"mount|--reads|", kindNothing, "", ""},
		{"mount|--no-such=", kindNothing, "", ""},
		{"encrypt|--profile|", kindWords, "rfc9580", ""},
		{"encrypt|--profile=g", kindWords, "gpg", "rfc9580"},
		{"encrypt|--profile|=|g", kindWords, "gpg", "rfc9580"},
		{"encrypt|-o|", kindFiles, "", ""},
		{"encrypt|-oX|x|--", kindWords, "--force", "--output"},
		{"encrypt|--|-", kindFiles, "", ""},
		{"encrypt|--|a|-", kindNothing, "", ""},
		{"completion|", kindWords, "fish", ""},
	} {
		kind, next := complete(app, strings.Split(c.words, "|"))
		var texts []string
		for _, w := range next {
			texts = append(texts, w.text)
		}
		if kind != c.kind || c.has != "" && !slices.Contains(texts, c.has) || slices.Contains(texts, c.lacks) {
			t.Errorf("%q: %s %v, want %s with %q without %q", c.words, kind, texts, c.kind, c.has, c.lacks)
		}
	}
}

// TestCompleteKnowsEveryFlag: whatever a command gets is offered by itself.
func TestCompleteKnowsEveryFlag(t *testing.T) {
	for _, command := range model(t).Leaves(true) {
		kind, next := complete(command, []string{"--"})
		if kind != kindWords {
			t.Fatalf("%s: %s", command.Name, kind)
		}
		for _, f := range command.Flags {
			if !f.Hidden && !slices.ContainsFunc(next, func(w word) bool { return w.text == "--"+f.Name }) {
				t.Errorf("%s: --%s is not offered", command.Name, f.Name)
			}
		}
	}
}
