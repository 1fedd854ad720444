package main

import "runtime/debug"

// version is set when released: go build -ldflags "-X main.version=1.2.3".
var version = "development"

type versionCmd struct{}

// Help is shown below the options.
func (versionCmd) Help() string {
	return `The first line is the version; the others are what it was built with and from.

Examples:
  oncefs version`
}

func (versionCmd) Run(e *env) error {
	e.printf("oncefs %s\n", version)
	if info, ok := debug.ReadBuildInfo(); ok {
		e.printf("built with %s\n", info.GoVersion)
		for _, dep := range info.Deps {
			e.printf("  %s %s\n", dep.Path, dep.Version)
		}
	}
	return nil
}
