# One vocabulary of commands. Each sets up what it needs in .venv; a second call reuses it.
#   make demo       train, flip, resume, compare, draw: the main job on the embedded default
#   make test       everything that must pass: lint, types, docs, notebooks, doctests, tests
#   make lint types docs bench results notebooks      one part alone
#   make native     builds the C++ kernels anew, after a change of their sources

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Frameworks run on one thread each, so that tests side by side do not fight for the cores.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_CPP_MIN_LOG_LEVEL=3

.PHONY: demo test lint types docs bench results notebooks native pytest clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The sources of the extension; when they change, it is built anew.
NATIVE := $(wildcard ckptflip/protect/native/*.cpp ckptflip/protect/native/*.h)

# A stamp names the extras that are in; it is as old as the files that say what they hold.
$(VENV)/.demo: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	@echo "Installing ckptflip with PyTorch into $(VENV); the first time takes a minute"
	$(PIP) -e '.[torch]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	@echo "Installing everything into $(VENV); the first time takes a minute or two"
	$(PIP) -e '.[test,docs]'
	@touch $@ $(VENV)/.demo

native: $(VENV)/.test
	$(BIN)/python -W ignore -c 'from setuptools import setup; setup()' --quiet build_ext --inplace

demo: $(VENV)/.demo
	$(BIN)/ckptflip demo

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

docs: $(VENV)/.test
	$(BIN)/python docs/reference.py --check
	$(BIN)/python docs/build.py site

notebooks: $(VENV)/.test
	$(THREADS) $(BIN)/python -m pytest -q tests/test_notebooks.py

bench: $(VENV)/.test
	$(BIN)/python benchmarks/inject.py
	$(BIN)/python benchmarks/formats.py
	$(BIN)/python benchmarks/callbacks.py
	$(BIN)/python benchmarks/campaign.py
	$(BIN)/python benchmarks/live.py
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/dlrm.py
	$(BIN)/python benchmarks/clipping.py
	$(BIN)/python benchmarks/clipping_recovery.py
	$(BIN)/python benchmarks/bit_protection.py
	$(BIN)/python benchmarks/seal.py
	$(BIN)/python benchmarks/abft_gemm.py
	$(BIN)/python benchmarks/intensity.py
	$(BIN)/python benchmarks/abft_bags.py

# Runs the small variants of both published studies (each some 20 minutes on two quiet cores) and the score of
# protections (some 10 minutes), and writes docs/results.md, results-recsys.md and results-protection.md.
results: $(VENV)/.test
	$(BIN)/python campaigns/cluster21.py run
	$(BIN)/python campaigns/cluster21.py write
	$(BIN)/python campaigns/terrorch.py run
	$(BIN)/python campaigns/terrorch.py write
	$(BIN)/python campaigns/protection.py run
	$(BIN)/python campaigns/protection.py write

pytest: $(VENV)/.test
	$(THREADS) $(BIN)/python -m pytest -q -n auto

test: lint types docs pytest

clean:
	rm -rf $(VENV) site demo
