// Package integration shows what only a real kernel can: the built binary on
// real mounts, with readers that are other processes.
package integration

import (
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"testing"

	"oncefs/integration/rig"
)

// A reader works in the process's first thread: the kernel tells the number of
// the thread that asks.
func init() {
	if len(os.Args) > 1 && os.Args[1] == "reader" {
		runtime.LockOSThread()
	}
}

// TestMain is also the reader that tests start as a process of its own.
func TestMain(m *testing.M) {
	rig.Calm()
	if len(os.Args) > 1 && os.Args[1] == "reader" {
		os.Exit(reader(os.Args[2:]))
	}
	// Who runs this in the background may have it ignore what a terminal sends; then
	// so would all that it starts, and Ctrl-C do nothing there. A signal that is
	// caught is a child's own again.
	for _, s := range []os.Signal{syscall.SIGINT, syscall.SIGQUIT} {
		if signal.Ignored(s) {
			signal.Notify(make(chan os.Signal, 1), s)
		}
	}
	os.Exit(rig.Main(m))
}
