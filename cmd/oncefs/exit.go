package main

import (
	"context"
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"

	"oncefs/crypto"
	"oncefs/internal/bundle"
	"oncefs/internal/decryptor"
	"oncefs/internal/erase"
	"oncefs/internal/metrics"
	"oncefs/internal/mountpoint"
	"oncefs/internal/private"
	"oncefs/internal/secretmem"
	"oncefs/internal/supervisor"
)

// Exit statuses. They are a promise (docs/exit-codes.md, and a test compares):
// a number never changes its meaning. 2 is left to a crash of the Go runtime.
const (
	exitOther       = 1
	exitTarget      = 10
	exitMounted     = 11
	exitNoFUSE      = 12
	exitMount       = 13
	exitLeft        = 14
	exitNoEncrypted = 20
	exitAmbiguous   = 21
	exitPassphrase  = 30
	exitWrong       = 31
	exitNotRemoved  = 32
	exitDamaged     = 40
	exitNotOpenPGP  = 41
	exitUnsupported = 42
	exitTooLarge    = 43
	exitBundle      = 44
	exitMemory      = 50
	exitRequired    = 51
	exitChild       = 52
	exitPrivate     = 53
	exitStopped     = 60
	exitOutput      = 61
	exitTerminal    = 62
	exitExists      = 63
	exitGivenUp     = 64
	exitChanged     = 65
	exitNotReplaced = 66
	exitIntrusion   = 70
	exitMetrics     = 71
	exitUsage       = 80
	exitClaimed     = 90
	exitSpent       = 91
	exitNotReady    = 92
	exitWeak        = 93
	exitNotExec     = 126
	exitNoCommand   = 127
)

// An exit is one row of the table.
type exit struct {
	code    int
	meaning string
	is      []error          // any of these, by errors.Is
	as      func(error) bool // or this
	advice  string           // what to do
	hints   map[error]string // what to do, where one row has several causes
}

func (e *exit) hint(err error) string {
	for cause, hint := range e.hints {
		if errors.Is(err, cause) {
			return hint
		}
	}
	return e.advice
}

// errors of this package
var (
	errNoEncrypted    = errors.New("there is no encrypted file")
	errAmbiguous      = errors.New("there are two encrypted files of that name, and they differ")
	errNoPassphrase   = errors.New("there is no passphrase file and no terminal to ask at")
	errLost           = errors.New("the secret is lost: the process that held it was killed, and had removed the passphrase")
	errNoNew          = errors.New("there is no file with the new passphrase and no terminal to ask at")
	errOutput         = errors.New("is there already and is not an OpenPGP message")
	errTerminal       = errors.New("decrypt: standard output is a terminal, which keeps what it shows")
	errExists         = errors.New("is there already")
	errStopped        = errors.New("stopped before it was ready")
	errNotFit         = errors.New("the options do not fit together")
	errRequired       = errors.New("a required protection is not to be had here")
	errLinkedWithC    = errors.New("this binary is linked with C and could not give up its privileges in every thread")
	errBecome         = errors.New("give up privileges")
	errMissing        = errors.New("there is no such command")
	errNotExecutable  = errors.New("the command cannot be executed")
	errNoCommand      = errors.New("no command was given")
	errSelfCheck      = errors.New("the mount does not show what it should")
	errPassphraseFile = errors.New("the passphrase file cannot be used")
	errNotRegular     = errors.New("is there already and is not a regular file")
	errNoEditor       = errors.New("there is no editor: neither $VISUAL nor $EDITOR is set, and there is no editor and no vi")
	errGivenUp        = errors.New("the edit was not accepted; the file is as it was")
	errChanged        = errors.New("was changed by somebody else meanwhile; theirs is left as it is")
	errNotReplaced    = errors.New("could not be replaced")
	errLeft           = errors.New("the mount could not be taken off; it is there still, and dead; the memory is zeroed")
	errMetrics        = errors.New("the counters cannot be shown")
	errEditBundle     = errors.New("is a bundle of files, and an editor edits one")
	errSeveral        = errors.New("others can open it, with another passphrase or a key, and could not open what would replace it")
)

