package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/alecthomas/kong"
	"github.com/docker/go-units"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"oncefs/fs"
	"oncefs/internal/alarm"
	"oncefs/internal/decryptor"
	"oncefs/internal/erase"
	"oncefs/internal/mountpoint"
	"oncefs/internal/once"
	"oncefs/internal/policy"
	"oncefs/internal/sandbox"
	"oncefs/internal/secretmem"
	"oncefs/internal/warden"
)

const defaultPassphraseFile = "/etc/init-secrets/secretfile_pw"

// mountFlags say what is served where and to whom. run has them as well.
type mountFlags struct {
	Target         string        `arg:"" help:"Directory to mount over, or the path of the one file to serve."`
	Enc            []string      `required:"" sep:"none" placeholder:"FILE" help:"Encrypted file; repeat for several. A relative name is looked up in the working directory, then in TARGET."`
	PassphraseFile string        `placeholder:"FILE" help:"File whose first line is the passphrase; removed once mounted. /dev/fd/N and pipes work. Without one you are asked. Default: ${passphrase}."`
	KeepPassphrase bool          `help:"Leave the passphrase file where it is."`
	Name           []string      `sep:"none" placeholder:"NAME" help:"Name to serve, in the order of --enc. Default: the file's name less .enc, .gpg, .pgp or .asc."`
	Mode           *mode         `placeholder:"MODE" help:"Permission bits that are shown and enforced. Default: 0400; of a bundle's files their own, less what would let somebody write."`
	UID            string        `name:"uid" placeholder:"USER" help:"Owner that is shown, a number or a name. Default: the one --reader-uid, or who mounts."`
	GID            string        `name:"gid" placeholder:"GROUP" help:"Group that is shown, a number or a name. Default: of who mounts."`
	AllowOther     bool          `help:"Let other users in, as far as --mode allows. Implied where --uid, --gid or a reader is somebody else's."`
	Reads          int           `default:"1" help:"How often each file may be read, one after another."`
	Expire         time.Duration `placeholder:"TIME" help:"Wipe what was not read within this time after it was ready, for example 10m."`
	Hold           time.Duration `placeholder:"TIME" help:"The longest a reader may keep a file open after its first byte."`
	MaxSize        size          `default:"${maxsize}" help:"The most that one file may hold, or all files of a bundle together."`
	NoUnpack       bool          `help:"Serve NAME.tar as the one file that it is, not the files in it."`
	Wait           bool          `help:"Where the encrypted file does not exist yet, wait for it."`
	Mkdir          bool          `help:"Make TARGET, a directory, where it does not exist."`
	LogFile        string        `name:"log" placeholder:"FILE" help:"Append the events to this file. Default: standard error."`
	NotifyFD       int           `name:"notify-fd" default:"-1" placeholder:"N" help:"Write a newline to this descriptor when ready (s6)."`
	Require        []string      `enum:"secretmem,undumpable,noprivileges,landlock,seccomp,private" placeholder:"NAME" help:"Refuse to go on without this protection: secretmem, landlock, seccomp; for run also private."`

	readerFlags
	metricsFlags
	LogFormat   string   `enum:"auto,text,json" default:"auto" placeholder:"FORMAT" help:"text for people or json for programs, an event a line. Default: text on a terminal, else json."`
	OnIntrusion reaction `default:"log" placeholder:"log|exit|exec:COMMAND" help:"What to do when somebody else is refused or comes late: write it to the log, and then nothing, or end with exit status 70, or start COMMAND with the event as JSON on its standard input."`
}

type mountCmd struct {
	mountFlags
	Background bool `help:"Return when ready and go on in the background."`

	Detach bool `hidden:"" help:"Leave the session once ready."`
}

