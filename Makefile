# The interface of the checkout. `make help` lists the targets.
#   PYTHON=...         the interpreter to build the environment from (3.11 or 3.12)
#   CLIPYARD_VENV=...  where the environment is (default .venv)
#   ARGS=...           further arguments for pytest or the demo

.DEFAULT_GOAL := help

VENV := $(or $(CLIPYARD_VENV),.venv)
RUN := $(VENV)/bin/python
BASE := $(VENV)/.clipyard-base
FULL := $(VENV)/.clipyard-test
PINS := pyproject.toml .ci/constraints.txt

# Running is the test: a shim or an alias may exist without the version behind it.
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1 && echo $$p && break; done)

.PHONY: help demo test quick check torture parity bench clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(BASE) ## draw a data set, train a small CLIP on it, evaluate it zero-shot
	@$(RUN) -m scripts.demo $(ARGS)

# Much of a test is waiting for processes. A file stays with one worker: its fixtures are made once.
test: $(FULL) ## all tests but torture, bench and the slow ones of parity
	@$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not torture and not bench and not (parity and slow)" $(ARGS)

quick: $(FULL) ## the tests that take seconds
	@$(RUN) -m pytest -q -m "not slow and not torture and not bench" $(ARGS)

check: $(FULL) ## format, lint, types, quick tests
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	@$(MAKE) --no-print-directory quick

torture: $(FULL) ## kills and faults, for a long time (KILLS=1000)
	@$(RUN) -m pytest -m torture $(ARGS)

parity: $(FULL) ## the same numbers as OpenCLIP
	@$(RUN) -m pytest -m parity $(ARGS)

bench: $(FULL) ## measurements
	@$(RUN) -m pytest -m bench -s $(ARGS)

clean: ## remove the environment and the caches; runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,requirement): pip warnings are hidden, errors are not; the stamp is written only after success.
define install
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 with venv found; name one: make PYTHON=/path/to/python3.12 (Debian and Ubuntu also need the package python3-venv)" >&2; exit 2; }
	@echo "Installing the pinned packages into $(VENV) with $(PYTHON): once, some gigabytes, 2 to 15 minutes ..."
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install -qq --no-input --disable-pip-version-check -c .ci/constraints.txt -e '$(1)'
endef

$(BASE): $(PINS)
	$(call install,.)
	@touch $@

$(FULL): $(PINS)
	$(call install,.[test])
	@touch $(BASE) $@