func as[T error](err error) bool {
	var target T
	return errors.As(err, &target)
}

// exits is searched from the top: the first row that fits is the one.
var exits = []exit{
	{code: exitNotRemoved, meaning: "the passphrase file (or, for encrypt, the plaintext) cannot be removed",
		as: as[*erase.RemoveError],
		hints: map[error]string{
			unix.EROFS:        "copy it from the read-only volume to a memory emptyDir first and name the copy, or keep it with --keep-passphrase",
			erase.ErrSymlink:  "name the file itself; a Kubernetes Secret volume is made of links: copy the key to a memory emptyDir first (or leave it with --keep-passphrase)",
			erase.ErrHardLink: "remove the other name, or keep the file with --keep-passphrase",
			unix.EPERM:        "take away its immutable attribute (chattr -i), or keep it with --keep-passphrase",
		},
		advice: "make its directory writable for this user, or keep the file with --keep-passphrase"},
	{code: exitNoEncrypted, meaning: "there is no encrypted file", is: []error{errNoEncrypted},
		advice: "make one with: oncefs encrypt secrets.yaml (mount and run can wait for it: --wait)"},
	{code: exitAmbiguous, meaning: "a relative --enc names two files that differ", is: []error{errAmbiguous},
		advice: "name one of them by its absolute path"},
	{code: exitPassphrase, meaning: "there is no passphrase, or it cannot be used",
		is: []error{errNoPassphrase, errNoNew, errPassphraseFile, decryptor.ErrNoTerminal}, as: as[decryptor.PassphraseFault],
		hints: map[error]string{
			errLost:               "give the passphrase again: write its file anew, or start the pod over",
			fs.ErrPermission:      "this user may not read it: look at its owner and mode",
			errNoNew:              "name the file with --new-passphrase-file, or keep the old one with --same-passphrase",
			decryptor.ErrMismatch: "type the same passphrase twice",
			decryptor.ErrTooLong:  "a passphrase has at most 4096 bytes; is it the right file?",
			decryptor.ErrEmpty:    "the passphrase is the first line of its file; it may not be empty",
		},
		advice: "name the file with --passphrase-file, or run it at a terminal to be asked"},
	{code: exitWrong, meaning: "the passphrase is wrong (damage to the first bytes looks the same)", is: []error{crypto.ErrWrongPassphrase},
		advice: "compare with gpg -d FILE; the passphrase is the first line of its file, all of it"},
	{code: exitDamaged, meaning: "the encrypted file is damaged, cut short, has data after its end, or has no integrity protection",
		is: []error{crypto.ErrDamaged, crypto.ErrTrailing, crypto.ErrNoIntegrity, crypto.ErrRead},
		hints: map[error]string{
			crypto.ErrNoIntegrity: "encrypt it again with a gpg that is not told otherwise, or with oncefs encrypt",
			crypto.ErrTrailing:    "the file must hold one message and nothing else",
		},
		advice: "take the file from where it was made once more; every file here is as it was"},
	{code: exitNotOpenPGP, meaning: "the file is not an OpenPGP message", is: []error{crypto.ErrNotOpenPGP},
		advice: "encrypt it with oncefs encrypt, or with gpg --symmetric"},
	{code: exitUnsupported, meaning: "the message is of a kind that is not read: a public key, another cipher, a signature",
		is:     []error{crypto.ErrPublicKey, crypto.ErrUnsupported, errSeveral},
		hints:  map[error]string{errSeveral: "decrypt it with oncefs decrypt -o, and encrypt it anew for all who need it"},
		advice: "encrypt it with a passphrase: oncefs encrypt, or gpg --symmetric --cipher-algo AES256"},
	{code: exitTooLarge, meaning: "the content is larger than --max-size", is: []error{crypto.ErrTooLarge, secretmem.ErrTooLarge, bundle.ErrTooLarge},
		advice: "raise --max-size if the content is really that large"},
	{code: exitBundle, meaning: "the files of a bundle cannot be served, or a directory cannot be made one; edit: it is a bundle",
		is: []error{errEditBundle}, as: as[bundle.Fault],
		hints: map[error]string{
			errEditBundle:         "unpack it where no disk is (oncefs decrypt FILE | tar -C /dev/shm/DIR -x), edit there, and make it anew: oncefs encrypt DIR",
			bundle.ErrFormat:      "what is named .tar.enc is taken for a bundle; --no-unpack serves it as one file",
			bundle.ErrNoEnd:       "make it anew from its files with oncefs encrypt DIR, or tar and gpg; --no-unpack serves it as one file",
			bundle.ErrTrailing:    "make it anew from its files with oncefs encrypt DIR, or tar and gpg; --no-unpack serves it as one file",
			bundle.ErrEmpty:       "put a file into it",
			bundle.ErrTooMany:     "make several bundles, and mount them in several places",
			bundle.ErrUnprintable: "name it with letters that can be shown",
		},
		advice: "a bundle holds files and directories, with names that lead nowhere else: oncefs encrypt DIR makes one, and so does tar -C DIR -c . (--no-unpack serves the archive as one file)"},
	{code: exitMemory, meaning: "memory cannot be locked", as: as[*secretmem.LimitError],
		advice: "raise the limit (ulimit -l, LimitMEMLOCK= in a systemd unit) or give the capability IPC_LOCK"},
	{code: exitRequired, meaning: "what --require names is not there", is: []error{secretmem.ErrNoSecret, errRequired}, as: as[*supervisor.NotPrivateError],
		hints: map[error]string{
			errRequired: "run it on a kernel that has it, or do without --require",
		},
		advice: "boot with secretmem.enable=1 on Linux 5.14 or later, or do without --require secretmem"},
	{code: exitChild, meaning: "the decrypting process died", is: []error{decryptor.ErrDied},
		advice: "was it killed for want of memory? every file is as it was"},
	{code: exitChanged, meaning: "edit, rekey: somebody else changed the encrypted file meanwhile; theirs is left as it is", is: []error{errChanged},
		advice: "look at both (oncefs decrypt FILE) and bring them together"},
	{code: exitNotReplaced, meaning: "edit, rekey: this user could not replace the encrypted file", is: []error{errNotReplaced},
		advice: "own the file, and make its directory writable"},
	{code: exitGivenUp, meaning: "edit: the editor failed, or what it left was not accepted; the file is as it was", is: []error{errGivenUp, errNoEditor},
		hints: map[error]string{errNoEditor: "set EDITOR, for example EDITOR=nano"}},
	{code: exitPrivate, meaning: "edit: there can be no private place in memory for the plaintext", is: []error{private.ErrUnavailable},
		advice: "as root it takes CAP_SYS_ADMIN, as another user the right to make user namespaces (sysctl kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns, user.max_user_namespaces), and Linux 5.12"},
	{code: exitMounted, meaning: "the target is an oncefs mount already", is: []error{mountpoint.ErrMounted},
		advice: "unmount it first with oncefs umount TARGET, or ask it with oncefs status TARGET"},
	{code: exitNotReady, meaning: "status, umount: no live oncefs is mounted there", is: []error{mountpoint.ErrNotMounted},
		advice: "oncefs mount TARGET --enc FILE mounts one"},
	{code: exitTarget, meaning: "the target cannot be mounted on",
		is: []error{mountpoint.ErrMissing, mountpoint.ErrSymlink, mountpoint.ErrNotEmpty, mountpoint.ErrKind, mountpoint.ErrDead, mountpoint.ErrPrivate},
		hints: map[error]string{
			mountpoint.ErrMissing:  "make the directory first; a file path must end in the name that is served",
			mountpoint.ErrSymlink:  "name the file itself, not a link to it",
			mountpoint.ErrNotEmpty: "remove it first: after the read it would be back",
			mountpoint.ErrPrivate:  "mount the outer one with --allow-other (user_allow_other in /etc/fuse.conf), or mount elsewhere",
			mountpoint.ErrDead:     "unmount it first with umount -l",
		},
		advice: "name a directory, or a file path that ends in the name that is served"},
	{code: exitNoFUSE, meaning: "FUSE is not available: no device, no permission, no fusermount3",
		is: []error{mountpoint.ErrNoDevice, mountpoint.ErrDevice, mountpoint.ErrNoHelper},
		hints: map[error]string{
			mountpoint.ErrNoDevice: "load the module (modprobe fuse); in a container pass /dev/fuse through",
			mountpoint.ErrDevice:   "the device must be readable and writable for this user (mode 0666 on most systems)",
			mountpoint.ErrNoHelper: "a user who is not root needs it: apt-get install fuse3",
		}},
	{code: exitStopped, meaning: "stopped by a signal before it was ready", is: []error{errStopped, context.Canceled, supervisor.ErrStopped}},
	{code: exitOutput, meaning: "encrypt: the output is there already and is not an OpenPGP message", is: []error{errOutput},
		advice: "choose another name with -o, or overwrite it with --force"},
	{code: exitTerminal, meaning: "decrypt: standard output is a terminal", is: []error{errTerminal},
		advice: "name a file with -o, pipe it into the program that wants it, or show it all the same with --tty"},
	{code: exitExists, meaning: "the output is there already", is: []error{errExists},
		advice: "choose another name with -o, or overwrite it with --force"},
	{code: exitIntrusion, meaning: "stopped by --on-intrusion exit: somebody else was refused or came late", is: []error{errIntrusion},
		advice: "find out who it was before you serve the secret again; who may read is said with --reader-uid and --reader-exe"},
	{code: exitLeft, meaning: "the mount could not be taken off at the end; it is there still, and dead", is: []error{errLeft},
		advice: "take it off with: oncefs umount TARGET; a mount over a file leaves an empty file there that can be removed"},
	{code: exitMetrics, meaning: "the counters cannot be shown where --metrics or --metrics-textfile says", is: []error{errMetrics},
		hints:  map[error]string{metrics.ErrMissing: "install it in the same directory as oncefs; make build makes both"},
		advice: "the address must be free and this machine's, for example 127.0.0.1:9735; the directory must be there and writable"},
	{code: exitNoCommand, meaning: "run: there is no such command", is: []error{errMissing},
		advice: "name it by its path, or put its directory into PATH"},
	{code: exitNotExec, meaning: "run: the command cannot be executed", is: []error{errNotExecutable},
		advice: "is it executable for the user who is to run it (--user), and for this kind of machine?"},
	{code: exitUsage, meaning: "the command line is wrong", is: []error{errNotFit, errBecome},
		hints: map[error]string{
			errBecome: "to become another user takes root, or CAP_SETUID and CAP_SETGID; to keep a capability takes having it",
		},
		advice: "oncefs COMMAND --help explains the options"},
	{code: exitMount, meaning: "the mount failed, or did not show the file as it should", is: []error{errMount, errSelfCheck},
		advice: "in a container, mounting takes CAP_SYS_ADMIN and /dev/fuse; elsewhere a user who is not root needs fusermount3 (Debian package fuse3)"},
	{code: exitWeak, meaning: "check: it can be served, and is weaker than it should be"},
	{code: exitOther, meaning: "anything else",
		hints: map[error]string{
			errLinkedWithC:   "build it with make build, or with CGO_ENABLED=0",
			fs.ErrPermission: "this user may not do that: look at owner and mode of the file and of its directory",
			unix.ENOSPC:      "the disk is full; what was there before is there as it was",
			unix.EDQUOT:      "the quota is full; what was there before is there as it was",
		}},
}

var errMount = errors.New("mount")

func exitFor(err error) *exit {
	for i := range exits {
		e := &exits[i]
		for _, is := range e.is {
			if errors.Is(err, is) {
				return e
			}
		}
		if e.as != nil && e.as(err) {
			return e
		}
	}
	return &exits[len(exits)-1]
}
