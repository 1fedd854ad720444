//go:build cgo

package main

// As cmd/oncefs/cgo.go says: what is given up could not be given up in all
// threads.
func init() { linkedWithC = true }
