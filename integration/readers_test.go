package integration

import (
	"bufio"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"oncefs/integration/rig"
)

// marker is what a program can only know from the file.
const marker = "correct horse"

// sample is JSON, YAML and text at once.
const sample = `{"user":"app","password":"` + marker + `"}` + "\n"

// A program is one way in which a real program takes its config. All commands
// are for sh, with $SECRET for the file, $DIR for a directory to write in and
// $PORT for a free port of the loopback.
type program struct {
	name    string // what a person calls it; its first word is looked for
	debian  string // the package that has it
	setup   string // before the mount; what it prints is the content if that is empty
	content string // @DIR@ stands for the directory; default: sample
	run     string // a program that ends
	server  string // or one that stays, and
	ready   string // the words in its log that say it is up, and
	ask     string // the question that shows what it read
	want    string // what run or ask print; default: the content
	reads   int    // how often it opens and reads the file; default: 1
}

var programs = []program{
	{name: "cat", debian: "coreutils", run: `cat "$SECRET"`},
	{name: "busybox cat", debian: "busybox", run: `busybox cat "$SECRET"`},
	{name: "cp", debian: "coreutils", run: `cp "$SECRET" "$DIR/out" && cat "$DIR/out"`},
	{name: "dd bs=1", debian: "coreutils", run: `dd if="$SECRET" bs=1 status=none`},
	{name: "grep", debian: "grep", run: `grep password "$SECRET"`},
	{name: "tail", debian: "coreutils", run: `tail -n 1 "$SECRET"`},
	{name: "less", debian: "less", run: `less "$SECRET"`},
	{name: "tar", debian: "tar", run: `tar -C "${SECRET%/*}" -cf "$DIR/out" "${SECRET##*/}" && tar -xOf "$DIR/out"`},
	{name: "rsync", debian: "rsync", run: `rsync "$SECRET" "$DIR/out" && cat "$DIR/out"`},
	{name: "jq", debian: "jq", run: `jq -c . "$SECRET"`},

	{name: "python3", debian: "python3", run: `python3 -c 'import sys; sys.stdout.write(open(sys.argv[1]).read())' "$SECRET"`},
	{name: "python3 mmap", debian: "python3", run: `python3 -c '
import mmap, sys
with open(sys.argv[1], "rb") as f, mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as m:
    sys.stdout.buffer.write(m[:])' "$SECRET"`},
	{name: "node sync", debian: "nodejs", run: `node -e 'process.stdout.write(require("fs").readFileSync(process.argv[1]))' "$SECRET"`},
	{name: "node async", debian: "nodejs", run: `node -e 'require("fs").promises.readFile(process.argv[1]).then(b => process.stdout.write(b))' "$SECRET"`},
	{name: "perl", debian: "perl", run: `perl -e 'open my $f, "<", shift or die $!; print <$f>' "$SECRET"`},
	{name: "ruby", debian: "ruby", run: `ruby -e 'print File.read(ARGV[0])' "$SECRET"`},
	{name: "php", debian: "php-cli", run: `php -r 'echo file_get_contents($argv[1]);' "$SECRET"`},

	{name: "bash source", debian: "bash", content: "password='" + marker + "'\n",
		run: `bash -c '. "$SECRET" && echo "$password"'`, want: marker + "\n"},
	{name: "curl -K", debian: "curl", setup: `echo page >"$DIR/page"`, content: `url = "file://@DIR@/page"` + "\n",
		run: `curl -sS -K "$SECRET"`, want: "page\n"},
	{name: "git include", debian: "git", content: "[app]\n\tpassword = " + marker + "\n",
		run:  `git config --file "$DIR/outer" include.path "$SECRET" && git config --file "$DIR/outer" --includes app.password`,
		want: marker + "\n"},

	{name: "openssl rsa", debian: "openssl", setup: `openssl genrsa 2048 2>/dev/null | tee "$DIR/key"`,
		run:  `openssl rsa -in "$SECRET" -pubout >"$DIR/got" && openssl rsa -in "$DIR/key" -pubout | cmp - "$DIR/got" && echo same`,
		want: "same\n"},
	{name: "openssl pkey", debian: "openssl", setup: `openssl genpkey -algorithm ed25519 | tee "$DIR/key"`,
		run:  `openssl pkey -in "$SECRET" -pubout >"$DIR/got" && openssl pkey -in "$DIR/key" -pubout | cmp - "$DIR/got" && echo same`,
		want: "same\n"},
	{name: "openssl enc", debian: "openssl", run: `openssl enc -base64 -A -in "$SECRET" | base64 -d`},
	{name: "ssh-keygen -y", debian: "openssh-client", setup: `ssh-keygen -q -t ed25519 -N "" -C "" -f "$DIR/key" && cat "$DIR/key"`,
		run:  `ssh-keygen -y -f "$SECRET" | cut -d" " -f1,2 >"$DIR/got" && cut -d" " -f1,2 "$DIR/key.pub" | cmp - "$DIR/got" && echo same`,
		want: "same\n"},
	{name: "ssh-add", debian: "openssh-client", setup: `ssh-keygen -q -t ed25519 -N "" -C "" -f "$DIR/key" && cat "$DIR/key"`,
		run:  `ssh-agent sh -c 'ssh-add -q "$SECRET" && ssh-add -L' | cut -d" " -f1,2 >"$DIR/got" && cut -d" " -f1,2 "$DIR/key.pub" | cmp - "$DIR/got" && echo same`,
		want: "same\n"},

	{name: "nginx -t", debian: "nginx-light", content: nginxConf,
		run: `nginx -t -e "$DIR/error.log" -c "$SECRET" 2>&1 | grep -o successful`, want: "successful\n"},
	{name: "nginx", debian: "nginx-light", content: nginxConf,
		server: `nginx -e "$DIR/error.log" -c "$SECRET"`, ready: "start worker processes",
		ask: `curl -sS --unix-socket "$DIR/sock" http://localhost/`, want: marker},
	{name: "redis-server", debian: "redis-server",
		content: "port 0\nunixsocket @DIR@/sock\nrequirepass \"" + marker + "\"\nsave \"\"\ndir @DIR@\n",
		server:  `redis-server "$SECRET"`, ready: "ready to accept connections",
		ask: `redis-cli -s "$DIR/sock" -a "` + marker + `" --no-auth-warning ping`, want: "PONG\n"},
	{name: "haproxy", debian: "haproxy", content: haproxyConf,
		server: `haproxy -W -db -f "$SECRET"`, ready: "Loading success",
		ask: `curl -sS --unix-socket "$DIR/sock" http://localhost/`, want: marker},
	{name: "mosquitto", debian: "mosquitto",
		content: "listener 0 @DIR@/sock\nuser root\nallow_anonymous true\nlog_dest stderr\n",
		server:  `mosquitto -c "$SECRET"`, ready: "running",
		ask: `curl -sS --unix-socket "$DIR/sock" -d message mqtt://localhost/topic && echo published`, want: "published\n"},
}

