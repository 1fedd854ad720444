package main

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// TestC21_TableIsDocumented compares the table with the page about it.
func TestC21_TableIsDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/exit-codes.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range exits {
		if row := fmt.Sprintf("| %d | %s |\n", e.code, e.meaning); !strings.Contains(string(page), row) {
			t.Errorf("docs/exit-codes.md lacks: %s", row)
		}
	}
}
