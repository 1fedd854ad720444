package sandbox

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"unsafe"
)

// What is given back is the program's own text, and it can still be run.
func TestGiveBack(t *testing.T) {
	segments := readOnlySegments()
	if len(segments) == 0 {
		t.Skip("SKIPPED: linked to addresses that are not fixed")
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range segments {
		from := uintptr(unsafe.Pointer(unsafe.SliceData(s)))
		found := false
		for line := range strings.Lines(string(maps)) {
			var start, end uintptr
			var rights string
			if n, _ := fmt.Sscanf(line, "%x-%x %s", &start, &end, &rights); n == 3 && start <= from && from+uintptr(len(s)) <= end {
				found = true
				if strings.Contains(rights, "w") {
					t.Errorf("%x is written to: %s", from, line)
				}
			}
		}
		if !found {
			t.Errorf("%x is not one mapping", from)
		}
	}
	GiveBack()
	GiveBack()
}