const nginxConf = `daemon off;
pid @DIR@/pid;
error_log stderr notice;
events {}
http {
	access_log off;
	client_body_temp_path @DIR@/body;
	proxy_temp_path @DIR@/proxy;
	fastcgi_temp_path @DIR@/fastcgi;
	uwsgi_temp_path @DIR@/uwsgi;
	scgi_temp_path @DIR@/scgi;
	server {
		listen unix:@DIR@/sock;
		location / { return 200 "` + marker + `"; }
	}
}
`

const haproxyConf = `global
	log stdout format raw local0
defaults
	mode http
	timeout client 60s
	timeout server 60s
	timeout connect 60s
frontend front
	bind unix@@DIR@/sock
	http-request return status 200 content-type text/plain string "` + marker + `"
`

// These read their file twice in one start.
var twice = []program{
	{name: "prometheus", debian: "prometheus", reads: 2, content: "global:\n  external_labels:\n    marker: " + marker + "\n",
		server: `prometheus --config.file="$SECRET" --storage.tsdb.path="$DIR/data" --web.listen-address=127.0.0.1:$PORT`,
		ready:  "Server is ready to receive web requests",
		ask:    `curl -sS http://127.0.0.1:$PORT/api/v1/status/config | grep -o "` + marker + `"`, want: marker + "\n"},
	{name: "sshd -t", debian: "openssh-server", reads: 2, setup: sshdSetup,
		run: `"$(command -v sshd)" -t -f "$DIR/conf" -h "$SECRET" && echo fine`, want: "fine\n"},
	{name: "sshd", debian: "openssh-server", reads: 2, setup: sshdSetup,
		// -r keeps the key in the server, where every connection would read
		// the file again.
		server: `"$(command -v sshd)" -D -e -r -f "$DIR/conf" -h "$SECRET" -p $PORT`, ready: "Server listening on",
		ask: `ssh-keyscan -t ed25519 -p $PORT 127.0.0.1 2>/dev/null | cut -d" " -f2,3 >"$DIR/got"
			cut -d" " -f1,2 "$DIR/key.pub" | cmp - "$DIR/got" && echo same`, want: "same\n"},
}

