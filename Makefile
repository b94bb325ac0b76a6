# Every target honours CARGO_TARGET_DIR. `make help` lists them.

CARGO ?= cargo
TARGET = $(or $(CARGO_TARGET_DIR),target)

# candle is slower on two threads than on one for small models, and results must not depend on the core count.
export RAYON_NUM_THREADS = 1
export CANDLE_NUM_THREADS = 1

.NOTPARALLEL:
.PHONY: help build test demo soak bench rivals bench-rivals bench-durability fmt fmt-check lint doc fences binaries clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

build: ## the released binaries: coordinator and worker
	$(CARGO) build --release --locked -p tributary-coordinator -p tributary-worker
	@ls -l $(TARGET)/release/coordinator $(TARGET)/release/worker

test: fmt-check lint doc fences binaries ## everything that CI runs
	@tests/run.sh

demo: ## train on three airports' flights and compare with pooled and local training
	$(CARGO) build --release --locked -p tributary-coordinator -p tributary-worker -p tributary-tests --bins
	@$(TARGET)/release/demo deploy/demo

soak: binaries ## kill the coordinator and the workers of a real fleet 200 times
	@$(TARGET)/debug/soak

# LINE=fold,csv measures these alone; MNIST and FLIGHTS name directories with their data; DISK names one on the disk that is measured.
RIVALS ?= $(TARGET)/rivals
FLIGHTS ?= $(patsubst %/flights.csv.gz,%,$(wildcard $(RIVALS)/data/flights.csv.gz))
BENCH = $(TARGET)/release/bench --out bench/results.json --rivals "$(RIVALS)" $(if $(LINE),--only "$(LINE)") \
	$(if $(MNIST),--mnist "$(MNIST)") $(if $(FLIGHTS),--flights "$(FLIGHTS)") $(if $(DISK),--disk "$(DISK)")

bench: ## every figure beside a rival's or a limit's: a table, and bench/results.json
	$(CARGO) build --release --locked -p tributary-coordinator -p tributary-worker -p tributary-bench --bins
	@$(BENCH)

rivals: ## the rivals' packages, some 6 GB, in an environment of their own
	@bench/rivals/setup.sh "$(RIVALS)"

bench-rivals: rivals bench ## the same with the Python rivals

bench-durability: ## what durability costs: a table, and bench-durability.json
	$(CARGO) build --release --locked -p tributary-coordinator -p tributary-worker -p tributary-bench --bins
	@$(TARGET)/release/bench-durability --out bench-durability.json

fmt: ## format the code
	$(CARGO) fmt --all

fmt-check: ## is the code formatted?
	$(CARGO) fmt --all --check

lint: ## clippy, where every warning is an error
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

doc: ## the documentation, where every warning is an error
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps

fences: ## what each crate may depend on, and what protocol may call
	@tests/fences.sh

# The tests find the binaries beside their own executable.
binaries: ## the binaries as the tests run them
	$(CARGO) build --locked --workspace --bins
	$(CARGO) build --locked --workspace --features tributary-coordinator/crash-points --bin coordinator-crashing

clean: ## remove what was built
	$(CARGO) clean
