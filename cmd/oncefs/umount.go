package main

import "oncefs/internal/mountpoint"

type umountCmd struct {
	Target string `arg:"" complete:"mounts" help:"What was mounted over."`
}

// Run unmounts lazily; the serving process sees that its mount is gone, zeroes
// its memory and ends.
func (u *umountCmd) Run(e *env) error { return mountpoint.Unmount(u.Target) }
