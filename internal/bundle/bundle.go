// Package bundle is many files in one: a tar archive of regular files and
// directories whose names lead nowhere but below the place where they are served.
//
// What is made here any tar unpacks, and what tar makes is read here, so far as it
// holds nothing else. A name that could lead elsewhere or mean two things is
// refused rather than made harmless: who made such an archive had something in
// mind. An archive is taken whole or not at all.
package bundle

import (
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	// MaxEntries bounds the files and directories of a bundle, with those that are
	// only part of a name. Each file takes a page of locked memory and a mapping; a
	// user has 2048 such pages (RLIMIT_MEMLOCK is 8 MiB by default).
	MaxEntries = 1024
	// MaxName bounds a name with its directories, in bytes.
	MaxName = 1024
	// maxElement is NAME_MAX of linux/limits.h.
	maxElement = 255
	// Overhead is the most that an archive may hold besides the contents of its
	// files: for each entry its header of 512 bytes, another with a long name and
	// times (pax, or GNU's), what fills the last block up, and the end, which tar
	// makes up to 10 KiB or as much as it was told.
	Overhead = MaxEntries*(4*512+2*MaxName) + 1<<20
)

// implicit is the mode of a directory that is only part of another entry's name.
const implicit = 0o755

// An Entry is one file or directory of a bundle.
type Entry struct {
	Name string // relative, with slashes, as fs.ValidPath has it
	Dir  bool
	Mode uint32 // permission bits
	Size int64  // bytes of content; 0 for a directory
}

// A Fault is one way in which an archive is no bundle. It is comparable, so
// errors.Is finds it.
type Fault uint8

const (
	// of an entry
	ErrFormat      Fault = iota + 1 // not a tar header
	ErrName                         // leads out, or is not in its simplest form
	ErrUnprintable                  // a name that cannot be shown as it is
	ErrLongName                     // longer than MaxName, or than a file name may be
	ErrTwice                        // two of one name
	ErrBelowFile                    // a file where another needs a directory
	ErrSymlink
	ErrHardLink
	ErrDevice // device, FIFO or socket
	ErrSparse
	ErrKind     // another kind of entry
	ErrTooMany  // more than MaxEntries
	ErrTooLarge // more content than was allowed
	// of the whole
	ErrNoEnd    // cut short
	ErrTrailing // something behind the end
	ErrEmpty    // no file
	lastFault   = ErrEmpty
)

// Known tells whether f is one of this package's faults.
func (f Fault) Known() bool { return f >= ErrFormat && f <= lastFault }

func (f Fault) Error() string {
	switch f {
	case ErrFormat:
		return "is not a tar header"
	case ErrName:
		return "has a name that leads elsewhere or is not in its simplest form"
	case ErrUnprintable:
		return "has a name with a character that cannot be shown"
	case ErrLongName:
		return "has a name that is too long"
	case ErrTwice:
		return "has the name of another"
	case ErrBelowFile:
		return "needs a directory where there is a file, or the other way round"
	case ErrSymlink:
		return "is a symbolic link"
	case ErrHardLink:
		return "is a hard link"
	case ErrDevice:
		return "is a device, a FIFO or a socket"
	case ErrSparse:
		return "is sparse"
	case ErrKind:
		return "is neither a file nor a directory"
	case ErrTooMany:
		return fmt.Sprintf("is one more than the %d files and directories that there may be", MaxEntries)
	case ErrTooLarge:
		return "makes the contents too large in all"
	case ErrNoEnd:
		return "is cut short"
	case ErrTrailing:
		return "goes on after its end"
	case ErrEmpty:
		return "holds no file"
	}
	return "has an unknown fault"
}

// An Error says what is wrong with an archive, and with which of its entries. It
// holds no name: names are content as long as nothing is served.
type Error struct {
	Entry int // counted from 1, as `tar t` lists them; 0 where it is none of them
	Fault Fault
}

func (e *Error) Error() string {
	if e.Entry == 0 {
		return "as a tar archive it " + e.Fault.Error()
	}
	return fmt.Sprintf("as a tar archive: entry %d %s", e.Entry, e.Fault)
}

func (e *Error) Unwrap() error { return e.Fault }

// A Tree is what is in a bundle so far. The zero value is empty.
type Tree struct {
	known map[string]*node
}

type node struct {
	Entry
	own bool // it had an entry of its own
}

// Add takes in one more entry, or returns the Fault why it cannot be there.
func (t *Tree) Add(e Entry) error {
	if err := checkName(e.Name); err != nil {
		return err
	}
	if e.Mode&^0o777 != 0 || e.Size < 0 || e.Dir && e.Size != 0 {
		return ErrKind
	}
	if t.known == nil {
		t.known = map[string]*node{}
	}
	for dir := path.Dir(e.Name); dir != "."; dir = path.Dir(dir) {
		if n := t.known[dir]; n == nil {
			t.known[dir] = &node{Entry: Entry{Name: dir, Dir: true, Mode: implicit}}
		} else if !n.Dir {
			return ErrBelowFile
		}
	}
	switch n := t.known[e.Name]; {
	case n == nil:
		t.known[e.Name] = &node{Entry: e, own: true}
	case n.Dir != e.Dir:
		return ErrBelowFile
	case n.own:
		return ErrTwice
	default:
		n.Entry, n.own = e, true
	}
	if len(t.known) > MaxEntries {
		return ErrTooMany
	}
	return nil
}

func checkName(name string) error {
	switch {
	case len(name) > MaxName:
		return ErrLongName
	case name == ".":
		return ErrName
	case !utf8.ValidString(name):
		return ErrUnprintable
	}
	for _, r := range name {
		// Neither what controls a terminal nor what changes the direction of text
		// or has no width: names are in listings and in the log.
		if !unicode.IsPrint(r) {
			return ErrUnprintable
		}
	}
	if !fs.ValidPath(name) {
		return ErrName
	}
	for element := range strings.SplitSeq(name, "/") {
		if len(element) > maxElement {
			return ErrLongName
		}
	}
	return nil
}

// Dirs lists the directories, parents first: also those that had no entry of
// their own.
func (t *Tree) Dirs() []Entry {
	var dirs []Entry
	for _, n := range t.known {
		if n.Dir {
			dirs = append(dirs, n.Entry)
		}
	}
	slices.SortFunc(dirs, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
	return dirs
}
