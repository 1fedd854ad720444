package alarm

import (
	"os/exec"
	"testing"
	"time"
)

// One that dies before it is set up is an error, and nobody waits for it.
func TestStart_Dies(t *testing.T) {
	binary, err := exec.LookPath("true")
	if err != nil {
		t.Fatal(err)
	}
	started := make(chan error, 1)
	go func() {
		a, err := Start(binary, "/bin/true")
		if err == nil {
			a.Close()
		}
		started <- err
	}()
	select {
	case err := <-started:
		if err == nil {
			t.Error("it started")
		}
	case <-time.After(startPatience / 2):
		t.Error("it waits for what is not there")
	}
}
