# make demo: the whole chain in five minutes. make test: what CI runs. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO_OUT ?= runs/demo

.PHONY: demo test setup lint bench clean

demo: .stamp-demo
	$(BIN)/graft demo --out $(DEMO_OUT) --force

test: lint
	$(BIN)/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error

bench: .stamp-bench
	$(BIN)/python bench/tokenizer.py
	$(BIN)/python bench/quant.py

setup: .stamp-test

.stamp-demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	touch $@

.stamp-test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[test,lint]"
	touch $@ .stamp-demo

.stamp-bench: .stamp-test
	$(PIP) --editable ".[test,lint,bench]"
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"graft needs Python 3.11 or 3.12, {sys.executable} is {v[0]}.{v[1]}; run make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .stamp-* runs build dist *.egg-info
