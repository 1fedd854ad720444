package integration

import (
	"os"
	"testing"

	"oncefs/integration/rig"
)

func TestMain(m *testing.M) {
	code := m.Run()
	rig.RemoveBinary()
	os.Exit(code)
}

func TestC3_OneReaderGetsAll(t *testing.T) {
	content := []byte("user: app\npassword: hunter2\n")
	d := rig.NewDir(t, content)
	m := d.MountOver()
	if got := rig.Cat(t, d.Secret()); got.Out != string(content) {
		t.Fatalf("got %+v", got)
	}
	if got := rig.Cat(t, d.Secret()); got.Code == 0 || got.Out != "" {
		t.Fatalf("second read: %+v", got)
	}
	if e := m.WaitEvent("delivery", 1); e["whole"] != true {
		t.Fatalf("delivery: %v", e)
	}
	if r := m.Stop(); r.Code != 0 {
		t.Fatalf("exit: %+v", r)
	}
}
