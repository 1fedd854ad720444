package secretmem

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"unsafe"
)

func addrOf(b *Buffer) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b.segs[0]))) }

func addrOfBytes(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

// mapped tells whether an address is in any mapping of this process.
func mapped(t *testing.T, addr uintptr) bool {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		var from, to uintptr
		if _, err := fmt.Sscanf(line, "%x-%x", &from, &to); err == nil && addr >= from && addr < to {
			return true
		}
	}
	return false
}
