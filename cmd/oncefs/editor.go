package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"go.yaml.in/yaml/v4"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"oncefs/internal/decryptor"
	"oncefs/internal/private"
	"oncefs/internal/sandbox"
)

// internalEdit makes the binary the process in the private place:
// `oncefs internal-edit NAME WRITABLE MAX EDITOR...`.
const internalEdit = "internal-edit"

// findEditor is the command that edits a file, as git finds it: a variable goes
// through the shell, so that it may hold arguments and quotes.
func findEditor() ([]string, error) {
	for _, v := range []string{"VISUAL", "EDITOR"} {
		command := os.Getenv(v)
		switch {
		case command == "":
		case strings.ContainsAny(command, "|&;<>()$`\\\"' \t\n*?[#~=%"):
			return []string{"sh", "-c", command + ` "$@"`, command}, nil
		default:
			return vimOptions(command), nil
		}
	}
	for _, name := range []string{"editor", "vi"} {
		if path, err := exec.LookPath(name); err == nil {
			return vimOptions(path), nil
		}
	}
	return nil, errNoEditor
}

// vimOptions keep vim from trying to write its history: it could not, and would
// say so each time.
func vimOptions(command string) []string {
	path, err := exec.LookPath(command)
	if err != nil {
		return []string{command}
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	if base := filepath.Base(path); base == "nvim" || base == "vim" || strings.HasPrefix(base, "vim.") {
		return []string{command, "-i", "NONE"}
	}
	return []string{command}
}

// A session is one content being edited in the private place.
type session struct {
	path    string
	max     int64
	editor  []string
	signals chan os.Signal
	stopped atomic.Bool // by a signal that ends a process
}

// editMain is the process in the private place. It is the first of its process
// namespace: when it ends, all that the editor has started ends.
func editMain(args []string, stdout, stderr *os.File) int {
	ui := &tui{out: stdout, err: stderr}
	if len(args) < 4 {
		return exitOther
	}
	name, writable := args[0], args[1] == "true"
	max, err := strconv.ParseInt(args[2], 10, 64)
	if err != nil {
		return exitOther
	}
	in, out := os.NewFile(3, "content"), os.NewFile(4, "result")
	for _, f := range []*os.File{in, out} {
		unix.CloseOnExec(int(f.Fd()))
	}
	s := &session{path: filepath.Join(private.Dir, name), max: max, editor: args[3:], signals: make(chan os.Signal, 4)}
	// Caught and not ignored: what is ignored the editor would ignore too.
	signal.Notify(s.signals, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGHUP)
	if err := private.Enter(!writable); err != nil {
		return ui.fail(err)
	}
	if err := sandbox.Hide(); err != nil {
		return ui.fail(err)
	}
	if _, err := out.Write([]byte{placeReady}); err != nil {
		return ui.fail(err)
	}
	if err := s.run(in, out); err != nil {
		return ui.fail(err)
	}
	return 0
}

func (s *session) run(in, out *os.File) error {
	if err := s.receive(in); err != nil {
		return fmt.Errorf("put the content into the private place: %w", err)
	}
	verdict := byte(accepted)
	for {
		problem := s.edit()
		if problem == "" {
			break
		}
		again, asked := s.again(problem)
		if again {
			continue
		}
		verdict = givenUp
		if !asked {
			verdict = unasked
			fmt.Fprintf(os.Stderr, "oncefs: %s\n", problem)
		}
		break
	}
	f, size, err := s.open()
	told := verdict == unasked && errors.Is(err, fs.ErrNotExist) // it is what the problem was
	if verdict != givenUp && err != nil && !told {
		fmt.Fprintf(os.Stderr, "oncefs: what was edited cannot be read, and is lost: %v\n", err)
	}
	if verdict == givenUp || err != nil {
		_, err := out.Write(append([]byte{givenUp}, make([]byte, 8)...))
		return err
	}
	defer f.Close()
	_, err = out.Write(binary.BigEndian.AppendUint64([]byte{verdict}, uint64(size)))
	if err == nil {
		err = copyN(out, f, size)
	}
	if err != nil {
		return fmt.Errorf("hand over what was edited, which is lost: %w", err)
	}
	return nil
}

// copyN copies n bytes and leaves none in this process's memory.
func copyN(dst io.Writer, src io.Reader, n int64) error {
	buf := make([]byte, 64<<10)
	defer clear(buf)
	for n > 0 {
		part := buf[:min(n, int64(len(buf)))]
		if _, err := io.ReadFull(src, part); err != nil {
			return err
		}
		if _, err := dst.Write(part); err != nil {
			return err
		}
		n -= int64(len(part))
	}
	return nil
}

func (s *session) receive(in *os.File) error {
	var head [8]byte
	if _, err := io.ReadFull(in, head[:]); err != nil {
		return err
	}
	f, err := os.OpenFile(s.path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := copyN(f, in, int64(binary.BigEndian.Uint64(head[:]))); err != nil {
		return err
	}
	return in.Close()
}

// edit lets the editor work once and says in a few words what is wrong with what
// came of it, if something is.
func (s *session) edit() (problem string) {
	tty, err := decryptor.OpenTerminal()
	if err == nil {
		defer tty.Close()
		if state, err := term.GetState(int(tty.Fd())); err == nil {
			// An editor that was killed leaves the terminal as it had it.
			defer term.Restore(int(tty.Fd()), state)
		}
	}
	cmd := exec.Command(s.editor[0], append(slices.Clone(s.editor[1:]), s.path)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "TMPDIR="+filepath.Dir(s.path))
	if err := cmd.Start(); err != nil {
		return fmt.Sprintf("the editor %s cannot be started: %v", s.editor[0], errors.Unwrap(err))
	}
	ended := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		s.watch(cmd, ended)
		close(watched)
	}()
	err = cmd.Wait()
	close(ended)
	<-watched
	s.stragglers()
	switch {
	case s.stopped.Load():
		return "stopped by a signal"
	case err != nil:
		return "the editor failed: " + err.Error()
	}
	return s.check()
}

// watch deals with signals while the editor runs. Those of the terminal are its
// own; those that end a process end it, in the way it knows, and then for good.
func (s *session) watch(cmd *exec.Cmd, ended <-chan struct{}) {
	var kill <-chan time.Time
	for {
		select {
		case <-ended:
			return
		case <-kill:
			private.EndAll()
		case sig := <-s.signals:
			if sig == unix.SIGTERM || sig == unix.SIGHUP {
				s.stopped.Store(true)
				cmd.Process.Signal(sig)
				kill = time.After(patience)
			}
		}
	}
}

// patience is how long an editor that was told to end may take.
const patience = 3 * time.Second

// stragglers waits for what the editor has left running: an editor that goes on
// in the background is still editing.
func (s *session) stragglers() {
	if !private.Any() {
		return
	}
	gone := make(chan struct{})
	go func() { private.Left(); close(gone) }()
	tell := time.After(300 * time.Millisecond)
	for {
		select {
		case <-gone:
			return
		case <-tell:
			if s.stopped.Load() {
				private.EndAll()
				continue
			}
			fmt.Fprintln(os.Stderr, "oncefs: the editor has left a process running; waiting for its end (Ctrl-C ends it)")
		case sig := <-s.signals:
			if sig == unix.SIGTERM || sig == unix.SIGHUP {
				s.stopped.Store(true)
			}
			private.EndAll()
		}
	}
}

func (s *session) open() (*os.File, int64, error) {
	f, err := os.OpenFile(s.path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("is not a regular file")
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}

// check looks at what the editor left. No byte of it is in what it says.
func (s *session) check() (problem string) {
	f, size, err := s.open()
	if err != nil {
		return "the editor left no file"
	}
	defer f.Close()
	if size > s.max {
		return fmt.Sprintf("what the editor left is larger than --max-size (%d bytes)", size)
	}
	kind := strings.ToLower(filepath.Ext(s.path))
	if !slices.Contains([]string{".yaml", ".yml", ".json"}, kind) {
		return ""
	}
	content := make([]byte, size)
	defer clear(content)
	if _, err := io.ReadFull(f, content); err != nil {
		return "what the editor left cannot be read"
	}
	if kind == ".json" {
		return jsonProblem(content)
	}
	return yamlProblem(content)
}

func jsonProblem(content []byte) string {
	var any json.RawMessage
	var syntax *json.SyntaxError
	err := json.Unmarshal(content, &any)
	switch {
	case err == nil:
		return ""
	case errors.As(err, &syntax):
		before := content[:min(max(0, syntax.Offset-1), int64(len(content)))]
		line, column := bytes.Count(before, []byte("\n"))+1, len(before)-bytes.LastIndexByte(before, '\n')
		return fmt.Sprintf("not valid JSON at line %d, column %d", line, column)
	}
	return "not valid JSON"
}

func yamlProblem(content []byte) string {
	for in := yaml.NewDecoder(bytes.NewReader(content)); ; {
		var any yaml.Node
		err := in.Decode(&any)
		var at *yaml.LoadError
		switch {
		case err == nil:
			continue
		case err == io.EOF:
			return ""
		case errors.As(err, &at) && at.Mark.Line > 0:
			mark := at.Mark
			if at.ContextMark.Line > 0 {
				mark = at.ContextMark // where what is wrong begins
			}
			return fmt.Sprintf("not valid YAML near line %d, column %d", mark.Line, mark.Column)
		}
		return "not valid YAML"
	}
}

// again asks whether to go on editing.
func (s *session) again(problem string) (yes, asked bool) {
	if s.stopped.Load() {
		return false, false
	}
	type answer struct{ yes, asked bool }
	answered := make(chan answer, 1)
	go func() {
		yes, asked := askYes(problem + ". Edit again?")
		answered <- answer{yes, asked}
	}()
	select {
	case a := <-answered:
		return a.yes, a.asked
	case <-s.signals:
		return false, false
	}
}
