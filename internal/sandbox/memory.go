package sandbox

import (
	"debug/elf"
	"runtime/debug"
	"unsafe"

	"golang.org/x/sys/unix"
)

// GiveBack gives memory back that starting took and waiting does not: what is
// free of the heap, and the pages of the program itself, which the kernel maps
// again from its file as they are run or read. None of it is secret memory. It
// needs no file and no call that a sandbox takes away; what cannot be given back
// stays.
func GiveBack() {
	debug.FreeOSMemory()
	for _, segment := range readOnlySegments() {
		_ = unix.Madvise(segment, unix.MADV_DONTNEED)
	}
}

// readOnlySegments are the parts of this program's file that are mapped and that
// nothing can have changed: to drop a page of what was written would lose it. The
// kernel tells a program where its program headers are (getauxval(3)); nil where
// they are not of this kind. The binary is linked to fixed addresses.
func readOnlySegments() (all [][]byte) {
	auxv, err := unix.Auxv()
	if err != nil {
		return nil
	}
	const atPhdr, atPhent, atPhnum = 3, 4, 5 // elf.h
	var at, size, count uintptr
	for _, pair := range auxv {
		switch pair[0] {
		case atPhdr:
			at = pair[1]
		case atPhent:
			size = pair[1]
		case atPhnum:
			count = pair[1]
		}
	}
	if at == 0 || size != unsafe.Sizeof(elf.Prog64{}) {
		return nil
	}
	page := uint64(unix.Getpagesize())
	first := (*elf.Prog64)(*(*unsafe.Pointer)(unsafe.Pointer(&at)))
	headers := unsafe.Slice(first, count)
	for _, h := range headers {
		if elf.ProgType(h.Type) == elf.PT_INTERP || elf.ProgType(h.Type) == elf.PT_DYNAMIC {
			return nil // moved, and by whom is not ours to know
		}
	}
	for _, h := range headers {
		if elf.ProgType(h.Type) != elf.PT_LOAD || elf.ProgFlag(h.Flags)&elf.PF_W != 0 || h.Vaddr%page != 0 {
			continue
		}
		start := uintptr(h.Vaddr)
		// Whole pages only: the last may hold the beginning of what is written.
		all = append(all, unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&start))), h.Filesz/page*page))
	}
	return all
}
