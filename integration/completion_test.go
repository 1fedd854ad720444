package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"oncefs/integration/rig"
)

// A desk is a directory with some files, where a shell finds oncefs in its PATH.
func desk(t *testing.T) (dir string, env []string) {
	t.Helper()
	dir, err := os.MkdirTemp("", rig.Prefix)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, sub := range []string{"bin", "home", "config"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"secrets.yaml.enc", "secret file"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(rig.Binary(t), filepath.Join(dir, "bin", "oncefs")); err != nil {
		t.Fatal(err)
	}
	return dir, append(os.Environ(), "PATH="+filepath.Join(dir, "bin")+":"+os.Getenv("PATH"), "HOME="+filepath.Join(dir, "home"), "TERM=dumb")
}

// completions are what every shell must offer: the line up to the cursor, a word
// that must be offered and one that must not.
var completions = []struct{ line, has, lacks string }{
	{"oncefs mo", "mount", "umount"},
	{"oncefs encrypt --pro", "--profile", "--passphrase-file"},
	{"oncefs encrypt --profile ", "rfc9580", "secrets.yaml.enc"},
	{"oncefs encrypt --profile=r", "rfc9580", "gpg"},
	{"oncefs mount config --enc se", "secrets.yaml.enc", "config"},
	{"oncefs mount config --enc=secrets", "secrets.yaml.enc", "config"},
	{"oncefs mount co", "config", "secrets.yaml.enc"},
	{"oncefs mount config --uid roo", "root", "secrets.yaml.enc"},
	{"oncefs mount config --reads ", "", "secrets.yaml.enc"},
	{"oncefs completion ", "zsh", "secrets.yaml.enc"},
}

func offered(t *testing.T, line, has, lacks string, got []string) {
	t.Helper()
	if has == "" && len(got) > 0 || has != "" && !slices.Contains(got, has) || slices.Contains(got, lacks) {
		t.Errorf("%q offers %q; want %q and not %q", line, got, has, lacks)
	}
}

func TestCompletion_Bash(t *testing.T) {
	bash := rig.Need(t, "bash", "bash")
	dir, env := desk(t)
	for _, c := range completions {
		// What readline does on a tab, with its way to cut words at "=".
		words := strings.Fields(strings.ReplaceAll(c.line, "=", " = "))
		if strings.HasSuffix(c.line, " ") || strings.HasSuffix(c.line, "=") {
			words = append(words, "")
		}
		cmd := exec.Command(bash, append([]string{"--norc", "-c", `
			. <(oncefs completion bash)
			[[ $(complete -p oncefs) == "complete -F _oncefs oncefs" ]] || exit
			COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
			_oncefs oncefs "${@:$#}" "${@:$#-1:1}"
			[ ${#COMPREPLY[@]} -eq 0 ] || printf '%s\n' "${COMPREPLY[@]}"`, "bash"}, words...)...)
		cmd.Dir, cmd.Env = dir, env
		r := rig.Exec(t, cmd)
		if r.Code != 0 || r.Err != "" {
			t.Fatalf("%q: %+v", c.line, r)
		}
		offered(t, c.line, c.has, c.lacks, lines(r.Out))
	}
}

func lines(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == '\n' })
}

func TestCompletion_Fish(t *testing.T) {
	fish := rig.Need(t, "fish", "fish")
	dir, env := desk(t)
	for _, c := range completions {
		cmd := exec.Command(fish, "--no-config", "-c", `oncefs completion fish | source; complete -C $argv[1]`, c.line)
		cmd.Dir, cmd.Env = dir, env
		r := rig.Exec(t, cmd)
		if r.Code != 0 || r.Err != "" {
			t.Fatalf("%q: %+v", c.line, r)
		}
		var got []string
		for _, l := range lines(r.Out) {
			word, _, _ := strings.Cut(l, "\t")
			_, value, found := strings.Cut(word, "=") // fish offers --profile=gpg
			if found {
				word = value
			}
			got = append(got, strings.TrimSuffix(word, "/"))
		}
		offered(t, c.line, c.has, c.lacks, got)
	}
}

// In zsh completion works only where somebody types: a terminal is made for one,
// and what is offered is read from it.
func TestCompletion_Zsh(t *testing.T) {
	zsh := rig.Need(t, "zsh", "zsh")
	dir, env := desk(t)
	var all []string
	for _, c := range completions {
		all = append(all, c.line)
	}
	cmd := exec.Command(zsh, append([]string{"-f", "-c", typed, "zsh"}, all...)...)
	cmd.Dir, cmd.Env = dir, env
	r := rig.Exec(t, cmd)
	if r.Code != 0 {
		t.Fatalf("%+v", r)
	}
	answers := strings.Split(strings.ReplaceAll(r.Out, "\r", ""), "the end\n")
	if len(answers) != len(completions)+1 {
		t.Fatalf("%d answers: %s", len(answers)-1, r.Out)
	}
	for i, c := range completions {
		var got []string
		for _, l := range lines(answers[i]) {
			if word, found := strings.CutPrefix(l, "offers: "); found {
				got = append(got, strings.TrimSuffix(word, "/"))
			}
		}
		offered(t, c.line, c.has, c.lacks, got)
	}
}

// typed types each line and a tab in a shell, and a key that says when the shell
// is done with it. compadd, to which all completions come, tells what it is
// given.
const typed = `
zmodload zsh/zpty
zpty shell zsh -f -i
say() { zpty -w shell "$1" }
say 'PS1= PROMPT_EOL_MARK= ; unsetopt zle_bracketed_paste; autoload -Uz compinit && compinit -D -u && . <(oncefs completion zsh)'
say 'compadd() {
	local -a offers; builtin compadd -O offers "$@"
	(( $#offers )) && print -rl -- "" "offers: "$^offers
	builtin compadd "$@"
}'
say 'tell() { BUFFER=; zle -I; print -r -- "the end" }; zle -N tell; bindkey "^X" tell; print -r -- be""gin'
zpty -r shell answer '*begin*'
for line; do
	zpty -w -n shell "$line"$'\t\x18'
	zpty -r shell answer '*the end*'
	print -r -- "$answer"
done
zpty -d shell
`
