# Two commands a newcomer needs: `make demo` and `make test`. Each sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types contracts format

demo: .venv/installed
	$(BIN)/loraplex demo

# Several processes of several threads share the cores here: a thread that spins at a barrier would keep off the one it
# waits for.
test: .venv/installed-test lint types contracts
	GOMP_SPINCOUNT=0 $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-test
	$(BIN)/mypy -p loraplex
	$(BIN)/mypy tests bench

contracts: .venv/installed-test
	PYTHONPATH=.src $(BIN)/lint-imports

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv .venv

# What an install compiles. Python's own files are used where they lie.
KERNELS := $(wildcard kernels/*.[ch] kernels/*/*.[ch])

.venv/installed: .venv/bin/python pyproject.toml $(KERNELS)
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-test: .venv/bin/python pyproject.toml $(KERNELS)
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@ .venv/installed
