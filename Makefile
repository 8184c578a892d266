VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadgroup $(if $(COVERAGE),--cov)

.PHONY: demo test checks tests test-slow test-gpu format hooks

demo: $(VENV)/.installed
	$(BIN)/ptqd demo

test: checks tests

checks: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

tests: $(VENV)/.installed-dev
	$(TESTS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.installed-dev
	PTQD_TEST_GPU=1 $(BIN)/python -m pytest -m gpu

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

hooks: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet -c constraints.txt pre-commit
	$(BIN)/pre-commit install

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[report,engines]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
