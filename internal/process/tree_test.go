package process

import (
	"os"
	"os/exec"
	"slices"
	"testing"
)

func TestDescends(t *testing.T) {
	self, parent := uint32(os.Getpid()), uint32(os.Getppid())
	// A child and a grandchild; the shell says its own number and waits.
	pid, _ := other(t)
	cmd := exec.Command("sh", "-c", "/proc/self/exe -c 'read x' & wait")
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); cmd.Process.Kill(); cmd.Wait() }()
	for name, c := range map[string]struct {
		pid, of uint32
		want    bool
	}{
		"child":        {pid, self, true},
		"grandchild":   {pid, parent, true},
		"parent":       {parent, self, false},
		"itself":       {self, self, false},
		"sibling":      {pid, uint32(cmd.Process.Pid), false},
		"init":         {1, self, false},
		"no process":   {1 << 30, self, false},
		"of init":      {pid, 1, true},
		"of none":      {pid, 1 << 30, false},
		"shell":        {uint32(cmd.Process.Pid), self, true},
		"of the child": {self, pid, false},
	} {
		if got := Descends(c.pid, c.of); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestChildren(t *testing.T) {
	pid, end := other(t)
	if got := Children(os.Getpid()); !slices.Contains(got, int(pid)) {
		t.Errorf("%v, without %d", got, pid)
	}
	end()
	if got := Children(os.Getpid()); slices.Contains(got, int(pid)) {
		t.Errorf("%v, with %d", got, pid)
	}
}
