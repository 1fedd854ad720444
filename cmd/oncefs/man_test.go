package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
	"github.com/cpuguy83/go-md2man/v2/md2man"
)

// The pages of docs/man and the usage text of the README are made here, from
// the parser's model and the table of exit statuses, and compared with what is
// there. After a change to the command line: make man.
var update = flag.Bool("update", false, "write docs/man and the README's usage text anew")

// written compares a file with what it should hold, or writes it.
func written(t *testing.T, path string, want []byte) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s is not what the command line makes of it (%v): run make man", path, err)
	}
}

const (
	manCommand = "../../docs/man/oncefs.1"
	kubernetes = "../../docs/kubernetes.md"
)

func TestManPage(t *testing.T) {
	written(t, manCommand, md2man.Render([]byte(manSource(model(t)))))
}

// TestManPageOfKubernetes: the page of section 7 is docs/kubernetes.md.
func TestManPageOfKubernetes(t *testing.T) {
	text, err := os.ReadFile(kubernetes)
	if errors.Is(err, fs.ErrNotExist) {
		t.Skip("there is no docs/kubernetes.md")
	}
	if err != nil {
		t.Fatal(err)
	}
	// The page's name is its first heading, and a line of NAME is needed.
	_, rest, _ := strings.Cut(string(text), "\n")
	source := `% "oncefs.k8s" 7 "" "oncefs"` + "\n\n# NAME\noncefs.k8s - oncefs in Kubernetes\n\n# DESCRIPTION\n" + lists(rest)
	written(t, "../../docs/man/oncefs.k8s.7", md2man.Render([]byte(source)))
}

