package integration

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"oncefs/integration/rig"
)

// What the program may cost while it waits. What it takes of time is measured,
// and not judged, by make bench.
func TestCost_BinaryAndIdleMemory(t *testing.T) {
	info, err := os.Stat(rig.Binary(t))
	if err != nil {
		t.Fatal(err)
	}
	if most := int64(12 << 20); info.Size() >= most {
		t.Errorf("the binary has %d bytes; it is to have less than %d", info.Size(), most)
	}
	m := rig.NewDir(t, []byte("password: a\n")).MountOver()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.Cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	var resident int
	for line := range strings.Lines(string(status)) {
		if value, found := strings.CutPrefix(line, "VmRSS:"); found {
			if _, err := fmt.Sscanf(value, "%d kB", &resident); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("binary %d KiB, resident %d KiB", info.Size()>>10, resident)
	if most := 16 << 10; resident == 0 || resident >= most {
		t.Errorf("%d KiB resident; it is to be less than %d", resident, most)
	}
}
