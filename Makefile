PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVE_ARGS ?=
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/native/*)

CLIENTS := $(patsubst tests/clients/%/requirements.txt,%,$(wildcard tests/clients/*/requirements.txt))

.PHONY: serve test docs promise torture clients ranks emulated lint clean

serve: $(VENV)/.serve
	$(BIN)/orcaserve serve $(SERVE_ARGS)

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The documentation site, into build/site: no broken link, no warning, nothing from elsewhere.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --clean --quiet
	@echo build/site/index.html

# The promise on a thousand requests of each kind; `make test` has 24 or fewer.
promise: $(VENV)/.test
	$(BIN)/python -m pytest tests/e2e/test_promise.py --promised 1000 -s

# The reliability scorecard at full size: hours. TORTURE="--rows R1,R7 --scale short" for less.
torture: $(VENV)/.test
	PYTHONPATH=tests $(BIN)/python -m torture $(TORTURE)

# Other people's clients and suites against a running server: downloads gigabytes, then takes minutes. Needs npm.
# CLIENT="langchain npm" for less.
clients: $(VENV)/.test $(patsubst %,build/clients/%/.made,$(filter-out bench,$(or $(CLIENT),$(CLIENTS) npm)))
	PYTHONPATH=tests $(BIN)/python -m clients $(CLIENT)

build/clients/npm/.made: tests/clients/npm/package.json
	mkdir -p $(@D)
	cp $< $(@D)
	cd $(@D) && npm install --no-audit --no-fund --no-package-lock
	touch $@

build/clients/%/.made: tests/clients/%/requirements.txt constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -c constraints.txt -r $<
	touch $@

# Every tensor- and pipeline-parallel size up to 4 x 4; `make test` has some.
ranks: $(VENV)/.test
	$(BIN)/python -m pytest tests/parallel/test_ranks.py --whole-grid

# Processors without AVX-512, emulated; needs QEMU (apt-get install qemu-user). And the tiles of AMX, in a module that is
# built for it.
emulated: $(VENV)/.test
	$(BIN)/python -m pip install --quiet nanobind cmake
	$(BIN)/python -m pytest tests/e2e/test_without_avx512.py tests/ops/test_emulated_amx.py -m emulated -rs

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "OrcaServe needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# pip compiles on one core what it installs. A server imports a fifth of it, and the rest would be 150 MB on disk.
IMPORTED = orcaserve.serve.server, orcaserve.serve.engine_process, orcaserve.executors.local, orcaserve.executors.rank
# Tests use it all; a file that is no Python 3 is none of ours.
COMPILE = $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib >/dev/null 2>&1 || true

$(VENV)/.serve: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e .
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'import $(IMPORTED)'
	touch $@

$(VENV)/.test: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[test]'
	$(COMPILE)
	touch $@

$(VENV)/.docs: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build
