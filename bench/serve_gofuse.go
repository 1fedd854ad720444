package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// memoryFile is go-fuse's own file in memory, opened for direct I/O as ours is.
type memoryFile struct{ fs.MemRegularFile }

func (m *memoryFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, fs.OK
}

var _ = (fs.NodeOpener)((*memoryFile)(nil))

type memoryRoot struct {
	fs.Inode
	text []byte
}

func (r *memoryRoot) OnAdd(ctx context.Context) {
	file := &memoryFile{fs.MemRegularFile{Data: r.text, Attr: fuse.Attr{Mode: 0o400}}}
	r.AddChild("secrets.yaml", r.NewPersistentInode(ctx, file, fs.StableAttr{}), false)
}

// serveGoFuse serves PLAIN as TARGET/secrets.yaml with go-fuse, without any
// caching by the kernel.
func serveGoFuse(args []string) error {
	text, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	never := time.Duration(0)
	server, err := fs.Mount(args[0], &memoryRoot{text: text}, &fs.Options{
		EntryTimeout: &never, AttrTimeout: &never,
		MountOptions: fuse.MountOptions{FsName: "gofuse", DirectMount: os.Geteuid() == 0},
	})
	if err != nil {
		return err
	}
	return untilTerminated(func() { server.Wait() }, server.Unmount)
}

// untilTerminated tells that the mount is ready, waits for a signal and
// unmounts.
func untilTerminated(wait func(), unmount func() error) error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	ready := os.NewFile(3, "ready")
	ready.Write([]byte("\n"))
	ready.Close()
	<-signals
	if err := unmount(); err != nil {
		return err
	}
	wait()
	return nil
}
