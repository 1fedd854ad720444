package decryptor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"oncefs/crypto"
	"oncefs/internal/sandbox"
)

// inspecting is the child's only argument where it is to look and not decrypt.
const inspecting = "inspect"

// finding is what such a child writes to its pipe, as JSON: numbers but for the
// detail, whose text is checked like that of a frame.
type finding struct {
	Report crypto.Report
	Fault  crypto.Fault // 0 for none
	Detail string
}

// maxFinding is more than a report can take: 64 packets and a few passphrases.
const maxFinding = 64 << 10

// inspectMain is the child: the file is inherited where the passphrase would
// be.
func inspectMain() int {
	out, in := os.NewFile(pipeFD, "pipe"), os.NewFile(passphraseFD, "file")
	if err := sandbox.Decryptor(false); err != nil {
		return 1
	}
	var f finding
	var err error
	if f.Report, err = crypto.Inspect(in); err != nil {
		f.Fault, f.Detail = crypto.FaultOf(err)
		f.Detail = printable(f.Detail)
	}
	if json.NewEncoder(out).Encode(f) != nil {
		return 1
	}
	return 0
}

// Inspect reads an open file to its end in a child of its own and reports what
// the message tells of itself. With the fault of the message, if it has one,
// comes the report of what came before. Afterwards the file's offset is at its
// end.
func Inspect(ctx context.Context, binary string, file *os.File) (*crypto.Report, error) {
	ours, theirs, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("pipe to the inspecting process: %w", err)
	}
	defer ours.Close()
	c, err := startChild(ctx, binary, nil, []*os.File{theirs, file}, inspecting)
	theirs.Close()
	if err != nil {
		return nil, err
	}
	var f finding
	in := json.NewDecoder(io.LimitReader(ours, maxFinding))
	in.DisallowUnknownFields()
	received := in.Decode(&f)
	if received != nil {
		c.Process.Kill()
	}
	waited := c.wait()
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case errors.Is(received, io.EOF), errors.Is(received, io.ErrUnexpectedEOF):
		return nil, ErrDied
	case received != nil:
		return nil, errProtocol
	case waited != nil:
		return nil, fmt.Errorf("%w: %w", ErrDied, waited)
	case f.Fault == 0:
		return &f.Report, nil
	}
	fault, err := faultOf(byte(f.Fault), []byte(f.Detail))
	if err != nil {
		return nil, err
	}
	return &f.Report, fault
}
