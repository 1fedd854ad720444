package secretmem

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
)

// resident is how much of the mapping at an address is there (proc_pid_smaps(5)).
func resident(t *testing.T, addr uintptr) int64 {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	here := false
	for line := range strings.Lines(string(maps)) {
		var from, to uintptr
		if _, err := fmt.Sscanf(line, "%x-%x ", &from, &to); err == nil {
			here = addr >= from && addr < to
		}
		var kib int64
		if _, err := fmt.Sscanf(line, "Rss: %d kB", &kib); err == nil && here {
			return kib << 10
		}
	}
	t.Fatalf("nothing is mapped at %#x", addr)
	return 0
}

// locked is how much memory this process holds that cannot be swapped, of either
// kind (VmLck in proc_pid_status(5)).
func locked(t *testing.T) int64 {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmLck:")
	var kib int64
	if _, err := fmt.Sscanf(rest, "%d kB", &kib); err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// What was expected is there before a byte has come, and what came for nothing is
// given back.
func TestExpect(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	const most = 3 << 20
	for _, s := range stores(t) {
		for _, c := range []struct{ expected, came int }{
			{1 << 20, 1 << 20}, {1 << 20, 1<<20 - 1}, {1 << 20, 1<<20 + 1}, {1<<20 + 1, 5}, {1 << 20, 0},
			{prepareFrom, most}, {most, most}, {1 << 40, 1 << 19}, {prepareFrom - 1, 1 << 19}, {-1, 100_000},
		} {
			t.Run(fmt.Sprint(s.Kind(), c.expected, c.came), func(t *testing.T) {
				b := s.NewBuffer(most)
				b.Expect(int64(c.expected))
				if c.expected >= prepareFrom {
					b.ready.wait()
					if got, want := resident(t, addrOf(b)), int64(min(c.expected, most)); got < want {
						t.Errorf("%d bytes are there of %d", got, want)
					}
				}
				content := random(c.came)
				if err := b.Fill(feed(t, content), int64(c.came)); err != nil {
					t.Fatal(err)
				}
				if err := b.Settle(); err != nil {
					t.Fatal(err)
				}
				if got, want := locked(t), wholePages(int64(c.came)); got != want {
					t.Errorf("%d bytes are held, not %d", got, want)
				}
				if got := sendAll(t, b, "head"); !bytes.Equal(got, content) {
					t.Error("other bytes came out")
				}
				if err := b.Wipe(); err != nil {
					t.Error(err)
				}
				if got := locked(t); got != 0 || s.Live() != 0 {
					t.Errorf("%d bytes are held, %d buffers", got, s.Live())
				}
			})
		}
	}
}

// Each time more is expected, before anything came and after.
func TestExpect_Again(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	for _, s := range stores(t) {
		for _, came := range []int{0, 1, prepareFrom, 3*prepareFrom - 1, 5 * prepareFrom, 9 * prepareFrom} {
			b := s.NewBuffer(9 * prepareFrom)
			b.Expect(prepareFrom)
			b.Expect(3 * prepareFrom)
			b.Expect(2 * prepareFrom)
			content := random(came)
			half := feed(t, content)
			if err := b.Fill(half, int64(came/2)); err != nil {
				t.Fatal(err)
			}
			b.Expect(5 * prepareFrom)
			if err := b.Fill(half, int64(came-came/2)); err != nil {
				t.Fatal(err)
			}
			if err := b.Settle(); err != nil {
				t.Fatal(err)
			}
			if got, want := locked(t), wholePages(int64(came)); got != want {
				t.Errorf("%s: %d bytes are held, not %d", s.Kind(), got, want)
			}
			if got := sendAll(t, b, "head"); !bytes.Equal(got, content) {
				t.Errorf("%s: other bytes than the %d came out", s.Kind(), came)
			}
			if err := b.Wipe(); err != nil || locked(t) != 0 {
				t.Errorf("%s: %v, %d bytes are held", s.Kind(), err, locked(t))
			}
		}
	}
}

// It ends at any moment.
func TestExpect_Meanwhile(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(2, runtime.NumCPU())))
	content := random(2 << 20)
	for _, s := range stores(t) {
		for i := range 12 {
			b := s.NewBuffer(int64(len(content)))
			b.Expect(int64(len(content)))
			came := content[:len(content)*i/12]
			if err := b.Fill(feed(t, came), int64(len(came))); err != nil {
				t.Fatal(err)
			}
			if i%2 == 0 {
				if err := b.Settle(); err != nil {
					t.Fatal(err)
				}
				if got := sendAll(t, b, "head"); !bytes.Equal(got, came) {
					t.Fatal("other bytes came out")
				}
			}
			if err := b.Wipe(); err != nil {
				t.Fatal(err)
			}
		}
	}
}
