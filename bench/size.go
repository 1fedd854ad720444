package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// usage is what a tree of processes takes.
type usage struct {
	pss, rss           float64 // MiB
	processes, threads int
	switches           int // times that a thread was scheduled, so far
}

// tree lists a process and all below it.
func tree(pid int) []int {
	all := []int{pid}
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, path := range lists {
		text, _ := os.ReadFile(path)
		for _, child := range strings.Fields(string(text)) {
			if n, err := strconv.Atoi(child); err == nil {
				all = append(all, tree(n)...)
			}
		}
	}
	return all
}

func measure(pids []int) (u usage, err error) {
	for _, pid := range pids {
		u.processes++
		rollup := fmt.Sprintf("/proc/%d/smaps_rollup", pid)
		pss, rss := kib(rollup, "Pss"), kib(rollup, "Rss")
		if rss == 0 {
			return u, fmt.Errorf("%s cannot be read", rollup)
		}
		u.pss += pss / 1024
		u.rss += rss / 1024
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
		for _, task := range tasks {
			u.threads++
			u.switches += int(kib(task, "voluntary_ctxt_switches") + kib(task, "nonvoluntary_ctxt_switches"))
		}
	}
	return u, nil
}

// kib reads a number from a file of names and numbers.
func kib(file, name string) float64 {
	f, err := os.Open(file)
	if err != nil {
		return 0
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if key, value, ok := strings.Cut(lines.Text(), ":"); ok && key == name {
			n, _ := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 64)
			return n
		}
	}
	return 0
}

// idle is how long nothing is asked of a peer to count how often it wakes. Half of
// it before lets what its start took be given back.
const idle = 10 * time.Second

// size measures what each peer takes while it serves one small secret that
// nobody reads.
func (b *bench) size() error {
	p, err := b.everyPeer()
	if err != nil {
		return err
	}
	defer p.stop()
	// After the start, what can be given back is.
	time.Sleep(idle / 2)
	before := map[string]int{}
	for _, s := range p.served {
		u, err := measure(tree(s.pid))
		if err != nil {
			b.record.leaveOut("size", s.peer, "", err)
			continue
		}
		before[s.peer] = u.switches
	}
	time.Sleep(idle)
	for _, s := range p.served {
		u, err := measure(tree(s.pid))
		if err != nil {
			return err
		}
		b.record.add("size", s.peer, "resident, shared pages divided (PSS)", "MiB", u.pss)
		b.record.add("size", s.peer, "resident, shared pages counted each time (RSS)", "MiB", u.rss)
		b.record.add("size", s.peer, "processes", "", float64(u.processes))
		b.record.add("size", s.peer, "threads", "", float64(u.threads))
		b.record.add("size", s.peer, "wake-ups per second, idle", "", float64(u.switches-before[s.peer])/idle.Seconds())
		if info, err := os.Stat(s.binary); err == nil {
			b.record.add("size", s.peer, "binary", "MiB", float64(info.Size())/(1<<20))
		}
		if image, err := imageOf(append(s.besides, s.binary)); err != nil {
			b.record.leaveOut("size", s.peer, "image", err)
		} else {
			b.record.add("size", s.peer, "image: its programs and the libraries that they load", "MiB", image)
		}
	}
	return p.stop()
}

// imageOf is the least that a container image with these programs holds, in MiB:
// they and every library that they are linked with.
func imageOf(programs []string) (float64, error) {
	var sum int64
	seen := map[string]bool{}
	for _, program := range programs {
		path, err := look(program)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", program, err)
		}
		files := []string{path}
		// It fails on a static program, which needs none.
		out, _ := exec.Command("ldd", path).Output()
		for _, word := range strings.Fields(string(out)) {
			if filepath.IsAbs(word) {
				files = append(files, word)
			}
		}
		for _, file := range files {
			info, err := os.Stat(file)
			if err != nil {
				return 0, err
			}
			real, err := filepath.EvalSymlinks(file)
			if err != nil {
				return 0, err
			}
			if !seen[real] {
				seen[real] = true
				sum += info.Size()
			}
		}
	}
	return float64(sum) / (1 << 20), nil
}

// serving is a peer that serves the same small secret.
type serving struct {
	peer, path, binary string
	besides            []string // other programs that it takes
	pid                int
	stop               func() error
}

type peers struct {
	text   []byte
	served []serving
}

func (p *peers) stop() (err error) {
	for _, s := range p.served {
		err = errors.Join(err, s.stop())
	}
	p.served = nil
	return err
}

