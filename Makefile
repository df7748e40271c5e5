# SPDX-License-Identifier: Apache-2.0
# Every target does its own set-up: a virtual environment at the versions of constraints.txt, then the package in it.
# Needs CPython 3.10 or newer with venv, a C++17 compiler, and make. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=
GPU_PYTHON ?= python3
GPU_OUT ?= gpu-results
# With pytest-xdist there the tests, most of whose time is the compilation of kernels, share the cores.
GPU_WORKERS ?= $(shell $(GPU_PYTHON) -c 'import xdist' 2>/dev/null && echo -n 8)

OVERHEAD := --benchmark-storage=file://benchmarks/baseline --benchmark-columns=median,iqr,rounds \
  --benchmark-sort=name --benchmark-warmup=on

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEPENDENCIES := $(VENV)/.dependencies
PACKAGE := $(VENV)/.package
BENCH := $(VENV)/.bench
WHEEL := dist/.wheel-$(notdir $(VENV))
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)
SOURCES := $(NATIVE) $(shell find fastpref/ kernels/ -name '*.py')

# Models, tokenizers and data of the tests and the demo are made on the spot.
export HF_HUB_OFFLINE := 1

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-slow bench bench-compare bench-baseline gpu lint format wheel install clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(PACKAGE) ## a preference training inside TRL on the CPU, stock against fastpref
	$(BIN)/python -m fastpref demo $(DEMO_ARGS)

test: $(PACKAGE) $(WHEEL) ## all tests but the sweeps and those that need a GPU
	FASTPREF_WHEEL="$$(ls $(CURDIR)/dist/fastpref-*.whl)" \
	  $(BIN)/python -m pytest -q -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: $(PACKAGE) $(WHEEL) ## the sweeps
	FASTPREF_WHEEL="$$(ls $(CURDIR)/dist/fastpref-*.whl)" $(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

bench: $(BENCH) ## measure against the alternatives
	$(BIN)/python -m fastpref bench $(BENCH_ARGS)

# Absolute times: on another machine first `make bench-baseline`. A median half as long again fails.
bench-compare: $(PACKAGE) ## what a call costs beside its products, against the stored baseline
	$(BIN)/python -m pytest -q benchmarks $(OVERHEAD) --benchmark-compare \
	  --benchmark-compare-fail=median:50% $(PYTEST_ARGS)

bench-baseline: $(PACKAGE) ## store what a call costs on this machine as the baseline
	rm -rf benchmarks/baseline
	$(BIN)/python -m pytest -q benchmarks $(OVERHEAD) --benchmark-save=calls $(PYTEST_ARGS)

# Not in the virtual environment, whose torch is a CPU build. Neither half keeps the other from running.
gpu: ## correctness and timings on the GPU here, by GPU_PYTHON with its own torch
	test -e fastpref/_ops.so || $(GPU_PYTHON) setup.py -q build_ext --inplace
	failed=0; $(GPU_PYTHON) -m fastpref bench --suite gpu --out $(GPU_OUT) $(BENCH_ARGS) || failed=1; \
	  $(GPU_PYTHON) -m pytest -q -m gpu tests/gpu $(GPU_WORKERS) $(PYTEST_ARGS) || failed=1; exit $$failed

lint: $(DEPENDENCIES) ## formatting, ruff, mypy --strict, clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	find csrc -type f | xargs $(BIN)/clang-format --dry-run --Werror

format: $(DEPENDENCIES) ## rewrite the sources as `lint` wants them
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	find csrc -type f | xargs $(BIN)/clang-format -i

wheel: $(WHEEL) ## dist/*.whl for this Python
	@ls dist/fastpref-*.whl

install: $(PACKAGE) ## the environment and the package in it, editable

clean: ## remove what was built, keep the environment
	rm -rf build dist *.egg-info fastpref/*.so fastpref/_build_info.json $(PACKAGE) $(BENCH)
	find fastpref kernels tests -name __pycache__ -prune -exec rm -rf {} +

$(DEPENDENCIES): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "fastpref needs CPython 3.10 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -r constraints.txt
	touch $@

$(PACKAGE): $(DEPENDENCIES) $(NATIVE)
	$(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

$(BENCH): $(PACKAGE)
	$(PIP) install -q --no-build-isolation -c constraints.txt -e '.[bench]'
	touch $@

# setuptools packs whatever is under build/lib*, also files deleted since. The objects under build/ stay.
$(WHEEL): $(DEPENDENCIES) $(SOURCES)
	rm -rf build/lib* build/bdist* dist
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .
	touch $@
