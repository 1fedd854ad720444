package attack

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"io"
	"slices"
	"testing"
)

// An index finds every piece of 16 bytes of some needles in any bytes, raw or
// written as base64, hexadecimal digits or 16-bit characters.
//
// Raw pieces are found by a table of all windows of 16 bytes. For the encodings
// the haystack is decoded, at every alignment that it could have, and searched
// again; so a piece is found wherever its copy begins.
type index struct {
	parts  []part
	all    []byte   // the needles, one after another
	starts []int    // where each begins in all
	filter []uint64 // one bit for each hash of eight bytes that begin a window
	shift  uint     // hash to bit number
	table  []uint32 // open addressing: position in all plus one
}

// A part is one needle.
type part struct {
	name  string
	bytes []byte
}

// window is how much of a needle makes a hit.
const window = 16

// minRun is how many characters of base64 hold a window at any alignment.
const minRun = 22

func newIndex(parts ...part) *index { return newSparseIndex(1, parts...) }

// newSparseIndex keeps only the windows that begin at a multiple of step: a
// copy must be step-1 bytes longer to be found for sure.
func newSparseIndex(step int, parts ...part) *index {
	ix := &index{parts: parts}
	windows := 0
	for _, p := range parts {
		ix.starts = append(ix.starts, len(ix.all))
		ix.all = append(ix.all, p.bytes...)
		windows += len(p.bytes) / step
	}
	bits := uint(16)
	for 1<<bits < 16*windows {
		bits++
	}
	ix.filter, ix.shift = make([]uint64, 1<<bits/64), 64-bits
	slots := 1 << 10
	for slots < 2*windows {
		slots *= 2
	}
	ix.table = make([]uint32, slots)
	for n, p := range parts {
		for i := 0; i+window <= len(p.bytes); i += step {
			at := ix.starts[n] + i
			word := binary.LittleEndian.Uint64(ix.all[at:])
			if word<<32 == 0 {
				continue // find skips what begins with zeros; its neighbours are enough
			}
			h := hash(word)
			b := h >> ix.shift
			ix.filter[b/64] |= 1 << (b % 64)
			for s := h & uint64(slots-1); ; s = (s + 1) & uint64(slots-1) {
				if ix.table[s] == 0 {
					ix.table[s] = uint32(at + 1)
					break
				}
			}
		}
	}
	return ix
}

func hash(word uint64) uint64 {
	word *= 0x9e3779b97f4a7c15
	return word ^ word>>29
}

// hits counts what was found: needle and encoding, and how many places.
type hits map[string]map[string]int

func (h hits) add(name, encoding string) {
	if h[name] == nil {
		h[name] = map[string]int{}
	}
	h[name][encoding]++
}

func (h hits) of(name string) (n int) {
	for _, k := range h[name] {
		n += k
	}
	return n
}

func (h hits) merge(other hits) {
	for name, m := range other {
		for encoding, n := range m {
			if h[name] == nil {
				h[name] = map[string]int{}
			}
			h[name][encoding] += n
		}
	}
}

// search looks through b in every encoding.
func (ix *index) search(b []byte, found hits) {
	// Most memory is zeros.
	const block = 4096
	for start := 0; start < len(b); {
		if allZero(b[start:min(start+block, len(b))]) {
			start += block
			continue
		}
		end := start + block
		for end < len(b) && !allZero(b[end:min(end+block, len(b))]) {
			end += block
		}
		ix.searchBlock(b[start:min(end, len(b))], found)
		start = end
	}
}

var zeroBlock [4096]byte

func allZero(b []byte) bool { return bytes.Equal(b, zeroBlock[:len(b)]) }

func (ix *index) searchBlock(b []byte, found hits) {
	ix.raw(b, "raw", found)
	for parity := range 2 {
		ix.wide(b[min(parity, len(b)):], found)
	}
	var run []byte // characters of base64, among them all of hex, without line ends
	flush := func() {
		if len(run) >= minRun {
			ix.encoded(run, found)
		}
		run = run[:0]
	}
	for i := 0; i < len(b); i++ {
		c := b[i]
		switch {
		case class[c] != none:
			run = append(run, c)
		case (c == '\n' || c == '\r') && len(run) > 0:
		default:
			flush()
		}
	}
	flush()
}

