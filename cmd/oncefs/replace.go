package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"oncefs/crypto"
	"oncefs/internal/secretmem"
)

// A target is an encrypted file that is to be replaced by another, and what it
// was when that began.
type target struct {
	name string   // as the person calls it
	path string   // without symbolic links: the file is replaced and not a link to it
	file *os.File // nil where there was none
	stat unix.Stat_t
	sum  [sha256.Size]byte
}

// openTarget opens the file and looks whether it can be replaced, before anybody
// has done any work. Where there is no file the target has none.
func openTarget(name string) (*target, error) {
	t := &target{name: name}
	var err error
	if t.path, err = filepath.EvalSymlinks(name); errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(name); err == nil {
			return nil, &fs.PathError{Op: "open", Path: name, Err: errors.New("is a symbolic link to nowhere")}
		}
		dir, err := filepath.EvalSymlinks(filepath.Dir(name))
		if err != nil {
			return nil, err
		}
		t.path = filepath.Join(dir, filepath.Base(name))
	} else if err != nil {
		return nil, err
	}
	dir := filepath.Dir(t.path)
	if err := unix.Faccessat(unix.AT_FDCWD, dir, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
		return nil, fmt.Errorf("%s: %w: directory %s: %w", name, errNotReplaced, dir, err)
	}
	// Not waiting for the writer of a FIFO.
	f, err := os.OpenFile(t.path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return t, nil
	}
	if err != nil {
		return nil, err
	}
	if t.sum, err = t.look(f, &t.stat); err == nil && os.Geteuid() != 0 && int(t.stat.Uid) != os.Geteuid() {
		err = fmt.Errorf("%s: %w: it belongs to another user", name, errNotReplaced)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	t.file = f
	return t, nil
}

func (t *target) close() {
	if t.file != nil {
		t.file.Close()
	}
}

// look sums up a file and leaves it at its start.
func (t *target) look(f *os.File, st *unix.Stat_t) (sum [sha256.Size]byte, err error) {
	if err := unix.Fstat(int(f.Fd()), st); err != nil {
		return sum, &fs.PathError{Op: "stat", Path: t.name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return sum, &fs.PathError{Op: "open", Path: t.name, Err: errors.New("is not a regular file")}
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return sum, err
	}
	_, err = f.Seek(0, io.SeekStart)
	return [sha256.Size]byte(h.Sum(nil)), err
}

// unchanged returns errChanged unless the path still leads to the same file with
// the same content.
func (t *target) unchanged() error {
	f, err := os.OpenFile(t.path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist) && t.file == nil:
		return nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	case err != nil || t.file == nil:
		closeAll(f)
		return fmt.Errorf("%s: %w", t.name, errChanged)
	}
	defer f.Close()
	var st unix.Stat_t
	sum, err := t.look(f, &st)
	if err != nil {
		return err
	}
	if st.Dev != t.stat.Dev || st.Ino != t.stat.Ino || sum != t.sum {
		return fmt.Errorf("%s: %w", t.name, errChanged)
	}
	return nil
}

// replace encrypts the content to a temporary file beside the target, decrypts
// that again and compares, looks that the target is still what it was, and
// renames. On any error the target is as it was, or as somebody else made it; that
// it is no longer wanted is one, and leaves nothing beside it either.
func (t *target) replace(ctx context.Context, e *env, plain *secretmem.Buffer, passphrase []byte, format crypto.Format) error {
	mode := os.FileMode(0o600)
	if t.file != nil {
		mode = os.FileMode(t.stat.Mode & 0o777)
	}
	return writeMessage(ctx, e, t.path, mode, plain, passphrase, format, func(f *os.File) error {
		if t.file != nil {
			var st unix.Stat_t
			if err := unix.Fstat(int(f.Fd()), &st); err != nil {
				return &fs.PathError{Op: "stat", Path: f.Name(), Err: err}
			}
			if st.Uid != t.stat.Uid || st.Gid != t.stat.Gid {
				if err := f.Chown(int(t.stat.Uid), int(t.stat.Gid)); err != nil {
					return fmt.Errorf("keep its owner: %w", err)
				}
			}
			if err := keepAttributes(e, t.name, int(t.file.Fd()), int(f.Fd())); err != nil {
				return err
			}
		}
		if t.file != nil && unix.Flock(int(t.file.Fd()), unix.LOCK_EX|unix.LOCK_NB) == unix.EWOULDBLOCK {
			return fmt.Errorf("%s: %w", t.name, errChanged) // another of us is here
		}
		return t.unchanged()
	})
}

