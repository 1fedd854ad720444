package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// race sets N processes at one secret at the same moment, and measures what it
// costs to come too late.
func (b *bench) race() error {
	if err := b.losers(); err != nil {
		return err
	}
	for _, n := range []int{10, 100, 1000, 10000} {
		if b.short && n > 100 {
			break
		}
		rounds := 3
		if n >= 10000 {
			rounds = 1
		}
		for range b.rounds(rounds) {
			for _, r := range []struct {
				peer string
				run  func(int) (outcome, error)
			}{{"oncefs", b.raceOncefs}, {oldWayName, b.raceOldWay}, {"FIFO", b.raceFIFO}} {
				o, err := r.run(n)
				of := fmt.Sprint(n)
				if err != nil {
					if r.peer == "oncefs" {
						return fmt.Errorf("race of %d: %w", n, err)
					}
					b.record.leaveOut("race", r.peer, of, err)
					continue
				}
				b.record.add("race", r.peer, of+" readers, got all", "processes", float64(o.whole))
				b.record.add("race", r.peer, of+" readers, got a part", "processes", float64(o.part))
				b.record.add("race", r.peer, of+" readers, hung", "processes", float64(o.hung))
				b.record.add("race time", r.peer, of, "ms", ms(o.took))
				b.record.add("race cost", r.peer, of, "us", us(o.took)/float64(n))
				if r.peer == "oncefs" && (o.whole != 1 || o.part != 0 || o.hung != 0) {
					return fmt.Errorf("race of %d: %d winners, %d with a part, %d hung", n, o.whole, o.part, o.hung)
				}
			}
		}
	}
	return nil
}

// outcome is how a race ended.
type outcome struct {
	whole, part, hung int
	took              time.Duration // from the start to the last process that ended by itself
}

const raceSize = 16 << 10

// racers are processes that wait for the gate, their standard input, to close,
// and then open the file; who gets it writes what came into a file of its own.
const racers = `
i=0
while [ $i -lt "$1" ]; do
	( read -r _; exec 4<"$2" || exit 1; exec busybox cat <&4 >"$3/$i" ) <&3 2>/dev/null &
	i=$((i+1))
done
exec 3<&-
echo ready
wait
`

