# SPDX-License-Identifier: Apache-2.0
# Every target does its own set-up: a virtual environment at the versions of constraints.txt, then the package in it.
# Needs CPython 3.10 or newer with venv, a C++17 compiler, and make. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Processes that share the tests.
WORKERS ?= auto
# A part of the tests: a folder or a file under tests/.
AREA ?=
# Versions of TRL for `make trl-matrix`, otherwise all that are covered.
TRL ?=
BENCH_ARGS ?=
DEMO_ARGS ?=
GPU_PYTHON ?= python3
GPU_OUT ?= gpu-results
# Where `make gpu` left something: in its own folder, unless that was moved.
GPU_LEFT ?= $(GPU_OUT)
# Peers to measure against, for a machine that has none and no network.
GPU_PACK ?= gpu-pack
GPU := PYTHONPATH="$(abspath $(GPU_PACK))/site:$$PYTHONPATH" PYTHONUNBUFFERED=1 \
  TRL_KERNEL="$(firstword $(TRL_KERNEL) $(abspath $(wildcard $(GPU_PACK)/trl-*.py)))" \
  $(GPU_PYTHON) -m fastpref bench --suite gpu --out $(GPU_OUT)

OVERHEAD := --benchmark-storage=file://benchmarks/baseline --benchmark-columns=median,iqr,rounds \
  --benchmark-sort=name --benchmark-warmup=on

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEPENDENCIES := $(VENV)/.dependencies
PACKAGE := $(VENV)/.package
BENCH := $(VENV)/.bench
WHEEL := dist/.wheel-$(notdir $(VENV))
CSRC := $(shell find csrc -type f ! -name '*.md' ! -name '*.py')
NATIVE := setup.py pyproject.toml $(CSRC)
# A source archive has the kernels in fastpref/ alone.
SOURCES := $(NATIVE) $(shell find fastpref/ $(wildcard kernels/) -name '*.py')

# Models, tokenizers and data of the tests and the demo are made on the spot.
export HF_HUB_OFFLINE := 1

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-quick test-slow trl-matrix bench bench-compare bench-baseline gpu gpu-more gpu-pack lint format wheel install clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(PACKAGE) ## a preference training inside TRL on the CPU, stock against fastpref
	$(BIN)/python -m fastpref demo $(DEMO_ARGS)

test: $(PACKAGE) $(WHEEL) ## all tests but the sweeps and those that need a GPU
	FASTPREF_WHEEL="$(CURDIR)/$$(cat $(WHEEL))" \
	  $(BIN)/python -m pytest -q -m "not slow and not gpu" -n $(WORKERS) $(PYTEST_ARGS)

test-quick: $(PACKAGE) ## a sample of the tests within two minutes, or of one AREA, such as AREA=scoring
	$(BIN)/python -m pytest -q --quick -m "not slow and not gpu" -n 2 $(PYTEST_ARGS) tests/$(AREA)

test-slow: $(PACKAGE) $(WHEEL) ## the sweeps
	FASTPREF_WHEEL="$(CURDIR)/$$(cat $(WHEEL))" $(BIN)/python -m pytest -q -m "slow and not gpu" -n $(WORKERS) $(PYTEST_ARGS)

trl-matrix: $(PACKAGE) ## the tests of TRL with every TRL that is covered, each installed under build/trl
	$(BIN)/python tests/trl_matrix.py $(TRL)

bench: $(BENCH) ## measure against the alternatives
	$(BIN)/python -m fastpref bench $(BENCH_ARGS)

# Absolute times: on another machine first `make bench-baseline`. A median half as long again fails.
bench-compare: $(PACKAGE) ## what a call costs beside its products, against the stored baseline
	$(BIN)/python -m pytest -q benchmarks $(OVERHEAD) --benchmark-compare \
	  --benchmark-compare-fail=median:50% $(PYTEST_ARGS)

bench-baseline: $(PACKAGE) ## store what a call costs on this machine as the baseline
	rm -rf benchmarks/baseline
	$(BIN)/python -m pytest -q benchmarks $(OVERHEAD) --benchmark-save=calls $(PYTEST_ARGS)

# Not in the virtual environment, whose torch is a CPU build. Nothing is built: without fastpref/_ops.so the kernels in
# CUDA C++ are left out (`make gpu-pack` builds it, here or on another x86-64 machine).
gpu: ## correctness and timings on the GPU here, by GPU_PYTHON with its own torch, within 8 minutes
	$(GPU) $(BENCH_ARGS)

gpu-more: ## what `make gpu` left (GPU_LEFT), within 5 minutes
	$(GPU) --more $(GPU_LEFT) $(BENCH_ARGS)

gpu-pack: $(PACKAGE) ## what `make gpu` needs beside the sources on a machine without a network, and its size
	FASTPREF_BUILD_CUDA=auto $(BIN)/python setup.py -q build_ext --inplace
	-$(PIP) install -q --no-deps --no-compile --upgrade --target $(GPU_PACK)/site \
	  liger-kernel==0.8.5 cut-cross-entropy==25.1.1
	$(BIN)/python benchmarks/pack.py $(GPU_PACK)

lint: $(DEPENDENCIES) ## formatting, ruff, mypy --strict, clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: $(DEPENDENCIES) ## rewrite the sources as `lint` wants them
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC)

wheel: $(DEPENDENCIES) ## dist/*.whl, one for each CPython from 3.10 that is installed, and the source archive
	rm -rf dist
	$(BIN)/python csrc/wheels.py dist
	$(BIN)/python setup.py -q sdist

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
	ls dist/fastpref-*.whl > $@
