package supervisor

import (
	"testing"
	"time"
)

func TestRestart_PausesAreAKubelets(t *testing.T) {
	pause := time.Duration(0)
	for i, c := range []struct{ ran, want time.Duration }{
		{0, 10 * time.Second}, {0, 20 * time.Second}, {time.Minute, 40 * time.Second}, {0, 80 * time.Second},
		{0, 160 * time.Second}, {0, 5 * time.Minute}, {9 * time.Minute, 5 * time.Minute},
		{10 * time.Minute, 10 * time.Second}, {0, 20 * time.Second},
	} {
		if pause = next(pause, 10*time.Second, c.ran); pause != c.want {
			t.Errorf("pause %d is %v, want %v", i, pause, c.want)
		}
	}
}
