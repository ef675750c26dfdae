PYTHON ?= python3
BIN := .venv/bin
# An editable install, so that the tests see the working tree; every version comes from constraints.txt.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test test-peft check pytest docs wheel-check clean

demo: .venv/installed
	$(BIN)/spectralbasis quickstart --output quickstart

# Side by side, for mypy takes one core.
test: .venv/installed-dev
	$(MAKE) --jobs=2 check pytest

pytest: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadgroup

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

.venv/created:
	$(PYTHON) -m venv .venv
	touch $@

.venv/installed: .venv/created pyproject.toml constraints.txt
	$(INSTALL) .
	touch $@

.venv/installed-dev: .venv/created pyproject.toml constraints.txt
	$(INSTALL) '.[baselines,dev,diagnostics,images,integrations,minilm,ray,sentencepiece]'
	touch $@ .venv/installed

.venv/installed-docs: .venv/created pyproject.toml constraints.txt
	$(INSTALL) '.[docs]'
	touch $@ .venv/installed

clean:
	rm -rf .venv quickstart build dist site
