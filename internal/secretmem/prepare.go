package secretmem

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The kernel takes each page of secret memory out of its own map as it is first
// used, and every processor must hear of that: some 20 µs a page on a virtual
// machine, which for 64 MiB is as long as to decrypt them. It can happen while the
// bytes are on their way.

// prepareFrom is how much memory is worth being made ready ahead.
const prepareFrom = 256 << 10

// preparers is how many make ready at once. Two hear of each other's pages while
// they wait, which costs less than to be interrupted.
const preparers = 2

// preparing is the making ready of a buffer's memory. The zero value is ready for use.
type preparing struct {
	work sync.WaitGroup
	over atomic.Bool
}

// end returns when no memory is touched any more.
func (p *preparing) end() {
	p.over.Store(true)
	p.work.Wait()
}

// Expect says that about n bytes will come. Memory for them is made ready in the
// meantime, as far as it is to be had; nothing depends on that.
func (b *Buffer) Expect(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n = min(n, b.max); n < prepareFrom || len(b.segs) > 0 || b.wiped {
		return
	}
	_ = b.add(wholePages(n)) // Fill will tell if there is none at all
}

// prepare makes memory ready that is mapped from an offset of the buffer on.
func (b *Buffer) prepare(seg []byte, from int64) {
	if b.store.kind != Secret || len(seg) < prepareFrom || runtime.GOMAXPROCS(0) < 2 {
		return // locked memory is ready when it is locked
	}
	next := new(atomic.Int64)
	for range preparers {
		b.ready.work.Go(func() { b.touch(seg, from, next) })
	}
}

// touch uses the pages of a mapping that none of those before it has taken, and
// that Fill has not come to.
func (b *Buffer) touch(seg []byte, from int64, next *atomic.Int64) {
	b.store.preparers <- struct{}{}
	defer func() { <-b.store.preparers }()
	// Should there be no page, it is Fill that tells.
	defer func() { _ = recover() }()
	debug.SetPanicOnFault(true)
	page := int64(unix.Getpagesize())
	for !b.ready.over.Load() {
		off := next.Add(page) - page
		if off >= int64(len(seg)) {
			return
		}
		if off < b.filled.Load()-from {
			continue
		}
		// Changes nothing, also where Fill has come this far by now: it is one act
		// for both. Nor does it bring here what it finds, as a look would.
		atomic.OrUint32((*uint32)(unsafe.Pointer(&seg[off])), 0)
		runtime.Gosched() // who receives goes first
	}
}

// Settle says that all bytes have come: memory that none came for is given back.
func (b *Buffer) Settle() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ready.end()
	free := b.room - wholePages(b.size)
	if b.wiped || free == 0 {
		return nil
	}
	last := len(b.segs) - 1
	kept := int64(len(b.segs[last])) - free
	if err := munmap(b.segs[last][kept:]); err != nil {
		return fmt.Errorf("munmap: %w", err)
	}
	b.segs[last] = b.segs[last][:kept:kept]
	if kept == 0 {
		b.segs = b.segs[:last]
	}
	b.room -= free
	return nil
}
