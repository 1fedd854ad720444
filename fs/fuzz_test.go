package fs

import (
	"bytes"
	"encoding/binary"
	"testing"

	"oncefs/internal/once"
)

// request is one message of a fuzzed conversation.
type request struct {
	opcode uint32
	id     uint64
	handle uint64 // as read and release would take it
	sound  bool   // its length is what its header says
	raw    []byte
}

// maxRequests keeps all the answers within the socket's buffer.
const maxRequests = 24

// ops are the opcodes that a small number stands for; others stand for
// themselves.
var ops = []uint32{opLookup, opOpen, opRead, opRelease, opGetattr, opOpendir, opReaddir, opReleasedir, opForget, opBatchForget, opInterrupt, opGetxattr, opNotifyReply, 26, 38}

// conversation makes requests of a fuzzer's bytes:
//
//	byte 0     what to do: its low six bits are the opcode, 0x40 makes the length
//	           wrong, 0x80 says that all that follows is one message as it is
//	byte 1     low half: the node; high half: the handle
//	byte 2     the id: 0 to 3 are used again, above are new
//	byte 3     length of the body that follows
//
// In the body of what takes a handle its first eight bytes are the handle.
func conversation(data []byte) (all []request) {
	nodes := []uint64{0, 1, 2, 3, 4, uint64(firstUnder), uint64(firstUnder) + 1, uint64(firstUnder) + 2, 1<<32 - 1, 1 << 63, 1<<64 - 1, 5, 6, 7}
	handles := []uint64{1, 2, 3, 4, 5, 0, 1 << 63, 1<<64 - 1}
	for next := uint64(100); len(data) >= 4 && len(all) < maxRequests; next++ {
		if data[0]&0x80 != 0 {
			raw := data[1:]
			r := request{raw: raw, sound: len(raw) >= 40 && binary.NativeEndian.Uint32(raw) == uint32(len(raw))}
			if r.sound {
				r.opcode, r.id = binary.NativeEndian.Uint32(raw[4:]), binary.NativeEndian.Uint64(raw[8:])
				if len(raw) >= 48 {
					r.handle = binary.NativeEndian.Uint64(raw[40:])
				}
			}
			return append(all, r)
		}
		r := request{opcode: uint32(data[0] & 0x3f), id: uint64(data[2]), sound: data[0]&0x40 == 0}
		if int(r.opcode) < len(ops) {
			r.opcode = ops[r.opcode]
		}
		node := nodes[int(data[1]&15)%len(nodes)]
		r.handle = handles[int(data[1]>>4)%len(handles)]
		if r.id > 3 {
			r.id = next
		}
		n := min(int(data[3]), len(data)-4)
		body := append([]byte(nil), data[4:4+n]...)
		data = data[4+n:]
		switch r.opcode {
		case opRead, opReaddir, opRelease, opReleasedir:
			if len(body) >= 8 {
				binary.NativeEndian.PutUint64(body, r.handle)
			}
		}
		if len(body) < 8 {
			r.handle = 0
		}
		r.raw = message(r.opcode, r.id, node, uint32(r.id), body)
		if !r.sound {
			binary.NativeEndian.PutUint32(r.raw, uint32(len(r.raw))+uint32(data0(body))+1)
		}
		all = append(all, r)
	}
	return all
}

func data0(b []byte) byte {
	if len(b) == 0 {
		return 0
	}
	return b[0]
}

// silent are the requests that are not answered.
func silent(opcode uint32) bool {
	return opcode == opForget || opcode == opBatchForget || opcode == opInterrupt || opcode == opNotifyReply
}