// raw looks for windows as they are. A copy of any length counts once.
func (ix *index) raw(b []byte, encoding string, found hits) {
	for i := 0; i+window <= len(b); {
		word := binary.LittleEndian.Uint64(b[i:])
		if word<<32 == 0 {
			i++
			continue
		}
		h := hash(word)
		if bit := h >> ix.shift; ix.filter[bit/64]&(1<<(bit%64)) == 0 {
			i++
			continue
		}
		n, name := ix.match(h, b[i:])
		if n == 0 {
			i++
			continue
		}
		found.add(name, encoding)
		i += n
	}
}

func (ix *index) match(h uint64, b []byte) (n int, name string) {
	mask := uint64(len(ix.table) - 1)
	for s := h & mask; ix.table[s] != 0; s = (s + 1) & mask {
		at := int(ix.table[s] - 1)
		which, exact := slices.BinarySearch(ix.starts, at)
		if !exact {
			which--
		}
		end := ix.starts[which] + len(ix.parts[which].bytes)
		if !bytes.Equal(ix.all[at:at+window], b[:window]) {
			continue
		}
		for n = window; n < len(b) && at+n < end && ix.all[at+n] == b[n]; n++ {
		}
		return n, ix.parts[which].name
	}
	return 0, ""
}

// wide looks for bytes that were made into characters of 16 bits, low byte
// first; one byte further on it is high byte first.
func (ix *index) wide(b []byte, found hits) {
	var run []byte
	flush := func() {
		if len(run) >= window {
			ix.raw(run, "utf16", found)
		}
		run = run[:0]
	}
	for i := 0; i+1 < len(b); i += 2 {
		if b[i+1] != 0 {
			flush()
			continue
		}
		run = append(run, b[i])
	}
	flush()
}

const none = 0xff

// class is the value of each character of base64, in both alphabets.
var class = func() (t [256]byte) {
	for i := range t {
		t[i] = none
	}
	for _, alphabet := range []string{base64.StdEncoding.EncodeToString(everySix()), base64.URLEncoding.EncodeToString(everySix())} {
		for i, c := range []byte(alphabet) {
			t[c] = byte(i)
		}
	}
	return t
}()

// everySix are bytes whose base64 is the alphabet in its order.
func everySix() []byte {
	var b []byte
	for i := 0; i < 64; i += 4 {
		v := i<<18 | (i+1)<<12 | (i+2)<<6 | (i + 3)
		b = append(b, byte(v>>16), byte(v>>8), byte(v))
	}
	return b
}

// encoded decodes a run of characters in every way that it could be meant.
func (ix *index) encoded(run []byte, found hits) {
	out := make([]byte, 0, len(run))
	for skip := range 4 {
		out = out[:0]
		r := run[min(skip, len(run)):]
		for ; len(r) >= 4; r = r[4:] {
			v := uint32(class[r[0]])<<18 | uint32(class[r[1]])<<12 | uint32(class[r[2]])<<6 | uint32(class[r[3]])
			out = append(out, byte(v>>16), byte(v>>8), byte(v))
		}
		if len(r) >= 2 {
			out = append(out, class[r[0]]<<2|class[r[1]]>>4)
		}
		if len(r) == 3 {
			out = append(out, class[r[1]]<<4|class[r[2]]>>2)
		}
		ix.raw(out, "base64", found)
	}
	for skip := range 2 {
		out = out[:0]
		for r := run[skip:]; len(r) >= 2; r = r[2:] {
			hi, lo := digit(r[0]), digit(r[1])
			if hi == none || lo == none {
				ix.raw(out, "hex", found)
				out = out[:0]
				continue
			}
			out = append(out, hi<<4|lo)
		}
		ix.raw(out, "hex", found)
	}
}

