package policy

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"oncefs/internal/process"
)

func file(t *testing.T, name, content string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func executable(t *testing.T) *Executable {
	t.Helper()
	e, err := OpenExecutable(file(t, "app", "\x7fELF", 0o755))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

func TestC12_Decide(t *testing.T) {
	app, other := executable(t), executable(t)
	self := process.Facts{Exe: app.Path, Groups: []uint32{7, 8}, Dev: app.dev, Ino: app.ino, SHA256: "aa"}
	elsewhere := self
	elsewhere.Dev++
	for name, c := range map[string]struct {
		policy Policy
		facts  process.Facts
		err    error
		in     bool
	}{
		"no rule":                      {Policy{}, self, nil, true},
		"user":                         {Policy{UIDs: []uint32{1, 1000}}, self, nil, true},
		"another user":                 {Policy{UIDs: []uint32{1}}, self, nil, false},
		"group":                        {Policy{GIDs: []uint32{100}}, self, nil, true},
		"supplementary group":          {Policy{GIDs: []uint32{1, 8}}, self, nil, true},
		"another group":                {Policy{GIDs: []uint32{1, 2}}, self, nil, false},
		"group, and cannot be told":    {Policy{GIDs: []uint32{100}}, self, process.ErrOutside, true},
		"another, and cannot be told":  {Policy{GIDs: []uint32{8}}, self, process.ErrOutside, false},
		"executable":                   {Policy{Exes: []*Executable{other, app}}, self, nil, true},
		"another executable":           {Policy{Exes: []*Executable{other}}, self, nil, false},
		"same inode, another device":   {Policy{Exes: []*Executable{app}}, elsewhere, nil, false},
		"executable cannot be told":    {Policy{Exes: []*Executable{app}}, self, process.ErrGone, false},
		"digest":                       {Policy{Digests: []string{"bb", "aa"}}, self, nil, true},
		"another digest":               {Policy{Digests: []string{"bb"}}, self, nil, false},
		"no digest":                    {Policy{Digests: []string{"bb"}}, process.Facts{}, nil, false},
		"digest cannot be told":        {Policy{Digests: []string{"aa"}}, self, process.ErrLarge, false},
		"all kinds":                    {Policy{UIDs: []uint32{1000}, GIDs: []uint32{8}, Exes: []*Executable{app}, Digests: []string{"aa"}}, self, nil, true},
		"all kinds but the user":       {Policy{UIDs: []uint32{1}, GIDs: []uint32{8}, Exes: []*Executable{app}, Digests: []string{"aa"}}, self, nil, false},
		"all kinds but the group":      {Policy{UIDs: []uint32{1000}, GIDs: []uint32{9}, Exes: []*Executable{app}, Digests: []string{"aa"}}, self, nil, false},
		"all kinds but the executable": {Policy{UIDs: []uint32{1000}, GIDs: []uint32{8}, Exes: []*Executable{other}, Digests: []string{"aa"}}, self, nil, false},
		"all kinds but the digest":     {Policy{UIDs: []uint32{1000}, GIDs: []uint32{8}, Exes: []*Executable{app}, Digests: []string{"bb"}}, self, nil, false},
	} {
		look := func(pid uint32, what process.What) (process.Facts, error) {
			if pid != 42 {
				t.Errorf("%s: asked about %d", name, pid)
			}
			f := c.facts
			if !what.File {
				f.Dev, f.Ino = 0, 0
			}
			if !what.Digest {
				f.SHA256 = ""
			}
			return f, c.err
		}
		err := c.policy.Decide(42, 1000, 100, look)
		if (err == nil) != c.in {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && c.err != nil && (!errors.Is(err, ErrUnknown) || !errors.Is(err, c.err)) {
			t.Errorf("%s: it does not say that it cannot be told: %v", name, err)
		}
	}
}

// What swaps its executable between two looks is not let in by either.
func TestC12_DigestIsOfTheSameFile(t *testing.T) {
	app := executable(t)
	looks := 0
	look := func(_ uint32, what process.What) (process.Facts, error) {
		if looks++; looks == 1 {
			return process.Facts{Dev: app.dev, Ino: app.ino}, nil
		}
		return process.Facts{Dev: app.dev, Ino: app.ino + 1, SHA256: "aa"}, nil
	}
	p := Policy{Exes: []*Executable{app}, Digests: []string{"aa"}}
	if err := p.Decide(1, 0, 0, look); err == nil || looks != 2 {
		t.Errorf("%v after %d looks", err, looks)
	}
}

// Nobody is looked up, or hashed, who is refused anyway.
func TestC12_CheapRulesFirst(t *testing.T) {
	app := executable(t)
	p := Policy{UIDs: []uint32{1}, Exes: []*Executable{app}, Digests: []string{"aa"}}
	look := func(_ uint32, what process.What) (process.Facts, error) {
		if what.Digest {
			t.Error("it was hashed")
		}
		return process.Facts{}, nil
	}
	if p.Decide(1, 1, 1, look) == nil {
		t.Error("let in")
	}
	never := func(uint32, process.What) (process.Facts, error) {
		t.Error("looked up")
		return process.Facts{}, nil
	}
	if p.Decide(1, 2, 1, never) == nil {
		t.Error("let in")
	}
}

func TestC12_OpenExecutable(t *testing.T) {
	for path, want := range map[string]error{
		file(t, "script", "#!/bin/sh\n", 0o755): ErrScript,
		file(t, "data", "\x7fELF", 0o644):       ErrNoProgram,
		t.TempDir():                             ErrNoProgram,
		"/nonexistent/app":                      os.ErrNotExist,
	} {
		if e, err := OpenExecutable(path); !errors.Is(err, want) {
			t.Errorf("%s: %v, %v", path, e, err)
		}
	}
}