// aclAttr is where a file's POSIX access control list is, acl(5).
const aclAttr = "system.posix_acl_access"

// keepAttributes gives the new file the extended attributes of the old one. Without
// its access control list, which says who may read it, there is no new one. Others
// are kept where they can be; what the kernel sums up of the content (security.ima
// and evm) would be wrong of the new one.
func keepAttributes(e *env, name string, from, to int) error {
	// The directory's default list may have given it one, which lets others in.
	if err := unix.Fremovexattr(to, aclAttr); err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOTSUP) {
		return fmt.Errorf("keep its access control list: %w", err)
	}
	list := make([]byte, 64<<10) // XATTR_LIST_MAX of linux/limits.h
	n, err := unix.Flistxattr(from, list)
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("keep its extended attributes: %w", err)
	}
	for _, attr := range strings.Split(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if attr == "" || attr == "security.ima" || attr == "security.evm" {
			continue
		}
		value := make([]byte, 64<<10) // XATTR_SIZE_MAX
		n, err := unix.Fgetxattr(from, attr, value)
		if err == nil {
			err = unix.Fsetxattr(to, attr, value[:n], 0)
		}
		switch {
		case err == nil:
		case attr == aclAttr:
			return fmt.Errorf("keep its access control list: %w", err)
		default:
			e.warn(fmt.Sprintf("%s: its extended attribute %s could not be kept: %v", name, attr, err), "")
		}
	}
	return nil
}

// pendingFile makes a temporary file beside the path, which takes its place when
// it is whole. Its mode is not left to the library, which leaves the file behind
// where that fails.
func pendingFile(path string, mode os.FileMode) (*renameio.PendingFile, error) {
	out, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)))
	if err != nil {
		return nil, err
	}
	if err := out.Chmod(mode); err != nil {
		return nil, errors.Join(err, out.Cleanup())
	}
	return out, nil
}

// writeMessage writes an encrypted file whole or not at all. Nothing takes the
// path before what was written was decrypted again and is the same, and last has
// agreed.
func writeMessage(ctx context.Context, e *env, path string, mode os.FileMode, plain *secretmem.Buffer, passphrase []byte, format crypto.Format, last func(*os.File) error) error {
	out, err := pendingFile(path, mode)
	if err != nil {
		return err
	}
	defer out.Cleanup()
	buf := bufio.NewWriter(out)
	if err := encryptBuffer(ctx, e, filepath.Base(path), buf, plain, passphrase, format); err != nil {
		return err
	}
	if err := buf.Flush(); err != nil {
		return err
	}
	if err := out.Sync(); err != nil {
		return err
	}
	written, err := os.Open(out.Name())
	if err != nil {
		return err
	}
	defer written.Close()
	again, err := decryptKnowing(ctx, e, "comparing "+filepath.Base(path), written, passphrase, size(plain.Size()))
	if err != nil {
		return fmt.Errorf("decrypt it again for comparison: %w", err)
	}
	defer again.Wipe()
	if !again.Equal(plain) {
		return errors.New("decrypt it again for comparison: it holds something else")
	}
	if err := last(out.File); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := out.CloseAtomicallyReplace(); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// syncDir: a rename is on the disk only when its directory is.
func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// encryptBuffer encrypts what a buffer holds. It passes through this process's
// ordinary memory piece by piece.
func encryptBuffer(ctx context.Context, e *env, name string, dst io.Writer, plain *secretmem.Buffer, passphrase []byte, format crypto.Format) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	total := plain.Size() // now: once it is being copied this would wait for the end of that
	copied := make(chan error, 1)
	go func() {
		err := plain.Copy(int(w.Fd()))
		w.Close()
		copied <- err
	}()
	defer context.AfterFunc(ctx, func() { r.Close() })()
	read := &counted{Reader: r}
	stop := e.progress("encrypting "+name, total, read.n.Load)
	err = crypto.EncryptAs(dst, read, passphrase, format)
	stop()
	r.Close() // ends the copy if the encryption failed
	if copyErr := <-copied; err == nil {
		err = copyErr
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}
