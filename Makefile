# Every target makes its own environment (.venv) the first time. To use another one, activate it or say
# PYTHON=/path/to/python; it is then taken as it is.
#
#   make bench BENCH_ARGS="--quick"     make test TEST_ARGS="tests/mask -x"     make TORCH="torch==2.11.0" test

SHELL := /bin/bash
BASE_PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
BENCH_ARGS ?=
TEST_ARGS ?=

ifdef PYTHON
  PY := $(PYTHON)
else ifdef VIRTUAL_ENV
  PY := $(VIRTUAL_ENV)/bin/python
else
  PY := .venv/bin/python
  ENVIRONMENT := .venv/.made
endif

# the sources in front, so that an environment without an installed copy works too
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# on a Mac or Windows there is no triton; nothing but its kernel tests needs it
REQUIREMENTS := .ci/requirements.txt

.PHONY: help bench test test-slow lint docs gpu
help:
	@sed -n '1,5s/^# \{0,1\}//p' Makefile
	@echo "targets: bench test test-slow lint docs gpu"

bench: $(ENVIRONMENT)
	$(PY) -m manyheads bench $(BENCH_ARGS)

test: $(ENVIRONMENT)
	$(ONE_THREAD) $(PY) -m pytest -q -n $(WORKERS) -m "not slow and not gpu" $(TEST_ARGS)

test-slow: $(ENVIRONMENT)
	$(ONE_THREAD) $(PY) -m pytest -q -n $(WORKERS) -m "slow and not gpu" $(TEST_ARGS)

lint: $(ENVIRONMENT)
	$(PY) -m ruff check .
	$(PY) -m mypy

docs: $(ENVIRONMENT)
	$(PY) docs/build.py

# on a machine with a GPU, in the environment that has its torch: `make gpu PYTHON=python3`
gpu: $(ENVIRONMENT)
	$(PY) -m pytest -q --device cuda -p no:cacheprovider tests/conformance tests/engine tests/gpu $(TEST_ARGS)
	$(PY) -m manyheads bench --device cuda $(BENCH_ARGS)

# torch first: a package that asks for "any torch" must find this one in place
.venv/.made: $(REQUIREMENTS) pyproject.toml
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "manyheads needs Python 3.11 or newer; say BASE_PYTHON=...")'
	test -x .venv/bin/python || $(BASE_PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet "$(TORCH)"
	.venv/bin/python -m pip install --quiet --requirement <(sed 's/^torch==.*/$(TORCH)/' $(REQUIREMENTS))
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
