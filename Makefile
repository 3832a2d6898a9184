# Two commands on a fresh machine with python3 and make: `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Files side by side in two processes, each on one thread; the programs that they start are compiled once, not each time.
TEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --no-loadscope-reorder --durations 25

.PHONY: help venv demo test test-all test-gpu lint bench figures faults parity clean
.DELETE_ON_ERROR:

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

venv: $(READY)  ## create .venv and install everything

demo: $(READY)  ## pretrain, be killed, resume, evaluate and report, in a few minutes on two cores
	$(BIN)/python -m launch.demo

test: $(READY)  ## all tests but the long ones
	$(TEST) -m "not slow"

test-all: $(READY)  ## all tests
	$(TEST)

test-gpu: $(READY)  ## the tests that need an accelerator
	$(BIN)/python -m pytest -m gpu

lint: $(READY)  ## style, types, layers and sizes, as the tests check them
	$(BIN)/python -m pytest tests/unit/test_conventions.py

bench: $(READY)  ## benchmarks: ratios against a peer measured in the same run
	set -e; for file in $$(grep -l '__main__' tests/perf/*.py); do \
	  module=tests.perf.$$(basename $$file .py); echo "== $$module"; $(BIN)/python -m $$module; done

figures: $(READY)  ## tables of the READMEs from the records of what was measured
	$(BIN)/python -m tests.figures

faults: $(READY)  ## the fault matrix: what was done to runs, how they ended, seconds until they trained again
	@mkdir -p build; rm -f build/faults.jsonl
	-$(BIN)/python -m pytest -q -m fault --faults build/faults.jsonl tests/faults tests/slurm
	@$(BIN)/python -m tests.faults.matrix build/faults.jsonl

parity: $(READY)  ## the same numbers as other implementations, which this installs
	$(BIN)/python -m pip install --quiet -e ".[parity]"
	$(BIN)/python -m pytest tests/parity

clean:  ## remove caches and build products; runs, shards and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# Debian has `python3 -m venv` in a package of its own.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/it" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && apt-get install -q -y python3-venv; \
	  else echo "python3 -m venv does not work here; first: sudo apt-get install python3-venv" >&2; exit 2; fi; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet -e ".[test]"
	@touch $@
