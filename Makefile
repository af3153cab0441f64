# Each target sets a fresh machine up first; once set up, that costs nothing.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2

PY := $(VENV)/bin/python
READY := $(VENV)/.mstc-ready

.PHONY: demo test lint bench gpu setup browser pictures clean

demo: setup
	$(PY) -m mstc.cli.main demo $(ARGS)

test: lint browser
	$(PY) -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist worksteal $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy -p mstc

bench: setup
	$(PY) -m mstc.cli.main bench $(ARGS)

gpu: setup
	$(PY) tests/gpu/run.py $(ARGS)

# The pictures in docs/pictures, made by the page itself.
pictures: setup browser
	$(PY) tests/support/pictures.py

setup: $(READY)

# The page of `mstc dump` is tested in a real browser; where none can be had, its tests say so and are skipped.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	  sudo=; test "$$(id -u)" = 0 || sudo="sudo -n"; export DEBIAN_FRONTEND=noninteractive; \
	  $$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	  || echo "no browser could be installed: the tests of the page will be skipped"

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
