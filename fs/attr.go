package fs

import (
	"os"
	"time"

	"bazil.org/fuse"
	"golang.org/x/sys/unix"
)

// attrOf is what stat told, in the library's words.
func attrOf(st *unix.Stat_t) fuse.Attr {
	mode := os.FileMode(st.Mode & 0o777)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		mode |= os.ModeDir
	case unix.S_IFLNK:
		mode |= os.ModeSymlink
	case unix.S_IFIFO:
		mode |= os.ModeNamedPipe
	case unix.S_IFSOCK:
		mode |= os.ModeSocket
	case unix.S_IFCHR:
		mode |= os.ModeDevice | os.ModeCharDevice
	case unix.S_IFBLK:
		mode |= os.ModeDevice
	}
	if st.Mode&unix.S_ISUID != 0 {
		mode |= os.ModeSetuid
	}
	if st.Mode&unix.S_ISGID != 0 {
		mode |= os.ModeSetgid
	}
	return fuse.Attr{
		Inode: st.Ino, Size: uint64(st.Size), Blocks: uint64(st.Blocks), BlockSize: uint32(st.Blksize),
		Atime: at(st.Atim), Mtime: at(st.Mtim), Ctime: at(st.Ctim),
		Mode: mode, Nlink: uint32(st.Nlink), Uid: st.Uid, Gid: st.Gid, Rdev: uint32(st.Rdev),
	}
}

func at(t unix.Timespec) time.Time { return time.Unix(int64(t.Sec), int64(t.Nsec)) }