// sshdSetup prints a key, and writes a config that anybody may run.
const sshdSetup = `[ "$(id -u)" -ne 0 ] || mkdir -p -m 755 /run/sshd
	ssh-keygen -q -t ed25519 -N "" -C "" -f "$DIR/key" >&2 && cat "$DIR/key"
	printf '%s\n' "ListenAddress 127.0.0.1" "PidFile none" "StrictModes no" "UsePAM no" >"$DIR/conf"`

func TestC3_ProgramsGetTheirConfig(t *testing.T) {
	for _, p := range programs {
		t.Run(p.name, p.test)
	}
}

func TestC10_ProgramsThatReadTwice(t *testing.T) {
	for _, p := range twice {
		t.Run(p.name, p.test)
	}
}

// test gives the program its config through a mount, and shows that it has it,
// that all of it went out as often as said, and that it is gone.
func (p program) test(t *testing.T) {
	t.Parallel()
	s := newStage(t, p)
	m := s.dir.MountOver("--reads", strconv.Itoa(max(p.reads, 1)))
	want := p.want
	if want == "" {
		want = s.content
	}
	command := p.run
	if p.server != "" {
		s.serve(p.server, p.ready)
		command = p.ask
	}
	if r := rig.Exec(t, s.sh(command)); r.Code != 0 || r.Out != want {
		t.Fatalf("%s: %+v, want %q", command, r, want)
	}
	for n := 1; n <= max(p.reads, 1); n++ {
		if e := m.WaitEvent("delivery", n); e["whole"] != true {
			t.Errorf("delivery %d: %v", n, e)
		}
	}
	s.gone()
}

// wc asks for the size and reads nothing: the file is there for the next.
func TestC4_WcGivesBack(t *testing.T) {
	t.Parallel()
	s := newStage(t, program{name: "wc", debian: "coreutils"})
	m := s.dir.MountOver()
	if r := rig.Exec(t, s.sh(`wc -c <"$SECRET"`)); strings.TrimSpace(r.Out) != strconv.Itoa(len(s.content)) {
		t.Fatalf("wc: %+v", r)
	}
	m.WaitEvent("give-back", 1)
	if r := rig.Cat(t, s.dir.Secret()); r.Out != s.content {
		t.Fatalf("after wc: %+v", r)
	}
	s.gone()
}

