# make demo   shows the main job          make test    everything a change must pass
# make build  makes what is in dist       make attack  the long proofs
# make help   lists all targets

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo development)
FUZZTIME ?= 5s

.DEFAULT_GOAL := help
.PHONY: help build demo deps test unit integration man fuzz race attack bench image test-cluster clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

build: ## dist/oncefs, one static file, and dist/oncefs-metrics for --metrics
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o dist/oncefs ./cmd/oncefs
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o dist/oncefs-metrics ./cmd/oncefs-metrics

demo: build ## the main job on real input, in a temporary directory
	@dist/oncefs demo

deps: ## install what the tests need (as root), or say what is missing
	@ci/deps

test: deps build ## all checks and tests, under ten minutes
	ci/check
	$(MAKE) --no-print-directory unit
	$(MAKE) --no-print-directory fuzz
	$(MAKE) --no-print-directory integration
	ci/attack -short

unit: ## tests of the rooms, with the race detector
	$(GO) test -race -count=1 $(shell $(GO) list ./... | grep -v /integration)

integration: build ## the built binary on real mounts, as root and as a plain user
	ci/integration

race: build ## 200 readers race for one file, 100 rounds, also with GOMAXPROCS=1
	ONCEFS_ROUNDS=100 ONCEFS_BIN=$(CURDIR)/dist/oncefs $(GO) test -count=1 -v -timeout 20m -run 'TestC3_Race$$' ./integration

man: ## write docs/man and the README's usage text anew
	$(GO) test -count=1 -run 'TestManPage|TestReadme' ./cmd/oncefs -update

fuzz: ## every fuzz target for FUZZTIME
	ci/fuzz $(FUZZTIME)

attack: deps build ## root scans, faults are injected, hostile readers try
	ci/attack

bench: build ## against its peers; writes docs/benchmarks.md, SHORT=1 a smoke test
	ci/bench

image: ## the container images, built without a registry (as root); ARCH="amd64 arm64" says for what
	ci/image $(VERSION) $(ARCH)

test-cluster: build ## every shape of docs/kubernetes.md in a cluster that comes up and goes down for it
	integration/k8s/test

clean:
	rm -rf dist
