package main

type demoCmd struct{}

func (demoCmd) Run(e *env) error { return nil }
