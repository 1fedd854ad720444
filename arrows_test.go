// Package oncefs_test checks what holds for the tree as a whole.
package oncefs_test

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

type pkg struct {
	ImportPath string
	Dir        string
	Imports    []string
	GoFiles    []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Dir,Imports,GoFiles", "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// arrows are the imports between rooms that the design allows.
var arrows = map[string][]string{
	"oncefs/cmd/oncefs": {"oncefs/fs", "oncefs/crypto", "oncefs/internal/once", "oncefs/internal/secretmem", "oncefs/internal/decryptor",
		"oncefs/internal/sandbox", "oncefs/internal/warden", "oncefs/internal/mountpoint", "oncefs/internal/erase",
		"oncefs/internal/policy", "oncefs/internal/alarm", "oncefs/internal/metrics", "oncefs/internal/supervisor", "oncefs/internal/private", "oncefs/internal/bundle"},
	"oncefs/cmd/oncefs-metrics":  {"oncefs/internal/metrics", "oncefs/internal/sandbox"},
	"oncefs/fs":                  {"oncefs/internal/once", "oncefs/internal/secretmem", "oncefs/internal/wait"},
	"oncefs/internal/decryptor":  {"oncefs/crypto", "oncefs/internal/bundle", "oncefs/internal/secretmem", "oncefs/internal/sandbox"},
	"oncefs/internal/warden":     {"oncefs/internal/mountpoint", "oncefs/internal/process", "oncefs/internal/erase", "oncefs/internal/sandbox", "oncefs/internal/wait"},
	"oncefs/internal/policy":     {"oncefs/internal/process"},
	"oncefs/internal/alarm":      {},
	"oncefs/internal/metrics":    {},
	"oncefs/crypto":              {},
	"oncefs/internal/once":       {},
	"oncefs/internal/bundle":     {},
	"oncefs/internal/secretmem":  {},
	"oncefs/internal/sandbox":    {},
	"oncefs/internal/mountpoint": {},
	"oncefs/internal/erase":      {},
	"oncefs/internal/process":    {},
	"oncefs/internal/wait":       {},
	"oncefs/internal/supervisor": {"oncefs/internal/process"},
	"oncefs/internal/private":    {"oncefs/internal/sandbox"},
}

func TestRoomsKeepTheirArrows(t *testing.T) {
	for _, p := range packages(t) {
		if strings.HasPrefix(p.ImportPath, "oncefs/integration") || p.ImportPath == "oncefs" {
			for _, i := range p.Imports {
				if strings.HasPrefix(i, "oncefs/") && !strings.HasPrefix(i, "oncefs/integration") {
					t.Errorf("%s sees only the built binary, and imports %s", p.ImportPath, i)
				}
			}
			continue
		}
		allowed, known := arrows[p.ImportPath]
		if !known {
			t.Errorf("%s is a room that no arrow is drawn for", p.ImportPath)
		}
		for _, i := range p.Imports {
			if strings.HasPrefix(i, "oncefs/") && !slices.Contains(allowed, i) {
				t.Errorf("%s must not know %s", p.ImportPath, i)
			}
		}
	}
}

// words are foreign vocabularies, each with the one room that speaks it.
var words = map[string]string{
	"archive/tar":    "oncefs/internal/bundle",
	"bazil.org/fuse": "oncefs/fs",
	"github.com/ProtonMail/go-crypto/openpgp":       "oncefs/crypto",
	"github.com/klauspost/compress":                 "oncefs/crypto",
	"github.com/alecthomas/kong":                    "oncefs/cmd/oncefs",
	"github.com/elastic/go-seccomp-bpf":             "oncefs/internal/sandbox",
	"github.com/landlock-lsm/go-landlock":           "oncefs/internal/sandbox",
	"kernel.org/pub/linux/libs/security/libcap/cap": "oncefs/internal/sandbox",
	"github.com/moby/sys/mountinfo":                 "oncefs/internal/mountpoint",
	"unix.MemfdSecret":                              "oncefs/internal/secretmem",
	"unix.Mmap":                                     "oncefs/internal/secretmem",
	"unix.MmapPtr":                                  "oncefs/internal/secretmem",
	"unix.Mlock":                                    "oncefs/internal/secretmem",
	"unix.Splice":                                   "oncefs/internal/secretmem",
	"unix.Mount":                                    "oncefs/internal/mountpoint",
	"unix.PR_SET_DUMPABLE":                          "oncefs/internal/sandbox",
	"unix.PR_SET_NO_NEW_PRIVS":                      "oncefs/internal/sandbox",
	"unix.PR_SET_CHILD_SUBREAPER":                   "oncefs/internal/supervisor",
	"unix.Fsopen":                                   "oncefs/internal/private",
	"unix.MoveMount":                                "oncefs/internal/private",
	"go.yaml.in/yaml/v4":                            "oncefs/cmd/oncefs",
	"github.com/vbauerster/mpb":                     "oncefs/cmd/oncefs",
	"github.com/prometheus":                         "oncefs/cmd/oncefs-metrics",
	"net/http":                                      "oncefs/cmd/oncefs-metrics",
}

func TestForeignWordsStayInTheirRoom(t *testing.T) {
	for _, p := range packages(t) {
		if strings.HasPrefix(p.ImportPath, "oncefs/integration") {
			continue
		}
		for _, i := range p.Imports {
			for word, room := range words {
				if (i == word || strings.HasPrefix(i, word+"/")) && p.ImportPath != room {
					t.Errorf("%s imports %s, whose room is %s", p.ImportPath, i, room)
				}
			}
		}
		for _, name := range p.GoFiles {
			path := filepath.Join(p.Dir, name)
			fset := token.NewFileSet()
			file, err := parser.ParseFile(fset, path, nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			for _, use := range qualified(file) {
				if use == "os.Exit" && !strings.HasPrefix(p.ImportPath, "oncefs/cmd/") {
					t.Errorf("%s ends the program, which only a command does", path)
				}
				if room, ok := words[use]; ok && p.ImportPath != room {
					t.Errorf("%s uses %s, whose room is %s", path, use, room)
				}
			}
		}
	}
}

// qualified lists every package.Name that a file uses.
func qualified(file *ast.File) (uses []string) {
	ast.Inspect(file, func(n ast.Node) bool {
		if sel, ok := n.(*ast.SelectorExpr); ok {
			if pkg, ok := sel.X.(*ast.Ident); ok {
				uses = append(uses, pkg.Name+"."+sel.Sel.Name)
			}
		}
		return true
	})
	return uses
}