// lists turns each table into a list: a page is 80 columns wide, and cells hold
// sentences. What a row is about stands in the cells before the last two, or in the
// first of two; the others follow with the names of their columns.
func lists(markdown string) string {
	var b strings.Builder
	var head []string
	for line := range strings.Lines(markdown) {
		row, isRow := strings.CutPrefix(strings.TrimSpace(line), "|")
		if !isRow {
			head = nil
			b.WriteString(line)
			continue
		}
		cells := strings.Split(strings.TrimSuffix(row, "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		switch {
		case head == nil:
			head = cells
		case strings.HasPrefix(cells[0], "---"):
		default:
			about := max(1, len(cells)-2)
			fmt.Fprintf(&b, "**%s**\n:   ", strings.ReplaceAll(strings.Join(cells[:about], ", "), "`", ""))
			for i := about; i < len(cells); i++ {
				if cells[i] == "" {
					continue
				}
				if i > about {
					b.WriteString(" ")
				}
				if head[i] != "" && len(cells) > 2 {
					fmt.Fprintf(&b, "%s: ", strings.ToUpper(head[i][:1])+head[i][1:])
				}
				b.WriteString(strings.TrimSuffix(cells[i], ".") + ".")
			}
			b.WriteString("\n\n")
		}
	}
	return b.String()
}

// manSource is oncefs(1) in Markdown.
func manSource(app *kong.Application) string {
	var b strings.Builder
	b.WriteString(`% "oncefs" 1 "" "oncefs"` + "\n\n")
	title, rest, _ := strings.Cut(app.Help, "\n")
	fmt.Fprintf(&b, "# NAME\noncefs - %s\n\n# SYNOPSIS\n", escape(strings.ToLower(title[:1])+strings.TrimSuffix(title[1:], ".")))
	commands := app.Leaves(true)
	for _, c := range commands {
		fmt.Fprintf(&b, "**oncefs** %s  \n", escape(c.Summary()))
	}
	fmt.Fprintf(&b, "\n# DESCRIPTION\n%s\n", prose(rest))
	b.WriteString("# COMMANDS\n")
	for _, c := range commands {
		fmt.Fprintf(&b, "### oncefs %s\n%s\n\n%s\n", escape(c.Summary()), escape(c.Help), prose(c.Detail))
		for _, p := range c.Positional {
			fmt.Fprintf(&b, "*%s*\n:   %s\n\n", escape(p.Summary()), escape(p.Help))
		}
		for _, f := range c.Flags {
			if f.Hidden {
				continue
			}
			names, value, found := strings.Cut(f.String(), "=")
			names = "**" + strings.ReplaceAll(names, ", ", "**, **") + "**"
			if found {
				names += "=*" + escape(value) + "*"
			}
			fmt.Fprintf(&b, "%s\n:   %s\n\n", names, escape(f.Help))
		}
	}
	b.WriteString("# EXIT STATUS\nA number never changes its meaning. What to do is in the line that begins with\n\"oncefs: hint:\".\n\n")
	table := slices.Clone(exits)
	table = append(table, exit{code: 0, meaning: "success; status: mounted and something is still to be read"},
		exit{code: 2, meaning: "a crash of the Go runtime: please report it"},
		exit{code: exitClaimed, meaning: "status: a reader has what is left open"},
		exit{code: exitSpent, meaning: "status: all is spent"})
	slices.SortFunc(table, func(a, b exit) int { return a.code - b.code })
	for _, e := range table {
		fmt.Fprintf(&b, "**%d**\n:   %s\n\n", e.code, escape(e.meaning))
	}
	b.WriteString(manRest)
	if _, err := os.Stat(kubernetes); err == nil {
		b.WriteString("**oncefs.k8s**(7), ")
	}
	b.WriteString("**gpg**(1), **fusermount3**(1), **memfd_secret**(2)\n")
	return b.String()
}

const manRest = `# FILES
**` + defaultPassphraseFile + `**
:   The passphrase file where no other is named. **oncefs mount** removes it
    before it is ready.

**/dev/fuse**
:   The device that a mount takes. A user who is not root also needs
    fusermount3(1).

# ENVIRONMENT
**NOTIFY_SOCKET**
:   Set by systemd for a unit with Type=notify: told when the mount is ready.

A passphrase is never taken from the environment, where others can see it.

# SEE ALSO
`

// escape keeps Markdown from finding its own signs in plain text.
func escape(s string) string {
	return regexp.MustCompile("[\\\\`*_{}\\[\\]<>#|]").ReplaceAllString(s, `\$0`)
}

// prose turns a help text (paragraphs, and indented lines that stay as they are)
// into Markdown.
func prose(s string) string {
	var b strings.Builder
	var code, started bool
	for line := range strings.Lines(s) {
		line = strings.TrimRight(line, "\n")
		if text := strings.TrimLeft(line, " \t"); text != line && text != "" {
			if !code && started {
				b.WriteString("\n")
			}
			code = true
			b.WriteString("    " + text + "\n")
		} else {
			if code {
				b.WriteString("\n")
			}
			code = false
			b.WriteString(escape(line) + "\n")
		}
		started = true
	}
	return b.String() + "\n"
}

// helpOf is what --help prints.
func helpOf(t *testing.T, args ...string) string {
	t.Helper()
	t.Setenv("COLUMNS", "80")
	var out bytes.Buffer
	parser, err := newParser(&cli{}, &out, io.Discard, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	_, _ = parser.Parse(append(args, "--help"))
	return out.String()
}

// TestManPageHasEveryOption takes the options from --help, not from the model
// that the page is made of.
func TestManPageHasEveryOption(t *testing.T) {
	page, err := os.ReadFile(manCommand)
	if err != nil {
		t.Fatal(err)
	}
	sections := strings.Split(strings.ReplaceAll(string(page), `\-`, "-"), "\n.SS ")
	for _, c := range model(t).Leaves(true) {
		i := slices.IndexFunc(sections, func(s string) bool { return strings.HasPrefix(s, "oncefs "+c.Path()) })
		if i < 0 {
			t.Errorf("there is no section of oncefs %s", c.Path())
			continue
		}
		for _, option := range regexp.MustCompile(`(?m)^ +(?:-\w, +)?(--[a-z0-9-]+)`).FindAllStringSubmatch(helpOf(t, strings.Fields(c.Path())...), -1) {
			if option[1] != "--help" && !strings.Contains(sections[i], `\fB`+option[1]+`\fP`) {
				t.Errorf("oncefs %s: %s is not in the page", c.Path(), option[1])
			}
		}
	}
	for _, e := range exits {
		if !strings.Contains(string(page), fmt.Sprintf("\\fB%d\\fP\n", e.code)) {
			t.Errorf("exit status %d is not in the page", e.code)
		}
	}
}

// TestManPagesRender shows them to the programs that read such pages.
func TestManPagesRender(t *testing.T) {
	pages, err := filepath.Glob("../../docs/man/*.[0-9]")
	if err != nil || len(pages) == 0 {
		t.Fatal("no pages", err)
	}
	for _, page := range pages {
		for _, command := range [][]string{
			{"mandoc", "-T", "lint", "-W", "warning", page},
			{"man", "--warnings", "-Tutf8", "-l", page},
		} {
			if _, err := exec.LookPath(command[0]); err != nil {
				if os.Getenv("CI") != "" {
					t.Error(err)
				}
				t.Logf("SKIPPED: %s is not installed", command[0])
				continue
			}
			cmd := exec.Command(command[0], command[1:]...)
			cmd.Env = append(os.Environ(), "MANWIDTH=80", "LC_ALL=C.UTF-8")
			var said bytes.Buffer
			cmd.Stderr = &said
			out, err := cmd.Output()
			if command[0] == "mandoc" {
				for line := range strings.Lines(string(out)) {
					// A page that is made anew at every change has no date.
					if !strings.Contains(line, "missing date") {
						said.WriteString(line)
					}
				}
				err = nil // it tells of the missing date too
			} else if text := regexp.MustCompile(`.\x08`).ReplaceAll(out, nil); len(text) < 1000 || !bytes.Contains(text, []byte("DESCRIPTION")) {
				t.Errorf("%v prints %d bytes", command, len(out))
			}
			if err != nil || said.Len() > 0 {
				t.Errorf("%v: %v\n%s", command, err, said.Bytes())
			}
		}
	}
}

// TestReadmeShowsTheHelp: the usage text there is what --help prints.
func TestReadmeShowsTheHelp(t *testing.T) {
	const path, begin, end = "../../README.md", "```\n$ oncefs --help\n", "```\n"
	readme, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, found := strings.Cut(string(readme), begin)
	if !found {
		t.Fatal("the README shows no oncefs --help")
	}
	_, after, _ := strings.Cut(rest, end)
	written(t, path, []byte(before+begin+helpOf(t)+end+after))
}

// TestCommandsExplainThemselves: a newcomer gets from --help what the command
// is for and a line to type.
func TestCommandsExplainThemselves(t *testing.T) {
	for _, c := range model(t).Leaves(true) {
		help := helpOf(t, strings.Fields(c.Path())...)
		if !strings.Contains(help, "Examples:") || !strings.Contains(help, "\n    oncefs "+c.Path()) {
			t.Errorf("oncefs %s --help shows no example", c.Path())
		}
	}
}
