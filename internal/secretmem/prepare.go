package secretmem

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// The kernel takes each page of secret memory out of its own map as it is first
// used, and every processor must hear of that (mm/secretmem.c): some 20 µs a page on
// a virtual machine, which for 64 MiB is as long as to decrypt them. So it is done
// before the bytes come, while who sends them starts.

// prepareFrom is how much memory is worth being made ready ahead.
const prepareFrom = 256 << 10

// preparers is how many make ready at once. Two hear of each other's pages while
// they wait, which costs less than to be interrupted by them.
const preparers = 2

// turn is how many pages one makes ready before others have a turn.
const turn = 16

// preparing is the making ready of a buffer's memory. The zero value is ready for use.
type preparing struct {
	work sync.WaitGroup
	over atomic.Bool
}

// wait returns when all that was begun is done.
func (p *preparing) wait() { p.work.Wait() }

// end does not wait for what was not done so far.
func (p *preparing) end() {
	p.over.Store(true)
	p.work.Wait()
}

// Expect says that the buffer will hold about n bytes in all. Memory for them is made
// ready in the meantime, as far as it is to be had; nothing depends on that.
func (b *Buffer) Expect(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n = min(n, b.max) - b.room; n < prepareFrom || b.wiped {
		return
	}
	if b.add(wholePages(n)) != nil {
		return // Fill will tell if there is none at all
	}
	if b.store.kind == Secret && runtime.GOMAXPROCS(0) > 1 { // locked memory is ready already
		b.prepare(b.segs[len(b.segs)-1])
	}
}

// prepare uses each page of a mapping that nobody else knows.
func (b *Buffer) prepare(seg []byte) {
	page := int64(unix.Getpagesize())
	next := new(atomic.Int64)
	for range preparers {
		b.ready.work.Go(func() {
			b.store.preparers <- struct{}{}
			defer func() { <-b.store.preparers }()
			// Should there be no page, it is Fill that tells.
			defer func() { _ = recover() }()
			debug.SetPanicOnFault(true)
			for !b.ready.over.Load() {
				off := next.Add(page*turn) - page*turn
				if off >= int64(len(seg)) {
					return
				}
				for part := seg[off:min(off+page*turn, int64(len(seg)))]; len(part) > 0; part = part[page:] {
					part[0] = 0
				}
				runtime.Gosched() // others have but as many processors
			}
		})
	}
}

// Settle says that all bytes have come: memory that none came for is given back.
func (b *Buffer) Settle() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ready.end()
	if b.wiped {
		return nil
	}
	for free := b.room - wholePages(b.size); free > 0; free = b.room - wholePages(b.size) {
		last := len(b.segs) - 1
		seg := b.segs[last]
		kept := max(0, int64(len(seg))-free)
		if err := munmap(seg[kept:]); err != nil {
			return fmt.Errorf("munmap: %w", err)
		}
		b.room -= int64(len(seg)) - kept
		b.segs[last] = seg[:kept:kept]
		if kept == 0 {
			b.segs = b.segs[:last]
		}
	}
	return nil
}