// FuzzKernel sends what no kernel would. There is no panic; every request is
// answered once, or the connection ends; no byte of a secret goes out but in the
// answer to a read of a handle that a claim was given; no claim is left over.
func FuzzKernel(f *testing.F) {
	seed := func(requests ...[]byte) []byte { return bytes.Join(requests, nil) }
	body := func(n int) []byte { return make([]byte, n) }
	one := func(op, where, id byte, body []byte) []byte {
		return append([]byte{op, where, id, byte(len(body))}, body...)
	}
	read := body(40)
	binary.NativeEndian.PutUint32(read[16:], 500)
	f.Add(false, seed(one(1, 2, 9, body(8)), one(2, 2, 9, read), one(2, 2, 9, read), one(3, 2, 9, body(24))))
	f.Add(true, seed(one(1, 1, 9, body(8)), one(2, 1, 9, read), one(3, 1, 9, body(24)), one(1, 1, 9, body(8))))
	f.Add(false, seed(one(1, 2, 9, body(8)), one(1, 3, 9, body(8)), one(2, 0x12, 9, read), one(2, 0x03, 9, read)))
	f.Add(false, seed(one(0, 1, 1, []byte("other\x00")), one(1, 5, 1, body(8)), one(2, 5, 1, read), one(3, 5, 1, body(24)), one(8, 5, 1, body(8))))
	f.Add(false, seed(one(0, 1, 9, []byte("secreta\x00")), one(4, 2, 9, body(16)), one(5, 1, 9, body(8)), one(6, 1, 9, read), one(7, 1, 9, body(24))))
	f.Add(false, seed(one(0x41, 2, 9, body(8)), one(9, 0, 9, body(24)), one(10, 0, 9, body(8)), one(11, 1, 9, append(body(8), StatusAttr+"\x00"...))))
	f.Add(false, seed(one(0, 13, 9, []byte("secretc\x00")), one(0, 13, 9, []byte("deep\x00")), one(0, 12, 9, []byte("secretd\x00")), one(0, 12, 9, []byte("other\x00"))))
	f.Add(false, seed(one(5, 13, 9, body(8)), one(6, 13, 9, read), one(1, 4, 9, body(8)), one(2, 0x14, 9, read), one(3, 0x14, 9, body(24)), one(4, 12, 9, body(16))))
	f.Add(true, append([]byte{0x80}, message(opOpen, 5, 1, 7, body(8))...))
	f.Fuzz(func(t *testing.T, overFile bool, data []byte) {
		requests := conversation(data)
		for _, r := range requests {
			// The library makes room for as many items as the kernel says there are.
			if r.opcode == opBatchForget && len(r.raw) >= 44 && binary.NativeEndian.Uint32(r.raw[40:]) > 1<<20 {
				t.Skip()
			}
		}
		var k *fakeKernel
		if overFile {
			k = newKernel(t, true, 1000)
		} else {
			k = newKernel(t, false, 1000, 900, 800, 700)
		}
		for _, r := range requests {
			if !k.send(r.raw) {
				break
			}
		}
		answers, err := k.end()

		byID := map[uint64]int{}
		for _, a := range answers {
			if !a.notification {
				byID[a.id]++
			}
		}
		expect := map[uint64]int{}
		for _, r := range requests {
			if r.sound && !silent(r.opcode) {
				expect[r.id]++
			}
		}
		for id, n := range byID {
			if n > expect[id] {
				t.Errorf("id %d: %d answers to %d requests", id, n, expect[id])
			}
		}
		if err == nil {
			for id, n := range expect {
				if byID[id] != n {
					t.Errorf("id %d: %d answers to %d requests, and the connection went on", id, byID[id], n)
				}
			}
		}
		given := map[uint64]bool{}
		for _, a := range answers {
			if a.errno == 0 && len(a.body) == 16 && asked(requests, a.id, opOpen) {
				given[a.handle()] = true
			}
		}
		out := make([]bool, len(k.content))
		for _, a := range answers {
			reads := false
			for _, r := range requests {
				reads = reads || r.id == a.id && r.sound && (r.opcode == opRead || r.opcode == opReaddir) && given[r.handle]
			}
			for i, content := range k.content {
				whole := a.errno == 0 && len(a.body) > 0 && bytes.Contains(content, a.body)
				if reads && whole {
					out[i] = true
				} else if holds(a.body, content) {
					t.Errorf("bytes of a secret are in the answer to id %d, which did not read a claimed handle, or among others", a.id)
				}
			}
		}
		for i, file := range k.server.files {
			switch state := file.Secret.State(); {
			case state == once.Claimed && err == nil:
				t.Errorf("a claim is left over")
			case state != once.Sealed && err == nil && !out[i]:
				t.Errorf("%v, and nothing went out", state)
			case state == once.Sealed && out[i]:
				t.Errorf("bytes went out, and it is sealed")
			}
		}
		k.destroy()
	})
}

func asked(requests []request, id uint64, opcode uint32) bool {
	for _, r := range requests {
		if r.id == id && r.opcode == opcode {
			return true
		}
	}
	return false
}

// holds tells whether fifteen bytes of content in a row are in b.
func holds(b, content []byte) bool {
	for i := 0; i+8 <= len(content) && len(b) >= 8; i += 8 {
		if bytes.Contains(b, content[i:i+8]) {
			return true
		}
	}
	return false
}