// An editor opens the file, closes it, and opens it again to read.
func TestC4_EditorOpensTwice(t *testing.T) {
	t.Parallel()
	s := newStage(t, program{name: "vi", debian: "vim-tiny"})
	m := s.dir.MountOver()
	if r := rig.Exec(t, s.sh(`vi -es -n -N -u NONE -i NONE -c "w! $DIR/out" -c "qa!" "$SECRET" && cat "$DIR/out"`)); r.Out != s.content {
		t.Fatalf("vi: %+v", r)
	}
	m.WaitEvent("give-back", 1)
	if e := m.WaitEvent("delivery", 1); e["whole"] != true {
		t.Fatalf("delivery: %v", e)
	}
	s.gone()
}

// A reader that wants the first bytes only spends the file all the same.
func TestC5_HeadSpendsIt(t *testing.T) {
	t.Parallel()
	s := newStage(t, program{name: "head", debian: "coreutils"})
	m := s.dir.MountOver()
	if r := rig.Exec(t, s.sh(`head -c 5 "$SECRET"`)); r.Out != s.content[:5] {
		t.Fatalf("head: %+v", r)
	}
	if e := m.WaitEvent("delivery", 1); e["whole"] != false || e["sent"] != 5.0 {
		t.Fatalf("delivery: %v", e)
	}
	s.gone()
}

// A stage is where one program runs.
type stage struct {
	testing.TB
	dir     *rig.Dir
	content string
	env     []string
}

func newStage(t testing.TB, p program) *stage {
	t.Helper()
	rig.Need(t, strings.Fields(p.name)[0], p.debian)
	rig.Need(t, "curl", "curl")
	// Short, for the paths of sockets.
	dir, err := os.MkdirTemp("", rig.Prefix)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &stage{TB: t, content: strings.ReplaceAll(p.content, "@DIR@", dir)}
	s.env = append(os.Environ(), "DIR="+dir, "PORT="+freePort(t), "LC_ALL=C", "HOME="+dir, "LESSHISTFILE=-",
		// What Debian has comes first, also what it has for administrators.
		"PATH=/usr/bin:/usr/sbin:/bin:/sbin:"+os.Getenv("PATH"))
	if p.setup != "" {
		r := rig.Exec(t, s.sh(p.setup))
		if r.Code != 0 {
			t.Fatalf("setup: %+v", r)
		}
		if s.content == "" {
			s.content = r.Out
		}
	}
	if s.content == "" {
		s.content = sample
	}
	s.dir = rig.NewDir(t, []byte(s.content))
	s.env = append(s.env, "SECRET="+s.dir.Secret())
	return s
}

func (s *stage) sh(command string) *exec.Cmd {
	cmd := exec.Command("/bin/sh", "-c", command)
	cmd.Env = s.env
	return cmd
}

// gone shows that nobody finds the file any more, by whatever question.
func (s *stage) gone() {
	s.Helper()
	r := rig.Exec(s, s.sh(`ls "${SECRET%/*}"; stat "$SECRET" || cat "$SECRET"`))
	if r.Out != "" || strings.Count(r.Err, "No such file or directory") != 2 {
		s.Errorf("after the read: %+v", r)
	}
}

// serve starts a server and waits until its log says that it is up. It is ended
// before the test's mount is.
func (s *stage) serve(command, ready string) {
	s.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		s.Fatal(err)
	}
	cmd := s.sh("exec " + command)
	cmd.Stdout, cmd.Stderr = w, w
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // its workers end with it
	if err := cmd.Start(); err != nil {
		s.Fatal(err)
	}
	w.Close()
	var said strings.Builder
	lines := bufio.NewScanner(io.TeeReader(r, &said))
	stuck := time.AfterFunc(2*time.Minute, func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	up := false
	for !up && lines.Scan() {
		up = strings.Contains(strings.ToLower(lines.Text()), strings.ToLower(ready))
	}
	rest := make(chan struct{})
	go func() {
		defer close(rest)
		for lines.Scan() {
		}
	}()
	s.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		stuck.Stop()
		<-rest
		r.Close()
		if s.Failed() {
			s.Logf("%s said:\n%s", command, said.String())
		}
	})
	if !up {
		s.Fatalf("%s did not come up", command)
	}
}

// freePort is a port of the loopback that was free a moment ago.
func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}
