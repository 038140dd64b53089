# Every target first makes .venv from the lock file, and does nothing there when it is current.

PYTHON ?= python3
WORKDIR ?= runs/quickstart
DATA ?=
PYTEST_FLAGS ?=
TEST_WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK := requirements/cpu.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test slow lint parity seqio libtpu verifiers eval browser mutate golden lock clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

quickstart: $(STAMP) ## the main job on real text, offline, in minutes (DATA='glob' for your own text)
	@$(BIN)/jaxrl-pt quickstart --workdir '$(WORKDIR)' $(if $(DATA),--data '$(DATA)')

test: $(STAMP) ## all tests but the slow ones; those against PyTorch and seqio if installed
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -m 'not slow' $(PYTEST_FLAGS)

slow: $(STAMP) ## the tests that take a minute or more each
	@$(BIN)/python -m pytest -m slow $(PYTEST_FLAGS)

lint: $(STAMP) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

parity: $(STAMP) ## adds PyTorch, transformers and TRL, the references of the parity tests
	@$(BIN)/python -m pip install -qq -r requirements/parity.txt -c $(LOCK)

seqio: $(STAMP) ## adds seqio (with TensorFlow), for the tests of its tasks
	@$(BIN)/python -m pip install -qq -r requirements/seqio.txt -c $(LOCK)

libtpu: $(STAMP) ## adds the TPU compiler, for `jaxrl-pt preflight` and `kernels` and their tests
	@$(BIN)/python -m pip install -qq -r requirements/libtpu.txt -c $(LOCK)

verifiers: $(STAMP) ## adds sympy, reasoning-gym and textarena, for their verifiers, games and tests
	@$(BIN)/python -m pip install -qq -r requirements/verifiers.txt -c $(LOCK)

eval: $(STAMP) ## adds lm-eval, for `jaxrl-pt eval --tasks` and its tests
	@$(BIN)/python -m pip install -qq -r requirements/eval.txt -c $(LOCK)

browser: $(STAMP) ## adds playwright, and Debian's Chromium where there is none, for tests of the page of play
	@$(BIN)/python -m pip install -qq -r requirements/browser.txt -c $(LOCK)
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	  { echo 'Chromium is missing: install it, or run this as root where there is apt-get.'; exit 2; }

mutate: $(STAMP) ## makes deliberate mistakes one by one and runs the nearest tests: an hour or more
	@$(BIN)/python tools/mutate.py

golden: $(STAMP) ## rewrites what the shipped run files resolve to (tests/golden)
	@$(BIN)/python -m tests.golden.regenerate

lock: ## renews the lock file (needs uv)
	uv pip compile setup.cfg --extra dev --universal --python-version 3.11 --upgrade \
	  --no-emit-index-url --no-header --quiet -o $(LOCK)

clean: ## removes .venv, caches and build products; keeps runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find jaxrl_pt tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): $(LOCK) setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or later is needed: make PYTHON=python3.12 …'; exit 2; }
	@echo 'Making $(VENV) from $(LOCK)'
	@if command -v uv >/dev/null 2>&1; then \
	  { test -x $(BIN)/python || uv venv --quiet --seed --python $(PYTHON) $(VENV); } && \
	  uv pip install --quiet --python $(BIN)/python -r $(LOCK) && \
	  uv pip install --quiet --python $(BIN)/python --no-deps -e .; \
	else \
	  { test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV); } && \
	  $(BIN)/python -m pip install -qq -r $(LOCK) && \
	  $(BIN)/python -m pip install -qq --no-deps -e .; \
	fi
	@touch $(STAMP)
