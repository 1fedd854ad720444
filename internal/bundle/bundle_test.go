package bundle

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// member is an entry of an archive as its maker wants it.
type member struct {
	name, content string
	kind          byte // a file unless it says otherwise, or the name ends in /
	mode          int64
	pax           map[string]string
}

func archive(t testing.TB, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		h := &tar.Header{Typeflag: m.kind, Name: m.name, Mode: m.mode, Size: int64(len(m.content)), PAXRecords: m.pax}
		switch {
		case m.kind == 0 && strings.HasSuffix(m.name, "/"):
			h.Typeflag = tar.TypeDir
		case m.kind == 0:
			h.Typeflag = tar.TypeReg
		case m.kind == tar.TypeSymlink, m.kind == tar.TypeLink:
			h.Linkname = "/etc/passwd"
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, m.content)
	}
	w.Close()
	return b.Bytes()
}

// raw makes a header that no library would write: the fields as they are, with the
// sum that POSIX wants (pax(1), ustar).
func raw(kind byte, name, size string) []byte {
	h := make([]byte, 512)
	copy(h, name)
	copy(h[100:], "0000600\x00")
	copy(h[124:], size)
	copy(h[148:], "        ")
	h[156] = kind
	copy(h[257:], "ustar\x0000")
	sum := 0
	for _, b := range h {
		sum += int(b)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return h
}

// got is what Read makes of an archive.
type got struct {
	entries []Entry
	content map[string]*bytes.Buffer
}

func read(b []byte, max int64) (got, error) {
	g := got{content: map[string]*bytes.Buffer{}}
	err := Read(bytes.NewReader(b), max, func(e Entry) (io.Writer, error) {
		g.entries = append(g.entries, e)
		if e.Dir {
			return nil, nil
		}
		g.content[e.Name] = new(bytes.Buffer)
		return g.content[e.Name], nil
	})
	return g, err
}

func TestReadsWhatIsThere(t *testing.T) {
	b := archive(t, member{name: "./"}, member{name: "./a", content: "one", mode: 0o640}, member{name: "d/", mode: 0o700},
		member{name: "d/b c", content: strings.Repeat("x", 100_000), mode: 0o4755}, member{name: "./e/f/ü", mode: 0o400})
	g, err := read(b, 200_000)
	if err != nil {
		t.Fatal(err)
	}
	want := []Entry{{"a", false, 0o640, 3}, {"d", true, 0o700, 0}, {"d/b c", false, 0o755, 100_000}, {"e/f/ü", false, 0o400, 0}}
	if !slices.Equal(g.entries, want) {
		t.Errorf("got %v", g.entries)
	}
	if g.content["a"].String() != "one" || g.content["d/b c"].String() != strings.Repeat("x", 100_000) || g.content["e/f/ü"].Len() != 0 {
		t.Error("other content")
	}
	var tree Tree
	for _, e := range g.entries {
		if err := tree.Add(e); err != nil {
			t.Error(err)
		}
	}
	if dirs := tree.Dirs(); !slices.Equal(dirs, []Entry{{"d", true, 0o700, 0}, {"e", true, 0o755, 0}, {"e/f", true, 0o755, 0}}) {
		t.Errorf("directories: %v", dirs)
	}
}

// TestReadsEveryTar: what GNU tar writes in each of its formats.
func TestReadsEveryTar(t *testing.T) {
	if _, err := exec.LookPath("tar"); err != nil {
		t.Fatal("tar is not installed")
	}
	dir := t.TempDir()
	long := strings.Repeat("a long name ", 12)
	os.MkdirAll(filepath.Join(dir, long), 0o750)
	os.WriteFile(filepath.Join(dir, long, "key"), []byte("content"), 0o600)
	os.WriteFile(filepath.Join(dir, "top"), nil, 0o644)
	for _, format := range []string{"gnu", "oldgnu", "pax", "posix", "ustar", "v7"} {
		from := dir
		if format == "ustar" || format == "v7" {
			from = filepath.Join(dir, long) // they have no room for such a name
		}
		out, err := exec.Command("tar", "-C", from, "--format", format, "-c", "-f", "-", ".").Output()
		if err != nil {
			t.Fatal(format, err)
		}
		g, err := read(out, 1000)
		if err != nil {
			t.Errorf("%s: %v", format, err)
		}
		for key, content := range g.content {
			if filepath.Base(key) == "key" && content.String() != "content" {
				t.Errorf("%s: %s: %q", format, key, content)
			}
		}
		if len(g.entries) == 0 {
			t.Errorf("%s: nothing", format)
		}
	}
}

func TestRefusesInput(t *testing.T) {
	deep := strings.Repeat("d/", 300)
	many := func(n int) (all []member) {
		for i := range n {
			all = append(all, member{name: fmt.Sprint("f", i)})
		}
		return all
	}
	good := archive(t, member{name: "a", content: "one"})
	one := func(m member) []byte { return archive(t, m) }
	for name, c := range map[string]struct {
		archive []byte
		entry   int
		fault   Fault
	}{
		"leads out":               {one(member{name: "../x"}), 1, ErrName},
		"leads out later":         {one(member{name: "a/../../x"}), 1, ErrName},
		"leads out of ./":         {one(member{name: "./../x"}), 1, ErrName},
		"not in its simplest":     {one(member{name: "a//b"}), 1, ErrName},
		"a dot inside":            {one(member{name: "a/./b"}), 1, ErrName},
		"./ twice":                {one(member{name: "././a"}), 1, ErrName},
		"absolute":                {one(member{name: "/etc/passwd"}), 1, ErrName},
		"absolute directory":      {one(member{name: "/etc/"}), 1, ErrName},
		"root":                    {one(member{name: "/"}), 1, ErrName},
		"a file called .":         {raw0(raw('0', ".", "00000000000")), 1, ErrName},
		"a file called ./":        {raw0(raw('0', "./", "00000000000")), 1, ErrName},
		"no name":                 {raw0(raw('0', "", "00000000000")), 1, ErrName},
		"a directory of no name":  {raw0(raw('5', "", "00000000000")), 1, ErrName},
		"long":                    {one(member{name: strings.Repeat("x", 256)}), 1, ErrLongName},
		"longer":                  {one(member{name: strings.Repeat("x/", 512) + "x"}), 1, ErrLongName},
		"terminal control":        {one(member{name: "a\x1b[2J"}), 1, ErrUnprintable},
		"right to left":           {one(member{name: "a\u202egnp.exe"}), 1, ErrUnprintable},
		"newline":                 {one(member{name: "a\nb"}), 1, ErrUnprintable},
		"not UTF-8":               {raw0(raw('0', "a\xff", "00000000000")), 1, ErrUnprintable},
		"symbolic link":           {one(member{name: "a", kind: tar.TypeSymlink}), 1, ErrSymlink},
		"hard link":               {archive(t, member{name: "a"}, member{name: "b", kind: tar.TypeLink}), 2, ErrHardLink},
		"device":                  {one(member{name: "a", kind: tar.TypeChar}), 1, ErrDevice},
		"block device":            {one(member{name: "a", kind: tar.TypeBlock}), 1, ErrDevice},
		"FIFO":                    {one(member{name: "a", kind: tar.TypeFifo}), 1, ErrDevice},
		"sparse":                  {gnuSparse(), 1, ErrSparse},
		"contiguous":              {raw0(raw('7', "a", "00000000000")), 1, ErrKind},
		"unknown":                 {raw0(raw('Z', "a", "00000000000")), 1, ErrKind},
		"for all":                 {one(member{kind: tar.TypeXGlobalHeader, pax: map[string]string{"path": "../x"}}), 1, ErrKind},
		"pax leads out":           {append(pax("path=../../x"), good...), 1, ErrName},
		"pax is sparse":           {append(pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=x", "GNU.sparse.realsize=1000000000000"), archive(t, member{name: "a", content: "0\n" + strings.Repeat("\x00", 510)})...), 1, ErrSparse},
		"pax is enormous":         {append(pax("size=9223372036854775807"), good...), 1, ErrTooLarge},
		"a directory with a size": {raw0(raw('5', "a/", "00000000001")), 1, ErrKind},
		"negative":                {raw0(raw('0', "a", "\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")), 1, ErrFormat},
		"twice":                   {archive(t, member{name: "a"}, member{name: "a"}), 2, ErrTwice},
		"twice in another way":    {archive(t, member{name: "a"}, member{name: "./a"}), 2, ErrTwice},
		"a directory twice":       {archive(t, member{name: "d/"}, member{name: "d/"}), 2, ErrTwice},
		"below a file":            {archive(t, member{name: "a"}, member{name: "a/b"}), 2, ErrBelowFile},
		"a directory and a file":  {archive(t, member{name: "a/"}, member{name: "a"}), 2, ErrBelowFile},
		"implied and a file":      {archive(t, member{name: "a/b"}, member{name: "a"}), 2, ErrBelowFile},
		"a file and a directory":  {archive(t, member{name: "a"}, member{name: "a/"}), 2, ErrBelowFile},
		"too many":                {archive(t, many(MaxEntries+1)...), MaxEntries + 1, ErrTooMany},
		"too many implied":        {archive(t, member{name: deep + "a"}, member{name: "a" + deep + "a"}, member{name: "b" + deep + "a"}, member{name: "c" + deep + "a"}), 4, ErrTooMany},
		"too large":               {one(member{name: "a", content: strings.Repeat("x", 1001)}), 1, ErrTooLarge},
		"too large in all":        {archive(t, member{name: "a", content: strings.Repeat("x", 600)}, member{name: "b", content: strings.Repeat("x", 401)}), 2, ErrTooLarge},
		"text":                    {bytes.Repeat([]byte("password: x\n"), 200), 1, ErrFormat},
		"short text":              {[]byte("password: x\n"), 1, ErrNoEnd},
		"nothing":                 {nil, 0, ErrNoEnd},
		"no file":                 {archive(t), 0, ErrEmpty},
		"directories only":        {archive(t, member{name: "./"}, member{name: "d/"}), 0, ErrEmpty},
		"no end":                  {good[:1024], 0, ErrNoEnd},
		"half an end":             {good[:1024+512], 0, ErrNoEnd},
		"cut in a file":           {good[:514], 1, ErrNoEnd},
		"cut in the filling":      {good[:520], 0, ErrNoEnd},
		"cut in a header":         {good[:300], 1, ErrNoEnd},
		"one block of zeros":      {slices.Concat(good[:1024], make([]byte, 512), good), 2, ErrFormat},
		"two in a row":            {slices.Concat(good, good), 0, ErrTrailing},
		"a byte behind":           {append(slices.Clone(good), 'x'), 0, ErrTrailing},
		"a byte far behind":       {append(append(slices.Clone(good), make([]byte, 1<<20)...), 1), 0, ErrTrailing},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := read(c.archive, 1000)
			var bad *Error
			if !errors.As(err, &bad) || bad.Entry != c.entry || bad.Fault != c.fault {
				t.Fatalf("got %v, want entry %d: %v", err, c.entry, c.fault)
			}
			if !bad.Fault.Known() || strings.Contains(err.Error(), "unknown") {
				t.Errorf("in words: %v", err)
			}
		})
	}
	if _, err := read(append(slices.Clone(good), make([]byte, 9000)...), 1000); err != nil {
		t.Errorf("filled up with zeros: %v", err)
	}
}

// raw0 is an archive of one header that has no content.
func raw0(header []byte) []byte { return append(header, make([]byte, 1024)...) }

// gnuSparse is a file that has one byte, and then a hole of 8 GiB less two.
func gnuSparse() []byte {
	h := raw('S', "a", "00000000001")
	copy(h[257:], "ustar  \x00")
	copy(h[386:], "00000000000\x0000000000001\x00")
	copy(h[483:], "77777777777\x00")
	copy(h[148:], "        ")
	sum := 0
	for _, b := range h {
		sum += int(b)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return append(h, make([]byte, 512+1024)...)
}

// pax is an extended header, which changes the one that follows.
func pax(records ...string) []byte {
	var text string
	for _, r := range records {
		n := len(r) + 3
		for len(fmt.Sprintf("%d %s\n", n, r)) != n {
			n++
		}
		text += fmt.Sprintf("%d %s\n", n, r)
	}
	block := make([]byte, (len(text)+511)/512*512)
	copy(block, text)
	return append(raw('x', "pax", fmt.Sprintf("%011o", len(text))), block...)
}

// An error of the source is not one of the archive.
func TestReadTellsWhoseErrorItIs(t *testing.T) {
	whole := archive(t, member{name: "a", content: strings.Repeat("x", 5000)})
	ours := errors.New("ours")
	for _, n := range []int{0, 100, 512, 600, 5500, 6000, len(whole) - 1, len(whole)} {
		err := Read(io.MultiReader(bytes.NewReader(whole[:n]), failing{ours}), 1<<20, func(Entry) (io.Writer, error) { return io.Discard, nil })
		if err != ours {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
	if err := Read(bytes.NewReader(whole), 1<<20, func(Entry) (io.Writer, error) { return nil, ours }); err != ours {
		t.Errorf("of add: %v", err)
	}
	if err := Read(bytes.NewReader(whole), 1<<20, func(Entry) (io.Writer, error) { return failing{ours}, nil }); err != ours {
		t.Errorf("of the writer: %v", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error)  { return 0, f.err }
func (f failing) Write([]byte) (int, error) { return 0, f.err }

func TestWriteAndRead(t *testing.T) {
	dir := t.TempDir()
	put := func(name, content string, mode fs.FileMode) {
		path := filepath.Join(dir, name)
		os.MkdirAll(filepath.Dir(path), 0o755)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		os.Chmod(path, mode)
	}
	put("z", "last", 0o644)
	put("tls/key.pem", strings.Repeat("k", 3000), 0o400)
	put("tls/sub/empty", "", 0o640)
	put("a name that is longer than the hundred bytes that the oldest format has room for/"+strings.Repeat("y", 200), "long", 0o600)
	os.Mkdir(filepath.Join(dir, "nothing"), 0o700)
	var b bytes.Buffer
	if err := Write(&b, dir); err != nil {
		t.Fatal(err)
	}
	g, err := read(b.Bytes(), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range g.entries {
		names = append(names, fmt.Sprintf("%.10s %o %v", e.Name, e.Mode, e.Dir))
	}
	want := []string{"a name tha 755 true", "a name tha 600 false", "nothing 700 true", "tls 755 true", "tls/key.pe 400 false", "tls/sub 755 true", "tls/sub/em 640 false", "z 644 false"}
	if !slices.Equal(names, want) {
		t.Errorf("got %q", names)
	}
	if g.content["tls/key.pem"].String() != strings.Repeat("k", 3000) || g.content["z"].String() != "last" {
		t.Error("other content")
	}
	var again bytes.Buffer
	if err := Write(&again, dir+"/."); err != nil || !bytes.Equal(again.Bytes(), b.Bytes()) {
		t.Errorf("the same directory, other bytes: %v", err)
	}
}

func TestWriteRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		make func(dir string)
		want error
		at   string
	}{
		"empty":             {func(string) {}, ErrEmpty, ""},
		"directories only":  {func(dir string) { os.Mkdir(dir+"/d", 0o755) }, ErrEmpty, ""},
		"symbolic link":     {func(dir string) { os.Symlink("a", dir+"/link") }, ErrSymlink, "/link"},
		"link to a place":   {func(dir string) { os.Symlink("/etc", dir+"/etc") }, ErrSymlink, "/etc"},
		"FIFO":              {func(dir string) { syscall.Mkfifo(dir+"/fifo", 0o600) }, ErrDevice, "/fifo"},
		"terminal control":  {func(dir string) { os.WriteFile(dir+"/a\x1bb", nil, 0o600) }, ErrUnprintable, "/a\x1bb"},
		"too many":          {func(dir string) { fill(dir, MaxEntries+1) }, ErrTooMany, ""},
		"no such directory": {func(dir string) { os.Remove(dir) }, fs.ErrNotExist, ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			c.make(dir)
			err := Write(io.Discard, dir)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), dir+c.at) {
				t.Errorf("%v", err)
			}
		})
	}
	dir := t.TempDir()
	fill(dir, MaxEntries)
	if err := Write(io.Discard, dir); err != nil {
		t.Errorf("the most that there may be: %v", err)
	}
}

func fill(dir string, n int) {
	for i := range n {
		os.WriteFile(fmt.Sprintf("%s/%04d", dir, i), nil, 0o600)
	}
}

// A file that changes under the reader's hands is not what anybody wanted. The
// writer is called in between, so that this is no race.
func TestWriteNoticesAChange(t *testing.T) {
	for name, change := range map[string]func(path string){
		"grown":  func(path string) { os.WriteFile(path, make([]byte, 5001), 0o600) },
		"shrunk": func(path string) { os.Truncate(path, 10) },
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, "f")
		os.WriteFile(path, make([]byte, 5000), 0o600)
		first := true
		err := Write(writerFunc(func(p []byte) (int, error) {
			if first {
				change(path)
			}
			first = false
			return len(p), nil
		}), dir)
		if !errors.Is(err, ErrChanged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// FuzzRead: whatever is taken leads nowhere else, has each name once, holds what it
// says and no more than it may, and can be taken in again; an error is one that
// can be told.
func FuzzRead(f *testing.F) {
	f.Add(archive(f, member{name: "./"}, member{name: "./a", content: "one"}, member{name: "d/"}, member{name: "d/b"}))
	f.Add(archive(f, member{name: "../a"}))
	f.Add(archive(f, member{name: "a", kind: tar.TypeSymlink}))
	f.Add(append(pax("path=a/b", "size=3"), archive(f, member{name: "a", content: "one"})...))
	f.Add(gnuSparse())
	f.Add(archive(f, member{name: strings.Repeat("long/", 60) + "x"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		const max = 4096
		g, err := read(b, max)
		var sum int64
		for _, content := range g.content {
			sum += int64(content.Len())
		}
		if sum > max {
			t.Fatalf("%d bytes, and %d are allowed", sum, max)
		}
		var bad *Error
		if err != nil {
			if !errors.As(err, &bad) || !bad.Fault.Known() {
				t.Fatalf("%v", err)
			}
			return
		}
		var tree Tree
		files := 0
		for _, e := range g.entries {
			if !filepath.IsLocal(e.Name) || filepath.Clean(e.Name) != e.Name || tree.Add(e) != nil {
				t.Fatalf("taken: %+v", e)
			}
			if !e.Dir {
				files++
				if int64(g.content[e.Name].Len()) != e.Size {
					t.Fatalf("%s holds %d bytes of %d", e.Name, g.content[e.Name].Len(), e.Size)
				}
			}
		}
		if files == 0 || files != len(g.content) {
			t.Fatalf("%d files, %d contents", files, len(g.content))
		}
	})
}
