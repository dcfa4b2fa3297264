# `make` lists the targets. They need python3 (3.11 or newer), git and make.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
INSTALLED := .venv/.installed
PEERS := .venv/.peers
BENCHMARKS := pixels resize_stage training startup whole memory scale serving

.PHONY: help run test check bench drill up clean lock

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

run: $(INSTALLED) ## install, run the pipeline, show the result and where to look
	@dvc repro
	@echo
	@dvc metrics show
	@echo
	@echo 'Report      reports/report.html'
	@echo 'MLflow      http://127.0.0.1:5000  and'
	@echo 'Prefect     http://127.0.0.1:4200  once `make up` runs'

test: check ## check, then run the tests
	@# In the order of the names: the slow files, of few tests each, would else all come last.
	@pytest -n auto --dist loadfile --no-loadscope-reorder

check: $(INSTALLED) ## format, lint, types, imports
	@ruff format --check .
	@ruff check .
	@mypy
	@lint-imports

bench: $(PEERS) ## measure side by side with the peers, about 20 minutes; see benchmarks/README.md
	@for name in $(BENCHMARKS); do python -m benchmarks.$$name; done

drill: $(INSTALLED) ## practise faults and print what was seen of each
	@python -m benchmarks.drills

up: $(INSTALLED) ## start MLflow, Prefect and a worker for its runs; Ctrl-C stops them
	@cnnpipe up

clean: ## remove the virtual environment and the caches of the tools, not data or results
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

lock: ## resolve pyproject.toml anew into requirements.lock
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install -qq --disable-pip-version-check --editable '.[dev]'
	sed -i '/^[^#]/d' requirements.lock
	sed -i '/^[^#]/d' requirements-bench.lock
	.venv-lock/bin/pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu$$//; /^nvidia/d; /^triton/d; /^cuda/d' >> requirements.lock
	.venv-lock/bin/pip install -qq --disable-pip-version-check --constraint requirements.lock --editable '.[bench]'
	.venv-lock/bin/pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu$$//; /^nvidia/d; /^triton/d; /^cuda/d' | grep -vxFf requirements.lock >> requirements-bench.lock
	rm -rf .venv-lock

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, %s is %s: make PYTHON=..." % (sys.executable, sys.version.split()[0]))'
	@echo 'Installing into .venv, two to four minutes, once.'
	@$(PYTHON) -m venv --clear .venv
	@.venv/bin/pip install -qq --disable-pip-version-check --requirement requirements.lock
	@.venv/bin/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
	@touch $@

$(PEERS): $(INSTALLED) requirements-bench.lock
	@echo 'Installing what is compared with, about a minute, once.'
	@.venv/bin/pip install -qq --disable-pip-version-check --no-deps --requirement requirements-bench.lock
	@touch $@
