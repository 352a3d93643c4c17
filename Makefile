# Every target works from a bare machine with Python 3.10+: the first one used makes .venv, and nothing is installed again until
# setup.py, settings.ini or pyproject.toml change. PYTHON picks the interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
JOBS   ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -lt 4 ] && echo $$n || echo 4)
BIN    := .venv/bin
STAMP  := .venv/.installed
PLAIN  := .venv/.plain
OLDEST := .venv/oldest

.PHONY: help demo lint quick test test-oldest fuzz docs preview bench clean
help:
	@echo 'make demo   train on the phantom, from command line to report.html (ARGS="--data FOLDER" for real clips)'
	@echo 'make quick  lint, the fast tests, and whether modules are what their notebooks export: within three minutes'
	@echo 'make test   every test: tests/ and every notebook, executed in a fresh kernel (ARGS="-k folds" for some)'
	@echo 'make test-oldest  the fast tests with the oldest release of every library that settings.ini allows'
	@echo 'make fuzz   10,000 damaged files for each kind of file that is read, counted by outcome (ARGS="mask" for one)'
	@echo 'make docs   README.md and the site: derived, checked, and rendered where the quarto program is installed'
	@echo 'make preview  every page as HTML without quarto, looked at by a browser (ARGS="core.ipynb" for some)'
	@echo 'make bench  every measurement of benchmarks/, one after another'
	@echo 'make clean  remove what was built, .venv included'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	 { echo "lus_fastai needs Python 3.10 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "No virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(PLAIN): setup.py settings.ini pyproject.toml | $(BIN)/python
	@echo 'installing lus_fastai into .venv (once; a few minutes)'
	@$(BIN)/python -m pip install --disable-pip-version-check -e .
	@touch $@

$(STAMP): setup.py settings.ini pyproject.toml | $(BIN)/python
	@echo 'installing lus_fastai and its development requirements into .venv (once; a few minutes)'
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@ $(PLAIN)

demo: $(PLAIN)
	@$(BIN)/lus_demo $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check --quiet .

quick: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:cacheprovider -n $(JOBS) --dist worksteal -m 'not slow and not paper' tests $(ARGS)

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:cacheprovider -n $(JOBS) --dist worksteal --durations=15 tests $(ARGS)

# uv resolves to the lower bounds of settings.ini, those of [onnx] too; test tools come afterwards and leave all of these as they are
$(OLDEST)/.installed: setup.py settings.ini pyproject.toml | $(BIN)/python
	@$(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet --upgrade uv setuptools
	@$(OLDEST)/bin/uv pip install --compile-bytecode --python $(OLDEST)/bin/python --resolution lowest-direct -e '.[onnx]'
	@$(OLDEST)/bin/uv pip freeze --python $(OLDEST)/bin/python --exclude-editable > $(OLDEST)/versions.txt
	@$(OLDEST)/bin/uv pip install --compile-bytecode --python $(OLDEST)/bin/python --constraint $(OLDEST)/versions.txt -e '.[dev]'
	@touch $@

test-oldest: $(OLDEST)/.installed
	@OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -p no:cacheprovider -n $(JOBS) --dist worksteal -m 'not slow and not paper' tests $(ARGS)

fuzz: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/harness.py $(ARGS)

docs: $(STAMP)
	@$(BIN)/python tools/docs.py all

preview: $(STAMP)
	@$(BIN)/python tools/docs.py preview $(ARGS)

bench: $(STAMP)
	@set -e; for f in benchmarks/bench_*.py; do $(BIN)/python $$f; done

clean:
	rm -rf .venv .plain build dist *.egg-info _docs _preview _proc nbs/results .pytest_cache .hypothesis
	rm -f nbs/_quarto.yml nbs/nbdev.yml nbs/sidebar.yml nbs/styles.css nbs/words.lua nbs/references.bib
	rm -f nbs/api.qmd nbs/notebooks.qmd nbs/references.qmd nbs/results.qmd
	find lus_fastai tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
