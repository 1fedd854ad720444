package main

import (
	"context"
	"errors"
	"os"

	"bazil.org/fuse"
	"bazil.org/fuse/fs"
)

// serveBazil serves PLAIN as TARGET/secrets.yaml with the fs package of the
// library whose lower half we use.
func serveBazil(args []string) error {
	text, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	conn, err := fuse.Mount(args[0], fuse.FSName("bazil"), fuse.ReadOnly())
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- fs.Serve(conn, &bazilFS{text}) }()
	return errors.Join(untilTerminated(func() { <-served }, func() error { return fuse.Unmount(args[0]) }), conn.Close())
}

type bazilFS struct{ text []byte }

func (f *bazilFS) Root() (fs.Node, error) { return &bazilDir{f.text}, nil }

type bazilDir struct{ text []byte }

func (*bazilDir) Attr(_ context.Context, a *fuse.Attr) error {
	a.Inode, a.Mode = 1, os.ModeDir|0o555
	return nil
}

func (d *bazilDir) Lookup(_ context.Context, name string) (fs.Node, error) {
	if name == "secrets.yaml" {
		return &bazilFile{d.text}, nil
	}
	return nil, fuse.ENOENT
}

type bazilFile struct{ text []byte }

func (f *bazilFile) Attr(_ context.Context, a *fuse.Attr) error {
	a.Inode, a.Mode, a.Size = 2, 0o400, uint64(len(f.text))
	return nil
}

func (f *bazilFile) Open(_ context.Context, _ *fuse.OpenRequest, resp *fuse.OpenResponse) (fs.Handle, error) {
	resp.Flags |= fuse.OpenDirectIO
	return f, nil
}

func (f *bazilFile) Read(_ context.Context, req *fuse.ReadRequest, resp *fuse.ReadResponse) error {
	if req.Offset < int64(len(f.text)) {
		resp.Data = f.text[req.Offset:min(int64(len(f.text)), req.Offset+int64(req.Size))]
	}
	return nil
}
