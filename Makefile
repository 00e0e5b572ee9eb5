# Every target makes what it needs: `make demo` and `make test` work on a fresh clone with only
# git, make and Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.complete

.PHONY: env demo test lint docs pytest clean

env: $(STAMP)

# torch comes first and by version: left to a resolver it may bring gigabytes for a GPU that is
# not there. torchdyn's metadata asks for packages that break the environment, so it and torchsde
# are installed without them; what they really import follows from the dopri5 extra. scgpt, which
# only the test of equality reads, cannot even be imported with what its metadata ask for.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cfgen-augment needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	$(PIP) torch==2.13.0
	$(PIP) --no-deps torchdyn==1.0.6 torchsde==0.2.6 scgpt==0.2.4
	$(PIP) --editable ".[anndata,dopri5,benchmarks]" --group dev
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m benchmarks.demo --output demo_output

test: $(STAMP) lint docs pytest

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs docs/_build/html

# One thread: the networks of tests are too small for two, which wait for each other, and by
# spinning, where cores have other work. On a busy machine that is minutes instead of seconds.
pytest: $(STAMP)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

clean:
	rm -rf $(VENV) docs/_build docs/api/generated demo_output