// Help is shown below the options.
func (mountCmd) Help() string {
	return `The first open for reading claims the file; from then on it does not exist for
anybody else. A claim that closes before a byte was read is given back. Ready
means: mounted, the passphrase file gone, the first stat answered.

What would be served as NAME.tar is a bundle: the files in the archive are served
instead, each once on its own. --no-unpack serves the archive.

Examples:
  oncefs mount /config --enc secrets.yaml.enc
  oncefs mount /config/secrets.yaml --enc /enc/secrets.yaml.enc --uid app
  oncefs mount /etc/app --enc certs.tar.enc
  oncefs mount /run/keys --enc a.enc --enc b.enc --passphrase-file /dev/fd/3 3<pw

Exit status: 0 after an unmount or a signal; see docs/exit-codes.md.`
}

// requireSecretmem is what --require calls memory of the kind secretmem.Secret.
const requireSecretmem = "secretmem"

// mode is permission bits in octal.
type mode uint32

func (m *mode) UnmarshalText(text []byte) error {
	n, err := strconv.ParseUint(string(text), 8, 32)
	switch {
	case err != nil || n > 0o777:
		return fmt.Errorf("%q is not a mode like 0400", text)
	case n&0o222 != 0:
		return fmt.Errorf("mode %s would let somebody write, and nobody can", text)
	}
	*m = mode(n)
	return nil
}

// of is the mode that is shown of a file whose own is given.
func (m *mode) of(own uint32) mode {
	if m != nil {
		return *m
	}
	return mode(own &^ 0o222)
}

// ofDir is that of a directory: with --mode, who may read may also go in.
func (m *mode) ofDir(own uint32) mode {
	if m != nil {
		return *m | *m&0o444>>2
	}
	return mode(own &^ 0o222)
}

// defaultMode is of what has no mode of its own.
const defaultMode = 0o400

// size is a number of bytes, with units of 1024.
type size int64

func (s *size) UnmarshalText(text []byte) error {
	n, err := units.RAMInBytes(string(text))
	if err != nil || n < 0 {
		return fmt.Errorf("%q is not a size like 64MiB", text)
	}
	*s = size(n)
	return nil
}

func (m *mountFlags) Validate(*kong.Context) error {
	if len(m.Name) > 0 && len(m.Name) != len(m.Enc) {
		return errors.New("--name must be given once for each --enc")
	}
	if m.Reads < 1 {
		return errors.New("--reads must be 1 or more")
	}
	if m.Expire < 0 || m.Hold < 0 {
		return errors.New("--expire and --hold must not be negative")
	}
	if err := errors.Join(m.readerFlags.validate(), m.metricsFlags.validate()); err != nil {
		return err
	}
	seen := map[string]bool{}
	for i, enc := range m.Enc {
		name, err := m.served(i)
		if err != nil {
			return err
		}
		if m.unpacks(i) {
			continue // it is not served by that name
		}
		if seen[name] {
			return fmt.Errorf("--enc %s would be served as %s, like another; name them with --name", enc, name)
		}
		seen[name] = true
	}
	return nil
}

// served is the name under which the i-th file is served.
func (m *mountFlags) served(i int) (string, error) {
	if len(m.Name) > 0 {
		name := m.Name[i]
		if name == "" || name == "." || name == ".." || strings.Contains(name, "/") || len(name) > unix.NAME_MAX {
			return "", fmt.Errorf("--name %q is no file name", name)
		}
		return name, nil
	}
	name, ok := servedName(filepath.Base(m.Enc[i]))
	if !ok {
		return "", fmt.Errorf("--enc %s does not end in .enc, .gpg, .pgp or .asc; say with --name what to serve it as", m.Enc[i])
	}
	return name, nil
}

// unpacks tells whether the i-th file is a bundle.
func (m *mountFlags) unpacks(i int) bool {
	name, err := m.served(i)
	return err == nil && !m.NoUnpack && isBundle(name)
}

// isBundle tells by the name under which a file would be served whether it is a
// bundle. Nothing that is inside of the file decides that.
func isBundle(name string) bool {
	return strings.HasSuffix(name, ".tar") && name != ".tar"
}

// servedName is an encrypted file's name less its last extension.
func servedName(base string) (name string, ok bool) {
	ext := filepath.Ext(base)
	name = strings.TrimSuffix(base, ext)
	return name, slices.Contains([]string{".enc", ".gpg", ".pgp", ".asc"}, ext) && name != ""
}

