# Everything a contributor types. A machine needs python3 (3.11 to 3.13) with venv, and make.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
UV     := $(shell command -v uv 2>/dev/null)
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# The demo and its shortened form, which the checks run.
DEMO       = $(BIN)/python train.py configs/digits.py --workdir out/demo
DEMO_SHORT = $(BIN)/python train.py configs/digits.py --workdir out/demo-short --dry-run

.DEFAULT_GOAL := help
.PHONY: help setup test demo demo-short lint types snippets clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## install the package and its tools into .venv (PYTHON=python3.12 picks another one)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	    f"Python 3.11 to 3.13 is needed, {sys.executable} is %d.%d; try: make setup PYTHON=python3.12" % v)'
ifeq ($(UV),)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -q -c constraints.txt -e '.[dev]'
else
	@test -x $(BIN)/python || $(UV) venv -q --python $(PYTHON) $(VENV)
	@$(UV) pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev]'
endif
	@touch $@

test: $(STAMP) ## the fast tests, on CPU (the slow ones too: make test ARGS="-m ''")
	@JAX_PLATFORMS=cpu $(BIN)/python -m pytest $(ARGS)

demo: $(STAMP) ## train, evaluate and use a small model of the built-in digits world, on CPU
	JAX_PLATFORMS=cpu $(DEMO)

demo-short: $(STAMP) ## the same with a few steps only
	JAX_PLATFORMS=cpu $(DEMO_SHORT)

lint: $(STAMP) ## style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP) ## static types
	@$(BIN)/pyright --pythonpath $(BIN)/python

snippets: $(STAMP) ## run the commands and examples of README.md and docs/
	@JAX_PLATFORMS=cpu $(BIN)/python tests/readme_snippets.py

clean: ## remove build products and caches; keeps .venv and out/
	@rm -rf .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
