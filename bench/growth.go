package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// growth measures one mount of many secrets, and many mounts.
func (b *bench) growth() error {
	dir, err := b.fresh()
	if err != nil {
		return err
	}
	text := content(1 << 10)
	enc := filepath.Join(dir, "secrets.yaml.enc")
	if err := b.encrypt(enc, text, smallS2K...); err != nil {
		return err
	}
	secrets, mounts := []int{1, 10, 100, 1000}, []int{1, 10, 100, 500}
	if b.short {
		secrets, mounts = secrets[:2], []int{1, 3}
	}
	for range b.rounds(3) {
		var alone float64
		for _, n := range secrets {
			pss, err := b.manySecrets(enc, text, n)
			if err != nil {
				return fmt.Errorf("%d secrets: %w", n, err)
			}
			if n == 1 {
				alone = pss
			} else {
				// Each takes a page of secret memory beside its true size.
				b.record.add("growth", "oncefs", fmt.Sprintf("%d secrets, memory each beyond their size", n), "KiB",
					(pss-alone)*1024/float64(n-1)-float64(len(text))/1024)
			}
		}
	}
	return b.manyMounts(enc, text, mounts)
}

func (b *bench) manySecrets(enc string, text []byte, n int) (pss float64, err error) {
	dir, err := b.fresh()
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	var encs, args []string
	for i := range n {
		encs, args = append(encs, enc), append(args, "--name", fmt.Sprint("s", i))
	}
	begin := time.Now()
	d, err := b.mount(dir, encs, args...)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	of := fmt.Sprint(n)
	b.record.add("growth", "oncefs", of+" secrets, start", "ms", ms(time.Since(begin)))
	time.Sleep(idle / 5)
	u, err := measure(tree(d.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	b.record.add("growth", "oncefs", of+" secrets, memory (PSS)", "MiB", u.pss)
	begin = time.Now()
	for i := range n {
		if err := readWhole(filepath.Join(d.target, fmt.Sprint("s", i)), text); err != nil {
			return 0, err
		}
	}
	b.record.add("growth", "oncefs", of+" secrets, each read", "us", us(time.Since(begin))/float64(n))
	return u.pss, nil
}

func (b *bench) manyMounts(enc string, text []byte, counts []int) (err error) {
	dir, err := b.fresh()
	if err != nil {
		return err
	}
	var all []*daemon
	defer func() {
		for _, d := range all {
			err = errors.Join(err, d.stop())
		}
	}()
	for _, n := range counts {
		var starts []float64
		for len(all) < n {
			begin := time.Now()
			d, err := b.mount(filepath.Join(dir, fmt.Sprint(len(all))), []string{enc}, "--reads", "2")
			if err != nil {
				return fmt.Errorf("mount %d: %w", len(all)+1, err)
			}
			starts = append(starts, ms(time.Since(begin)))
			all = append(all, d)
		}
		of := fmt.Sprint(n)
		b.record.add("growth", "oncefs", of+" mounts, start of each", "ms", median(starts))
		time.Sleep(idle / 5)
		var pss float64
		for _, d := range all {
			u, err := measure(tree(d.cmd.Process.Pid))
			if err != nil {
				return err
			}
			pss += u.pss
		}
		b.record.add("growth", "oncefs", of+" mounts, memory of each (PSS)", "MiB", pss/float64(n))
		last := all[len(all)-1]
		begin := time.Now()
		if err := readWhole(filepath.Join(last.target, "secrets.yaml"), text); err != nil {
			return err
		}
		b.record.add("growth", "oncefs", of+" mounts, first read of the last", "us", us(time.Since(begin)))
	}
	return nil
}