func (m *mountCmd) Run(e *env) error {
	if m.Background {
		return m.background(e)
	}
	ctx, stop := untilSignal()
	defer stop()
	return serve(ctx, e, &m.mountFlags, serving{detach: m.Detach})
}

// serving is what is different about a process that serves for others.
type serving struct {
	detach bool            // leave the session once ready
	quiet  bool            // no ready line
	ready  func(*mounting) // called when ready, if not nil
	within int             // only descendants of this process may read; 0 is everybody
	keep   bool            // to be armed again, see once.Options
}

// serve mounts, and serves until the end or until the context's.
func serve(ctx context.Context, e *env, m *mountFlags, how serving) error {
	// A log that is closed at its other end must not end the daemon.
	signal.Ignore(unix.SIGPIPE)
	out, err := m.openLog()
	if err != nil {
		return err
	}
	ev := newEvents(out, m.LogFormat)
	defer ev.close()
	mt := &mounting{mountFlags: m, env: e, events: ev, serving: how}
	if err := mt.start(ctx); err != nil {
		if ctx.Err() != nil {
			err = errStopped
		}
		return errors.Join(err, mt.close())
	}
	err = mt.serve(ctx)
	closed := mt.close()
	select {
	case e := <-mt.tripwire.intruded: // by an attempt that was still being looked into
		if !errors.Is(err, errIntrusion) {
			err = intruder(mt.point.Path, e)
		}
	default:
	}
	return errors.Join(err, closed)
}

