package attack

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"oncefs/integration/rig"
)

// An injector makes another process's threads do system calls that are not its
// own, as an intruder in it would. It stops a thread in a call that the thread
// waits in, and has it do others from the same instruction.
//
// All of it must be called from one goroutine that keeps its thread: ptrace(2)
// speaks to the thread that seized.
type injector struct {
	tid   int
	saved unix.PtraceRegs
	page  uintptr // memory in the other process, 64 KiB
}

var (
	errDied   = errors.New("the process was killed")
	errExited = errors.New("the process came to its end")
	// The thread is at another instruction than the call's.
	errElsewhere = errors.New("the call did not come to its end")
)

// inject takes a thread of the process that waits in a call, does f, and lets
// the thread go. It waits until there is one.
func inject(t testing.TB, pid int, f func(*injector)) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var in *injector
	rig.WaitFor(t, fmt.Sprintf("a thread of process %d that waits", pid), func() bool {
		tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		for _, task := range tasks {
			tid, _ := strconv.Atoi(task.Name())
			in = &injector{tid: tid}
			if in.seize() == nil {
				return true
			}
		}
		return false
	})
	f(in)
	in.release()
}

// stopped waits for the thread's next stop.
func (in *injector) stopped() error {
	for {
		var ws unix.WaitStatus
		_, err := unix.Wait4(in.tid, &ws, unix.WALL, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return err
		case ws.Exited():
			return errExited
		case ws.Signaled():
			return fmt.Errorf("%w: %v", errDied, ws.Signal())
		case ws.Stopped():
			return nil
		}
	}
}

func (in *injector) seize() error {
	if err := unix.PtraceSeize(in.tid); err != nil {
		return fmt.Errorf("PTRACE_SEIZE: %w", err)
	}
	if err := unix.PtraceInterrupt(in.tid); err != nil {
		return err
	}
	if err := in.stopped(); err != nil {
		return err
	}
	if err := in.inCall(); err != nil {
		unix.PtraceDetach(in.tid)
		return err
	}
	return nil
}

// inCall looks whether the thread is in a call, behind whose instruction it then
// stands.
func (in *injector) inCall() error {
	if err := unix.PtraceGetRegs(in.tid, &in.saved); err != nil {
		return err
	}
	var code [2]byte
	if _, err := unix.PtracePeekText(in.tid, uintptr(in.saved.Rip)-2, code[:]); err != nil {
		return err
	}
	if code != [2]byte{0x0f, 0x05} || int64(in.saved.Orig_rax) < 0 {
		return errors.New("the thread is not in a system call")
	}
	return nil
}

// release lets the thread go on where it was. The call that it was taken out of
// begins anew: what the kernel left there says that it would have.
func (in *injector) release() {
	regs := in.saved
	switch -int64(regs.Rax) {
	case 512, 513, 514, 516: // ERESTARTSYS and its kin, of linux/errno.h
		regs.Rip -= 2
		regs.Rax = regs.Orig_rax
		regs.Orig_rax = ^uint64(0)
	}
	// Where the process is no more there is nobody to let go.
	_ = unix.PtraceSetRegs(in.tid, &regs)
	_ = unix.PtraceDetach(in.tid)
}

// call does one system call in the thread.
func (in *injector) call(number uintptr, args ...uintptr) (uintptr, error) {
	var a [6]uintptr
	copy(a[:], args)
	regs := in.saved
	regs.Rip -= 2 // onto the instruction again
	regs.Rax, regs.Orig_rax = uint64(number), ^uint64(0)
	regs.Rdi, regs.Rsi, regs.Rdx, regs.R10, regs.R8, regs.R9 = uint64(a[0]), uint64(a[1]), uint64(a[2]), uint64(a[3]), uint64(a[4]), uint64(a[5])
	if err := unix.PtraceSetRegs(in.tid, &regs); err != nil {
		return 0, err
	}
	// One stop before the call and one behind it. A signal that comes in between
	// is another stop, and waits until the thread is let go.
	for range 20 {
		if err := unix.PtraceSyscall(in.tid, 0); err != nil {
			return 0, err
		}
		if err := in.stopped(); err != nil {
			return 0, err
		}
		if err := unix.PtraceGetRegs(in.tid, &regs); err != nil {
			return 0, err
		}
		if regs.Rip == in.saved.Rip && regs.Orig_rax == uint64(number) && int64(regs.Rax) != -int64(unix.ENOSYS) {
			if in.condemned() {
				return 0, errDied
			}
			if r := int64(regs.Rax); r < 0 && r > -4096 {
				return 0, unix.Errno(-r)
			}
			return uintptr(regs.Rax), nil
		}
	}
	return 0, errElsewhere
}

// condemned tells that the filter's deadly signal is on its way to the thread: it
// dies of it as soon as it goes on.
func (in *injector) condemned() bool {
	pending, err := strconv.ParseUint(statusOf(in.tid)["SigPnd"], 16, 64)
	return err == nil && pending&(1<<(unix.SIGSYS-1)) != 0
}

// text puts a string into the other process's memory.
func (in *injector) text(s string) (uintptr, error) {
	if in.page == 0 {
		page, err := in.call(unix.SYS_MMAP, 0, 1<<16, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, ^uintptr(0), 0)
		if err != nil {
			return 0, fmt.Errorf("memory: %w", err)
		}
		in.page = page
	}
	at := in.page
	if _, err := unix.PtracePokeData(in.tid, at, append([]byte(s), 0)); err != nil {
		return 0, err
	}
	in.page += uintptr(len(s)+8) &^ 7
	return at, nil
}
