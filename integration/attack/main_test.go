// Package attack tries to get what nobody else may have, and to break what must
// hold: with root's view of every process, with a fault at every system call,
// with readers that try everything. It needs root and drives the built binary.
package attack

import (
	"os"
	"testing"

	"oncefs/integration/rig"
)

// TestMain is also every other process that the tests need.
func TestMain(m *testing.M) {
	rig.Calm()
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "hold":
			os.Exit(hold(os.Args[2:]))
		case "fault":
			os.Exit(faultMain(os.Args[2:]))
		case "sip":
			os.Exit(sip(os.Args[2:]))
		case "hostile":
			os.Exit(hostile(os.Args[2:]))
		}
	}
	os.Exit(rig.Main(m))
}
