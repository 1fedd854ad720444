package crypto

import "io"

// aheadBlock is how much is read ahead at once, aheadBlocks how often.
const (
	aheadBlock  = 256 << 10
	aheadBlocks = 3
)

// ahead reads in a goroutine of its own, so that one stage of the work does not
// wait for another. Only what is larger than a block gets that far.
type ahead struct {
	r       io.Reader
	block   int // how much is read at once
	started bool
	full    chan block
	empty   chan []byte
	stop    chan struct{}
	cur     []byte // what Read gives next
	whole   []byte // the block that cur is of
	err     error
}

type block struct {
	b   []byte
	err error
}

// newAhead reads at most aheadBlock at once, less for what is known to be
// smaller.
func newAhead(r io.Reader, size int) *ahead { return &ahead{r: r, block: min(aheadBlock, size)} }

func (a *ahead) Read(p []byte) (int, error) {
	for len(a.cur) == 0 {
		if a.err != nil {
			return 0, a.err
		}
		if !a.started {
			a.start()
			continue
		}
		a.empty <- a.whole
		next := <-a.full
		a.whole, a.cur, a.err = next.b, next.b, next.err
	}
	n := copy(p, a.cur)
	a.cur = a.cur[n:]
	return n, nil
}

// start reads the first block here.
func (a *ahead) start() {
	a.started = true
	a.whole, a.err = readBlock(a.r, make([]byte, 0, a.block))
	a.cur = a.whole
	if a.err != nil {
		return
	}
	a.full, a.empty, a.stop = make(chan block, aheadBlocks), make(chan []byte, aheadBlocks), make(chan struct{})
	for range aheadBlocks - 1 {
		a.empty <- make([]byte, 0, a.block)
	}
	go func() {
		for {
			select {
			case b := <-a.empty:
				b, err := readBlock(a.r, b[:0])
				a.full <- block{b, err} // never full: there are only so many blocks
				if err != nil {
					return
				}
			case <-a.stop:
				return
			}
		}
	}()
}

// readBlock fills b, less only before an error.
func readBlock(r io.Reader, b []byte) ([]byte, error) {
	for len(b) < cap(b) {
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if err != nil {
			return b, err
		}
	}
	return b, nil
}

// close lets the goroutine end; it may still be in a Read then.
func (a *ahead) close() {
	if a.stop != nil {
		close(a.stop)
	}
}