// openLog opens where events go. It is the process's until its end.
func (m *mountFlags) openLog() (*os.File, error) {
	if m.LogFile == "" {
		return os.Stderr, nil
	}
	return os.OpenFile(m.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
}

// mounting is one mount from its first check to its end. Each step leaves
// behind what close takes down again, in any state.
type mounting struct {
	*mountFlags
	*env
	serving
	events *events

	store      *secretmem.Store
	point      *mountpoint.Point
	policy     *policy.Policy
	tripwire   *tripwire
	alarm      *alarm.Alarm // nil without a command
	counters   *counters    // nil where nobody is to see them
	passphrase *erase.File  // nil when asked at the terminal
	terminal   *os.File
	encrypted  []*os.File
	under      *os.File
	warden     *warden.Warden
	secrets    []secret
	server     *fs.Server
	served     chan error      // what Serve returned
	layers     []sandbox.Layer // that are in force; set before ready
	readyAt    time.Time       // zero before
	mu         sync.Mutex      // guards readyAt
}

type secret struct {
	path string // where it is served
	name string // below what is mounted over
	mode mode
	once *once.Secret
	// intrusions are those that the log has.
	intrusions *atomic.Int64
}

// start does everything up to being ready. The order is the promise: nothing is
// decrypted before all cheap checks have passed, nothing mounted before all is
// authenticated, nothing removed before it is mounted.
func (m *mounting) start(ctx context.Context) error {
	if err := mountpoint.CheckDevice(); err != nil {
		return err
	}
	for _, name := range m.Require {
		if name != requireSecretmem && !slices.Contains(sandbox.Available(), sandbox.Layer(name)) {
			return fmt.Errorf("%w: %s", errRequired, name)
		}
	}
	var err error
	if m.store, err = secretmem.Open(slices.Contains(m.Require, requireSecretmem)); err != nil {
		return err
	}
	if m.store.Kind() != secretmem.Secret {
		m.events.tell(slog.LevelWarn, "no-secretmem", slog.String("instead", string(m.store.Kind())))
	}
	name, err := m.mountFlags.served(0)
	if err != nil {
		return err
	}
	if m.Mkdir {
		if err := os.Mkdir(m.Target, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	var healed int
	if m.point, healed, err = mountpoint.Find(m.Target, name); err != nil {
		return err
	}
	if healed > 0 {
		m.events.tell(slog.LevelWarn, "dead-mount-removed", slog.String("path", m.point.Path), slog.Int("count", healed))
	}
	if m.point.File && len(m.Enc) > 1 {
		return fmt.Errorf("%w: several --enc need a directory to mount over, and %s is none", errNotFit, m.point.Path)
	}
	if m.point.File && m.keep {
		return fmt.Errorf("%w: --restart needs a directory to mount over, and %s is none", errNotFit, m.point.Path)
	}
	if m.point.File && m.unpacks(0) {
		return fmt.Errorf("%w: %s is a bundle and needs a directory to mount over, and %s is none; --no-unpack serves it as one file", errNotFit, m.Enc[0], m.point.Path)
	}
	path, cleanup, err := mountpoint.HelperPath(m.binary, m.point.File)
	if err != nil {
		return err
	}
	cleanup = sync.OnceFunc(cleanup)
	defer cleanup()
	os.Setenv("PATH", path)
	if m.policy, err = m.readerFlags.policy(); err != nil {
		return err
	}
	if err := m.OnIntrusion.find(); err != nil {
		return err
	}
	m.tripwire = newTripwire(m.OnIntrusion)
	uid, gid, err := m.owner()
	if err != nil {
		return err
	}
	if err := m.openCounters(); err != nil {
		return err
	}
	if !m.point.File {
		if m.under, err = os.Open(m.point.Path); err != nil {
			return err
		}
	}
	for _, enc := range m.Enc {
		f, err := m.openEncrypted(ctx, enc)
		if err != nil {
			return err
		}
		m.encrypted = append(m.encrypted, f)
	}
	if err := m.openPassphrase(); err != nil {
		if healed > 0 && (errors.Is(err, errNoPassphrase) || errors.Is(err, os.ErrNotExist)) {
			return fmt.Errorf("%w: %w", errLost, err)
		}
		return err
	}
	if m.warden, err = warden.Start(m.binary, m.point, m.erasable()); err != nil {
		return err
	}
	if m.OnIntrusion.command != "" {
		if m.alarm, err = alarm.Start(m.binary, m.OnIntrusion.command); err != nil {
			return err
		}
		go m.raise()
	}
	// Everything that needed /proc/self is done.
	if err := sandbox.Hide(); err != nil {
		return err
	}
	contents, err := m.decrypt(ctx)
	if err != nil {
		return err
	}
	if err := m.fits(contents, uid); err != nil {
		wipe(slices.Concat(contents...))
		return err
	}
	files, dirs := m.seal(contents, uid, gid)
	if err := m.mount(files, dirs, uid, gid); err != nil {
		return err
	}
	m.counters.show(m)
	cleanup() // while files can still be removed
	if err := m.check(ctx); err != nil {
		return err
	}
	herald, err := m.openHerald()
	if err != nil {
		return err
	}
	defer herald.close()
	if err := m.enclose(); err != nil {
		return err
	}
	// Two threads at a time from here on: one answers, and the other does all that may
	// take longer. The runtime wakes up more of them for nothing.
	runtime.GOMAXPROCS(min(2, runtime.GOMAXPROCS(0)))
	// The last thing that can fail, and it leaves the file whole if it does.
	if err := m.removePassphrase(); err != nil {
		return err
	}
	m.each(func(s *once.Secret) error { s.Begin(); return nil })
	m.announce(herald)
	return nil
}

// seal makes a secret of each content, and the directories that they are in.
func (m *mounting) seal(contents [][]decryptor.Content, uid, gid uint32) (files []fs.File, dirs []fs.Dir) {
	perms := map[string]mode{}
	for i, all := range contents {
		for _, c := range all {
			own, name := c.Mode, c.Name
			if !m.unpacks(i) {
				own = defaultMode
				name, _ = m.mountFlags.served(i)
			}
			if c.Dir {
				perm := m.Mode.ofDir(own)
				if other, twice := perms[name]; twice {
					perm &= other // of two bundles; what either forbids is forbidden
				}
				perms[name] = perm
				continue
			}
			path := m.point.Path
			if !m.point.File {
				path = filepath.Join(path, name)
			}
			s := secret{path: path, name: name, mode: m.Mode.of(own), intrusions: new(atomic.Int64)}
			s.once = once.New(c.Bytes, once.Options{
				Reads: m.Reads, Expire: m.Expire, Hold: m.Hold, Keep: m.keep,
				Observe: m.observer(s), Changed: m.counters.changed,
			})
			m.secrets = append(m.secrets, s)
			files = append(files, fs.File{Name: name, Secret: s.once, Bytes: c.Bytes, Perm: uint32(s.mode), UID: uid, GID: gid})
			m.warnPlaintext(name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(perms)) { // parents first
		dirs = append(dirs, fs.Dir{Name: name, Perm: uint32(perms[name]), UID: uid, GID: gid})
	}
	return files, dirs
}

// fits looks whether the contents can be served beside each other, and read by
// whom the policy lets in. What is inside of a bundle is not named: nothing is
// served yet.
func (m *mounting) fits(contents [][]decryptor.Content, uid uint32) error {
	type place struct {
		enc int
		dir bool
	}
	taken := map[string]place{}
	for i, all := range contents {
		for _, c := range all {
			if !m.unpacks(i) {
				c.Name, _ = m.mountFlags.served(i)
			} else if !c.Dir {
				if err := m.readable(uid, m.Mode.of(c.Mode)); err != nil {
					return fmt.Errorf("a file in %s: %w", m.Enc[i], err)
				}
			}
			other, there := taken[c.Name]
			if there && !(other.dir && c.Dir) {
				return fmt.Errorf("%w: %s and %s hold the same name; mount them in two places", errNotFit, m.Enc[other.enc], m.Enc[i])
			}
			taken[c.Name] = place{i, c.Dir}
		}
	}
	return nil
}

// erasable is the passphrase file if it is to be removed, or nil.
func (m *mounting) erasable() *erase.File {
	if m.passphrase == nil || m.passphrase.Removable() == "" {
		return nil
	}
	return m.passphrase
}

// observer tells the events of one secret. Over a file, one that expired takes
// its name with it.
func (m *mounting) observer(s secret) func(once.Event) {
	tell := m.events.observe(s.path, func(e once.Event, line record) {
		s.intrusions.Add(1)
		m.counters.changed()
		m.tripwire.pull(e, line)
	})
	return func(e once.Event) {
		tell(e)
		if e.Kind == once.Expiry && m.point.File {
			go m.warden.Release() // its failure is told by close
		}
	}
}

// enclose gives up what serving does not need.
func (m *mounting) enclose() (err error) {
	if m.layers, err = sandbox.Server(m.under); err != nil {
		return fmt.Errorf("give up privileges: %w", err)
	}
	for _, layer := range sandbox.Layers() {
		if slices.Contains(m.layers, layer) {
			continue
		}
		if slices.Contains(m.Require, string(layer)) {
			return fmt.Errorf("%w: %s", errRequired, layer)
		}
		m.events.tell(slog.LevelWarn, "no-"+string(layer), slog.String("hint", "this kernel does not have it"))
	}
	return nil
}

func (m *mounting) owner() (uid, gid uint32, err error) {
	uid, gid = uint32(os.Geteuid()), uint32(os.Getegid())
	switch {
	case m.UID != "":
		uid, err = userID("--uid", m.UID)
	case len(m.policy.UIDs) == 1:
		uid = m.policy.UIDs[0]
	}
	if err == nil && m.GID != "" {
		gid, err = groupID("--gid", m.GID)
	}
	for i := range m.Enc {
		if err == nil && !m.unpacks(i) { // of the files in a bundle it is asked later
			err = m.readable(uid, m.Mode.of(defaultMode))
		}
	}
	return uid, gid, err
}

func (m *mounting) openPassphrase() error {
	path := m.PassphraseFile
	if path == "" {
		path = defaultPassphraseFile
		if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
			tty, err := decryptor.OpenTerminal()
			if err != nil {
				return fmt.Errorf("%w (%s does not exist)", errNoPassphrase, path)
			}
			m.terminal = tty
			return nil
		}
	}
	p, err := erase.Open(path, !m.KeepPassphrase)
	if err != nil {
		if as[*erase.RemoveError](err) {
			return fmt.Errorf("passphrase file: %w", err)
		}
		return fmt.Errorf("%w: %w", errPassphraseFile, err)
	}
	m.passphrase = p
	if p.Exposed {
		m.events.tell(slog.LevelWarn, "passphrase-file-exposed", slog.String("path", path), slog.String("hint", "others can read it: chmod 600"))
	}
	return nil
}

func (m *mounting) decrypt(ctx context.Context) ([][]decryptor.Content, error) {
	pass := decryptor.Passphrase{File: m.terminal, Terminal: true}
	restore := func() {}
	if m.passphrase != nil {
		pass = decryptor.Passphrase{File: m.passphrase.File()}
	} else if state, err := term.GetState(int(m.terminal.Fd())); err == nil {
		// A child that is killed while it asks leaves the terminal without echo.
		restore = func() { term.Restore(int(m.terminal.Fd()), state) }
	}
	var messages []decryptor.Message
	for i, f := range m.encrypted {
		messages = append(messages, decryptor.Message{File: f, Bundle: m.unpacks(i)})
	}
	// The two processes start at the same time. The warden must have the
	// passphrase file open before it is read: what is removed is what was read.
	var unready error
	pass.Until = func() error {
		unready = m.warden.Ready()
		return unready
	}
	what := filepath.Base(m.Enc[0])
	if len(m.Enc) > 1 {
		what = fmt.Sprintf("%d files", len(m.Enc))
	}
	stop := m.progress("decrypting "+what, sizes(m.encrypted), readSoFar(m.encrypted))
	contents, err := decryptor.Decrypt(ctx, m.binary, messages, pass, int64(m.MaxSize), m.store)
	stop()
	restore()
	var file *decryptor.FileError
	if as[*erase.RemoveError](unready) {
		return nil, fmt.Errorf("passphrase file: %w", unready)
	}
	if unready != nil {
		return nil, unready
	}
	if errors.As(err, &file) {
		return nil, fmt.Errorf("decrypt %s: %w", m.encrypted[file.File].Name(), file.Err)
	}
	if err != nil {
		return nil, fmt.Errorf("decrypt: %w", err)
	}
	for _, f := range append(m.encrypted, m.terminal) {
		if f != nil {
			f.Close()
		}
	}
	m.encrypted, m.terminal = nil, nil
	return contents, nil
}

// warnPlaintext tells of a plaintext that the old way, or a person, left where
// the secret is served: it is hidden for now and still on the disk.
func (m *mounting) warnPlaintext(name string) {
	if m.under == nil {
		return
	}
	var st unix.Stat_t
	if unix.Fstatat(int(m.under.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
		m.events.tell(slog.LevelWarn, "plaintext-underneath", slog.String("path", filepath.Join(m.point.Path, name)),
			slog.String("hint", "a file of that name is on the disk, hidden by the mount: remove it"))
	}
}

func (m *mounting) mount(files []fs.File, dirs []fs.Dir, uid, gid uint32) error {
	if err := m.point.Prepare(); err != nil {
		return fmt.Errorf("%w: %w", errMount, err)
	}
	// The FUSE library tells through the standard logger what fusermount3 said.
	said := new(strings.Builder)
	log.SetOutput(said)
	log.SetFlags(0)
	options := fs.Options{
		Path: m.point.Path, Files: files, Dirs: dirs, Under: m.under,
		AllowOther: m.AllowOther || uid != uint32(os.Geteuid()) || gid != uint32(os.Getegid()) || m.othersRead(),
		Allow:      m.allow(),
		Who:        m.warden.Readers(),
		Holds:      m.warden.Holds,
		Status:     m.status,
		Failed: func(err error) {
			m.events.tell(slog.LevelError, "failure", slog.String("error", err.Error()))
		},
	}
	if m.point.File {
		options.Release = m.warden.Release
	}
	if m.within != 0 {
		options.Allow = m.onlyWithin(options.Allow)
	}
	server, err := fs.Mount(options)
	log.SetOutput(io.Discard)
	if err != nil {
		// Whatever was mounted goes; if nothing was, so does the placeholder.
		released := m.warden.Release()
		return fmt.Errorf("%w: %w", errMount, errors.Join(err, firstLine(said.String()), released, m.point.Abandon()))
	}
	m.server = server
	m.served = make(chan error, 1)
	go func() { m.served <- server.Serve() }()
	return nil
}

// onlyWithin lets in who descends from one process, and whom next lets in.
func (m *mounting) onlyWithin(next func(pid, uid, gid uint32) error) func(pid, uid, gid uint32) error {
	return func(pid, uid, gid uint32) error {
		if pid == 0 || !m.warden.Descends(pid, uint32(m.within)) {
			return errors.New("it is not a process of the command")
		}
		if next == nil {
			return nil
		}
		return next(pid, uid, gid)
	}
}

// each does something to every secret.
func (m *mounting) each(f func(*once.Secret) error) error {
	var errs []error
	for _, s := range m.secrets {
		errs = append(errs, f(s.once))
	}
	return errors.Join(errs...)
}

func firstLine(s string) error {
	if s = strings.TrimSpace(s); s == "" {
		return nil
	}
	line, _, _ := strings.Cut(s, "\n")
	return errors.New(line)
}

// check has the first stat of each file made, as a reader would.
func (m *mounting) check(ctx context.Context) error {
	checked := make(chan error, 1)
	go func() { checked <- m.shows() }()
	select {
	case err := <-checked:
		return err
	case err := <-m.served:
		m.served <- err
		return fmt.Errorf("%w: it was unmounted at once", errSelfCheck)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// shows tells whether the mount shows what it should.
func (m *mounting) shows() error {
	names := make([]string, len(m.secrets))
	for i, s := range m.secrets {
		if !m.point.File {
			names[i] = s.name
		}
	}
	shown, err := m.warden.Stat(names)
	if err != nil {
		return fmt.Errorf("%w: stat: %w", errSelfCheck, err)
	}
	for i, s := range m.secrets {
		switch st := shown[i]; {
		case st.Errno == unix.EACCES && strings.Contains(s.name, "/"):
			// Its directory is not ours to go into, and the kernel knows.
		case st.Errno != 0:
			return fmt.Errorf("%w: stat %s: %w", errSelfCheck, s.path, st.Errno)
		case st.Size != s.once.Size() || st.Mode != unix.S_IFREG|uint32(s.mode):
			return fmt.Errorf("%w: %s has another size or mode", errSelfCheck, s.path)
		}
	}
	return nil
}

func (m *mounting) removePassphrase() error {
	if file := m.erasable(); file != nil {
		gone, err := m.warden.Erase()
		if errors.Is(err, warden.ErrGone) || errors.As(err, new(unix.Errno)) {
			// It may have come to grief behind the removal.
			gone = gone || m.passphrase.Unlinked()
		}
		switch {
		case gone:
			// Going down now would lose passphrase and mount both.
			m.events.tell(slog.LevelError, "passphrase-not-overwritten", slog.String("error", err.Error()))
		case err != nil:
			return fmt.Errorf("passphrase file: %w", &erase.RemoveError{Path: file.Removable(), Err: err})
		}
	}
	if m.passphrase != nil {
		m.passphrase.Close()
		m.passphrase = nil
	}
	return nil
}

// serve waits for the end: a signal, an unmount from outside, or, over a file,
// the spend.
func (m *mounting) serve(ctx context.Context) error {
	select {
	case err := <-m.served:
		m.served <- err
		m.events.tell(slog.LevelInfo, "unmounted", slog.String("path", m.point.Path))
		if err != nil {
			return fmt.Errorf("serve %s: %w", m.point.Path, err)
		}
		return nil
	case e := <-m.tripwire.intruded:
		m.events.tell(slog.LevelError, "stopping", slog.String("path", m.point.Path), slog.String("because", "intrusion"))
		return intruder(m.point.Path, e)
	case <-ctx.Done():
	}
	m.events.tell(slog.LevelInfo, "stopping", slog.String("path", m.point.Path))
	return nil
}

// untilSignal returns a context that the first signal to stop ends. A second
// one ends the process at once: its memory is the kernel's then, which zeroes
// secret memory.
func untilSignal() (context.Context, func()) {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	go func() {
		<-signals
		cancel()
		<-signals
		os.Exit(exitStopped)
	}()
	return ctx, cancel
}

// close takes everything down that start has set up: unmounts, zeroes, ends the
// helpers. It is safe after any step. An error is what is left.
func (m *mounting) close() (left error) {
	if m.server != nil {
		if err := m.warden.Release(); err != nil {
			m.events.tell(slog.LevelError, "unmount", slog.String("error", err.Error()))
			left = fmt.Errorf("%w: %s: %w", errLeft, m.point.Path, err)
		}
	}
	for _, s := range m.secrets {
		if err := s.once.Destroy(); err != nil {
			m.events.tell(slog.LevelError, "wipe", slog.String("path", s.path), slog.String("error", err.Error()))
		}
	}
	if m.server != nil {
		select {
		case <-m.served: // gone by itself
		default:
			m.server.Stop()
			select {
			case <-m.served:
			case <-time.After(time.Second):
				// A file under the mount hangs. The secrets are zeroed; leave.
			}
		}
	}
	if m.warden != nil {
		m.warden.Close()
	}
	if m.alarm != nil {
		m.alarm.Close()
	}
	m.counters.close()
	for _, f := range append(m.encrypted, m.under, m.terminal) {
		if f != nil {
			f.Close()
		}
	}
	if m.passphrase != nil {
		m.passphrase.Close()
	}
	if m.policy != nil {
		m.policy.Close()
	}
	return left
}

// mountStatus is what status tells, as JSON in an extended attribute of the
// mount's root.
type mountStatus struct {
	Version int        `json:"version"` // of this format
	Path    string     `json:"path"`
	PID     int        `json:"pid"`
	Ready   bool       `json:"ready"`
	ReadyAt *time.Time `json:"ready_at,omitempty"`
	Memory  string     `json:"memory"` // memfd_secret or mlock
	// Sandbox lists what the serving process has given up.
	Sandbox []sandbox.Layer `json:"sandbox"`
	Files   []secretStatus  `json:"files"`
	// More is the number of the first file that this part does not tell of; 0 if
	// there is none.
	More int `json:"more,omitempty"`
}

type secretStatus struct {
	Name string `json:"name"`
	Path string `json:"path"`
	once.Status
	Intrusions int64 `json:"intrusions"` // of the refused and late attempts that the log has
}

// maxStatus leaves room for what is not of a file in an extended attribute
// (XATTR_SIZE_MAX of linux/limits.h is 64 KiB).
const maxStatus = 56 << 10

// status tells of the files from that number on, as far as there is room.
func (m *mounting) status(from int) []byte {
	st := mountStatus{Version: 1, Path: m.point.Path, PID: os.Getpid(), Memory: string(m.store.Kind()), Files: []secretStatus{}}
	m.mu.Lock()
	if at := m.readyAt; !at.IsZero() {
		st.Ready = true
		st.ReadyAt = &at
		st.Sandbox = m.layers
	}
	m.mu.Unlock()
	size := 0
	for i, s := range m.secrets[min(from, len(m.secrets)):] {
		file := secretStatus{Name: s.name, Path: s.path, Status: s.once.Status(), Intrusions: s.intrusions.Load()}
		text, err := json.Marshal(file)
		if err != nil {
			return []byte("{}")
		}
		if size += len(text); size > maxStatus && i > 0 {
			st.More = from + i
			break
		}
		st.Files = append(st.Files, file)
	}
	text, err := json.Marshal(st)
	if err != nil {
		return []byte("{}")
	}
	return text
}
