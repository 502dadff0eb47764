# Settings such as EVERGREEN_HOME and the ports (see `evergreen --help`) can be given as environment or make
# variables: `make up EVERGREEN_DAGSTER_PORT=3010`.
.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCKS := requirements.lock requirements-dev.lock
EVERGREEN_HOME ?= .evergreen
CPU_COUNT := $(shell getconf _NPROCESSORS_ONLN)
# The first interpreter that is new enough; override with `make setup PYTHON=...`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

.PHONY: setup
setup: $(STAMP)  ## create .venv from the lock, if the lock changed

$(VENV)/.locked: $(LOCKS)
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no Python 3.11 or newer found; install one, or name it: make setup PYTHON=/path/to/python" >&2; \
		exit 1; fi
	rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { \
		echo "error: $(PYTHON) can't make virtual environments (on Debian: apt-get install python3-venv)" >&2; \
		rm -rf $(VENV); exit 1; }
	@echo "installing what $(LOCKS) list; this takes some minutes"
	@$(BIN)/pip install -qq $(addprefix -r ,$(LOCKS))
	@touch $@

$(STAMP): $(VENV)/.locked pyproject.toml
	@$(BIN)/pip install -qq --no-deps --editable .
	@touch $@

.PHONY: lock
lock:  ## pin the newest versions that pyproject.toml allows, from a fresh environment
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	@for group in project.dependencies dependency-groups.dev; do \
		build/lock/bin/python -c 'import functools, sys, tomllib; \
			print(*functools.reduce(dict.get, sys.argv[1].split("."), tomllib.load(open("pyproject.toml", "rb"))), sep="\n")' \
			$$group > build/lock/$$group.txt || exit 1; done
	build/lock/bin/pip install -qq --upgrade pip
	build/lock/bin/pip install -qq -r build/lock/project.dependencies.txt
	build/lock/bin/pip freeze --all | sed 's/+cpu$$//' | grep -viE '^(nvidia|cuda|triton)' > requirements.lock
	build/lock/bin/pip install -qq -r build/lock/dependency-groups.dev.txt -c requirements.lock
	build/lock/bin/pip freeze --all | sed 's/+cpu$$//' | grep -viE '^(nvidia|cuda|triton)' | \
		grep -vxFf requirements.lock > requirements-dev.lock
	rm -rf build/lock

.PHONY: demo
demo: setup  ## set up, run the main job on the demo customizations, serve the result
	@$(BIN)/evergreen demo

# A deployment of its own, so that the demonstration's years do not mix with the customizations of this project:
# nor do they when this one keeps its state elsewhere.
OWN_STATE := env $(foreach name,ARTIFACTS_URL LEDGER_URL TRAFFIC_URL MLFLOW_URI,-u EVERGREEN_$(name))
DRIFT_HOME ?= $(EVERGREEN_HOME)/demo-drift-home
.PHONY: demo-drift
demo-drift: setup  ## replay a product's history: drift, decisions, updates, with nobody touching it
	@$(OWN_STATE) EVERGREEN_HOME=$(DRIFT_HOME) $(BIN)/python -m examples.home_commands.history.replay

MIGRATION_HOME ?= $(EVERGREEN_HOME)/demo-migration-home
.PHONY: demo-migration
demo-migration: setup  ## a new revision of the base arrives: everything moves to it, with nobody touching it
	@$(OWN_STATE) EVERGREEN_HOME=$(MIGRATION_HOME) $(BIN)/python -m examples.base_revisions.migration.run

.PHONY: up down status
up: setup  ## start Dagster, MLflow and the gateway in the background
	@$(BIN)/evergreen up
down: setup  ## end them
	@$(BIN)/evergreen down
status: setup  ## say what runs and answers
	@$(BIN)/evergreen status

.PHONY: test test-fast test-slow
test: test-fast test-slow  ## all tests; more options for pytest in PYTEST_ARGS
test-fast: setup  ## those that take seconds
	$(BIN)/pytest -m 'not slow' -n $(CPU_COUNT) $(PYTEST_ARGS)
test-slow: setup  ## those with the real base model, a browser or server processes
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

.PHONY: lint
lint: setup  ## ruff, pyright, and Dagster's own check of the definitions
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/dg check toml
	$(BIN)/dg check defs

# The programs that benchmarks/ compares with. vLLM's wheel brings packages built for another torch.
PEER ?= trl vllm llama drift
.PHONY: peers
peers:  ## virtual environments of what the benchmarks compare with; one of them with PEER=name
	@for name in $(PEER); do \
		echo "installing $$name"; \
		$(PYTHON) -m venv $(EVERGREEN_HOME)/peers/$$name && \
		$(EVERGREEN_HOME)/peers/$$name/bin/pip install -qq -r benchmarks/peers/$$name.txt && \
		$(EVERGREEN_HOME)/peers/$$name/bin/pip uninstall -qq -y torchvision torchaudio torchcodec || exit 1; done

.PHONY: clean
clean:  ## remove .venv and caches; the data directory stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