// everyPeer starts all that serve with a process that stays.
func (b *bench) everyPeer() (_ *peers, err error) {
	dir, err := b.fresh()
	if err != nil {
		return nil, err
	}
	p := &peers{text: content(4 << 10)}
	defer func() {
		if err != nil {
			p.stop()
		}
	}()
	plain, enc := filepath.Join(dir, "plain"), filepath.Join(dir, "secrets.yaml.enc")
	if err := errors.Join(os.WriteFile(plain, p.text, 0o600), b.encrypt(enc, p.text, smallS2K...)); err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	d, err := b.mount(dir, []string{enc})
	if err != nil {
		return nil, err
	}
	p.served = append(p.served, serving{"oncefs", filepath.Join(d.target, "secrets.yaml"), b.oncefs, nil, d.cmd.Process.Pid, d.stop})
	for _, peer := range []struct{ name, command string }{{"go-fuse memory file", "serve-gofuse"}, {"bazil fs package", "serve-bazil"}} {
		target := filepath.Join(dir, peer.command)
		if err := os.Mkdir(target, 0o700); err != nil {
			return nil, err
		}
		d, err := servePeer(peer.command, target, plain)
		if err != nil {
			b.record.leaveOut("peers", peer.name, "", err)
			continue
		}
		p.served = append(p.served, serving{peer.name, filepath.Join(target, "secrets.yaml"), self, []string{"fusermount3"}, d.cmd.Process.Pid, d.stop})
	}
	if s, err := b.serveOldWay(filepath.Join(dir, "old"), enc); err != nil {
		b.record.leaveOut("peers", oldWayName, "", err)
	} else {
		p.served = append(p.served, s)
	}
	if s, err := serveGocryptfs(filepath.Join(dir, "gocryptfs"), p.text); err != nil {
		b.record.leaveOut("peers", "gocryptfs", "", err)
	} else {
		p.served = append(p.served, s)
	}
	if s, err := b.serveSops(filepath.Join(dir, "sops"), plain, len(p.text)); err != nil {
		b.record.leaveOut("peers", "sops exec-file", "", err)
	} else {
		p.served = append(p.served, s)
	}
	return p, nil
}

func (b *bench) serveOldWay(dir, enc string) (s serving, err error) {
	program, err := look("inotifywait")
	if err != nil {
		return s, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return s, err
	}
	old, _, err := b.oldWay(dir, enc)
	if err != nil {
		return s, err
	}
	return serving{oldWayName, old.path, program, []string{"gpg", "gpg-agent", "busybox"}, old.watcher.Process.Pid, old.stop}, nil
}

func serveGocryptfs(dir string, text []byte) (s serving, err error) {
	program, err := look("gocryptfs")
	if err != nil {
		return s, err
	}
	cipher, mnt, pw := filepath.Join(dir, "cipher"), filepath.Join(dir, "mnt"), filepath.Join(dir, "pw")
	err = errors.Join(os.MkdirAll(cipher, 0o700), os.Mkdir(mnt, 0o700), os.WriteFile(pw, []byte(passphrase+"\n"), 0o600))
	if err != nil {
		return s, err
	}
	// The least scrypt that it takes: only the mount is looked at here.
	if err := quietly(exec.Command(program, "-q", "-init", "-scryptn", "10", "-passfile", pw, cipher)); err != nil {
		return s, err
	}
	cmd := exec.Command(program, "-q", "-fg", "-passfile", pw, cipher, mnt)
	if err := cmd.Start(); err != nil {
		return s, err
	}
	stop := func() error {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		return unmountBelow(mnt)
	}
	if err := waitFor(func() bool { return mounted(mnt) }); err != nil {
		return s, errors.Join(err, stop())
	}
	path := filepath.Join(mnt, "secrets.yaml")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		return s, errors.Join(err, stop())
	}
	return serving{"gocryptfs", path, program, []string{"fusermount3"}, cmd.Process.Pid, stop}, nil
}

func mounted(path string) bool {
	mounts, _ := os.ReadFile("/proc/self/mounts")
	return strings.Contains(string(mounts), " "+path+" ")
}

// serveSops runs a program under exec-file that stays, as the app would.
func (b *bench) serveSops(dir, plain string, size int) (s serving, err error) {
	program, err := look("sops")
	if err != nil {
		return s, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return s, err
	}
	a, err := newAge(b, dir)
	if err != nil {
		return s, err
	}
	enc, err := a.encryptSops(plain, size)
	if err != nil {
		return s, err
	}
	path := filepath.Join(dir, "name")
	cmd, err := a.sops("exec-file", "--input-type", "binary", "--output-type", "binary", enc, "echo {} >"+path+"; read -r _")
	if err != nil {
		return s, err
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return s, err
	}
	if err := cmd.Start(); err != nil {
		return s, err
	}
	stop := func() error {
		in.Close()
		cmd.Wait()
		return nil
	}
	var fifo string
	err = waitFor(func() bool {
		text, _ := os.ReadFile(path)
		fifo = strings.TrimSpace(string(text))
		return fifo != ""
	})
	if err != nil {
		return s, errors.Join(err, stop())
	}
	return serving{"sops exec-file", fifo, program, []string{"busybox"}, cmd.Process.Pid, stop}, nil
}

// waitFor waits until f says so.
func waitFor(f func() bool) error {
	for deadline := time.Now().Add(30 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return errors.New("waited in vain")
		}
	}
	return nil
}

// watches tells whether one of the processes has an inotify watch.
func watches(pids []int) bool {
	for _, pid := range pids {
		infos, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
		for _, path := range infos {
			if text, _ := os.ReadFile(path); strings.Contains(string(text), "inotify wd") {
				return true
			}
		}
	}
	return false
}
