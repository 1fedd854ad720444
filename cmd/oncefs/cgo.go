//go:build cgo

package main

// Linked with C, some threads are not Go's to call upon, and a process that is
// undumpable cannot even list them: what it gives up, it could not give up in
// all of them.
func init() { linkedWithC = true }
