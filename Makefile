# Each target sets a fresh machine up first; once set up, that costs nothing.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

PY := $(VENV)/bin/python
READY := $(VENV)/.mstc-ready

.PHONY: demo test lint bench gpu setup clean

demo: setup
	$(PY) -m mstc.cli.main demo $(ARGS)

test: lint
	$(PY) -m pytest -m "not slow and not gpu" $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy -p mstc

bench: setup
	$(PY) -m mstc.cli.main bench $(ARGS)

gpu: setup
	$(PY) tests/gpu/run.py $(ARGS)

setup: $(READY)

# torch comes first and by itself, so that no other package's needs choose its build.
$(READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found; give one by PYTHON=..." >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mstc needs Python 3.11 or later; give one by PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install --quiet '$(TORCH)'
	$(PY) -m pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf build dist *.egg-info demo_output bench_output
