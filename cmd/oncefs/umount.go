package main

import "oncefs/internal/mountpoint"

type umountCmd struct {
	Target string `arg:"" complete:"mounts" help:"What was mounted over."`
}

// Help is shown below the options.
func (umountCmd) Help() string {
	return `Works also while a reader has the file open, and on the mount of a process that
was killed. Whoever may unmount is who mounted, or root.

Examples:
  oncefs umount /config
  oncefs umount /config/secrets.yaml`
}

// Run unmounts lazily; the serving process sees that its mount is gone, zeroes
// its memory and ends.
func (u *umountCmd) Run(e *env) error { return mountpoint.Unmount(u.Target) }