func digit(c byte) byte {
	switch {
	case c >= '0' && c <= '9':
		return c - '0'
	case c >= 'a' && c <= 'f':
		return c - 'a' + 10
	case c >= 'A' && c <= 'F':
		return c - 'A' + 10
	}
	return none
}

// overlap is what one chunk repeats of the one before, so that nothing is lost
// where they meet.
const overlap = 256

// stream searches all that r gives and returns how much that was.
func (ix *index) stream(r io.Reader, found hits) (total int64, err error) {
	buf := make([]byte, 1<<20)
	kept := 0
	for {
		n, err := io.ReadFull(r, buf[kept:])
		total += int64(n)
		ix.search(buf[:kept+n], found)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		kept = copy(buf, buf[len(buf)-overlap:])
	}
}

// encodings are the ways in which a needle is planted.
func encodings(b []byte) map[string][]byte {
	wide := func(low int) []byte {
		w := make([]byte, 2*len(b)+1)
		for i, c := range b {
			w[2*i+low] = c
		}
		return w
	}
	mime := func() (lines []byte) {
		text := base64.StdEncoding.EncodeToString(b)
		for len(text) > 0 {
			n := min(64, len(text))
			lines = append(append(lines, text[:n]...), "\r\n"...)
			text = text[n:]
		}
		return lines
	}
	m := map[string][]byte{
		"raw": b, "utf16 low first": wide(0), "utf16 high first": wide(1), "base64 in lines": mime(),
		"hex lower": []byte(hex.EncodeToString(b)), "hex upper": bytes.ToUpper([]byte(hex.EncodeToString(b))),
	}
	for before, ahead := range []string{"", "x", "xy"} {
		for name, e := range map[string]*base64.Encoding{"std": base64.StdEncoding, "url": base64.URLEncoding} {
			m["base64 "+name+" after "+string(rune('0'+before))] = []byte(e.EncodeToString(append([]byte(ahead), b...)))
		}
	}
	return m
}

// The measure itself: every encoding is found, of a whole needle and of its
// smallest piece, wherever it lies; and what was not planted is not found.
func TestScan_IndexFindsWhatIsThere(t *testing.T) {
	for _, size := range []int{window, 32, 100, 5000} {
		needle, other := random(t, size), random(t, size)
		ix := newIndex(part{"needle", needle}, part{"other", other})
		for _, from := range []int{0, size/2 - window/2, size - window} {
			piece := needle[from : from+window]
			for name, planted := range encodings(piece) {
				if name == "base64 in lines" {
					continue // a piece is one line
				}
				for shift := range 7 {
					hay := slices.Concat(random(t, 1000+shift), []byte{'!'}, planted, []byte{0, '!'}, random(t, 500))
					found := hits{}
					ix.search(hay, found)
					if found.of("needle") == 0 || found.of("other") != 0 {
						t.Errorf("size %d, piece at %d, %s, at %d: %v", size, from, name, 1001+shift, found)
					}
				}
			}
		}
		for name, planted := range encodings(needle) {
			found := hits{}
			n, err := ix.stream(bytes.NewReader(slices.Concat(make([]byte, 1<<20-len(planted)/2), planted, make([]byte, 9000))), found)
			if err != nil || n != 1<<20-int64(len(planted)/2)+int64(len(planted))+9000 || found.of("needle") == 0 {
				t.Errorf("size %d, %s across chunks: %v, %d bytes, %v", size, name, found, n, err)
			}
		}
		found := hits{}
		ix.search(random(t, 1<<20), found)
		ix.search([]byte(base64.StdEncoding.EncodeToString(random(t, 1<<18))), found)
		for i := range needle[:size-window+1] {
			almost := bytes.Clone(needle[i : i+window])
			almost[window-1]++
			if i > 50 {
				break
			}
			ix.search(append(almost, '!'), found)
		}
		if len(found) != 0 {
			t.Errorf("size %d: found what is not there: %v", size, found)
		}
	}
}