// runRace starts the racers, lets them go and sees what they got.
func (b *bench) runRace(n int, path string, want []byte) (o outcome, err error) {
	busybox, err := look("busybox")
	if err != nil {
		return o, err
	}
	got, err := os.MkdirTemp("/dev/shm", "oncefs-bench-")
	if err != nil {
		return o, err
	}
	defer os.RemoveAll(got)
	gateR, gateW, err := os.Pipe()
	if err != nil {
		return o, err
	}
	cmd := exec.Command(busybox, "sh", "-c", racers, "racers", fmt.Sprint(n), path, got)
	cmd.ExtraFiles = []*os.File{gateR}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return o, err
	}
	if err := cmd.Start(); err != nil {
		return o, err
	}
	gateR.Close()
	_, err = bufio.NewReader(out).ReadString('\n')
	begin := time.Now()
	gateW.Close()
	if err != nil {
		cmd.Wait()
		return o, fmt.Errorf("the racers did not start: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	group := cmd.Process.Pid
	for deadline, last := time.Now().Add(15*time.Second), -1; ; {
		select {
		case <-ended:
			o.took = time.Since(begin)
		case <-time.After(500 * time.Millisecond):
			// Hung are those that are left when for seconds none has ended.
			left := inGroup(group) - 1
			if left != last {
				last, o.took, deadline = left, time.Since(begin), time.Now().Add(3*time.Second)
			}
			if time.Now().Before(deadline) {
				continue
			}
			o.hung = left
			syscall.Kill(-group, syscall.SIGKILL)
			<-ended
		}
		break
	}
	files, err := os.ReadDir(got)
	if err != nil {
		return o, err
	}
	for _, f := range files {
		text, err := os.ReadFile(filepath.Join(got, f.Name()))
		switch {
		case err != nil:
			return o, err
		case bytes.Equal(text, want):
			o.whole++
		case len(text) > 0:
			o.part++
		}
	}
	return o, nil
}

// inGroup counts the processes of a group that have not ended.
func inGroup(group int) (n int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range dirs {
		text, _ := os.ReadFile(path)
		// proc_pid_stat(5): pid (comm) state ppid pgrp
		_, rest, found := strings.Cut(string(text), ") ")
		var state string
		var ppid, pgrp int
		if _, err := fmt.Sscan(rest, &state, &ppid, &pgrp); found && err == nil && pgrp == group && state != "Z" {
			n++
		}
	}
	return n
}

func (b *bench) raceOncefs(n int) (o outcome, err error) {
	dir, err := b.fresh()
	if err != nil {
		return o, err
	}
	text := content(raceSize)
	enc := filepath.Join(dir, "secrets.yaml.enc")
	if err := b.encrypt(enc, text, smallS2K...); err != nil {
		return o, err
	}
	d, err := b.mount(dir, []string{enc})
	if err != nil {
		return o, err
	}
	o, err = b.runRace(n, filepath.Join(d.target, "secrets.yaml"), text)
	return o, errors.Join(err, d.stop())
}

func (b *bench) raceOldWay(n int) (o outcome, err error) {
	dir, err := b.fresh()
	if err != nil {
		return o, err
	}
	text := content(raceSize)
	enc := filepath.Join(dir, "secrets.yaml.enc")
	if err := b.encrypt(enc, text, smallS2K...); err != nil {
		return o, err
	}
	old, _, err := b.oldWay(dir, enc)
	if err != nil {
		return o, err
	}
	o, err = b.runRace(n, old.path, text)
	return o, errors.Join(err, old.stop())
}

// raceFIFO is a FIFO whose writer writes once, as sops exec-file does.
func (b *bench) raceFIFO(n int) (o outcome, err error) {
	dir, err := b.fresh()
	if err != nil {
		return o, err
	}
	text := content(raceSize)
	path := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return o, err
	}
	go func() {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return
		}
		f.Write(text)
		f.Close()
	}()
	o, err = b.runRace(n, path, text)
	// Where no reader came, the writer still waits for one.
	if f, open := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); open == nil {
		f.Close()
	}
	return o, err
}

// losers measures what an open costs that comes too late, against the open of a
// name that never was in a mount of go-fuse.
func (b *bench) losers() (err error) {
	dir, err := b.fresh()
	if err != nil {
		return err
	}
	text := content(1 << 10)
	plain, enc, target := filepath.Join(dir, "plain"), filepath.Join(dir, "secrets.yaml.enc"), filepath.Join(dir, "gofuse")
	err = errors.Join(os.WriteFile(plain, text, 0o600), b.encrypt(enc, text, smallS2K...), os.Mkdir(target, 0o700))
	if err != nil {
		return err
	}
	d, err := b.mount(dir, []string{enc})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	g, err := servePeer("serve-gofuse", target, plain)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.stop()) }()
	spent := filepath.Join(d.target, "secrets.yaml")
	if err := readWhole(spent, text); err != nil {
		return err
	}
	where := []place{{"oncefs, spent", spent}, {"go-fuse, no such name", filepath.Join(target, "nothing")}, {"tmpfs, no such name", "/dev/shm/oncefs-bench-nothing"}}
	times := make([]time.Duration, 500)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for range b.rounds(40) {
		for _, w := range where {
			for i := range times {
				begin := time.Now()
				fd, err := unix.Open(w.path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
				times[i] = time.Since(begin)
				if err != unix.ENOENT {
					unix.Close(fd)
					return fmt.Errorf("%s: opened, or another error than ENOENT: %w", w.peer, err)
				}
			}
			slices.Sort(times)
			b.record.add("too late", w.peer, "p50", "us", us(times[len(times)/2]))
			b.record.add("too late", w.peer, "p99", "us", us(times[len(times)*99/100]))
		}
	}
	return nil
}
