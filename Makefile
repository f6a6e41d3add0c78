# make demo: the whole chain in five minutes. make test: what CI runs. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO_OUT ?= runs/demo

.PHONY: demo test docs setup lint bench clean

demo: $(VENV)/.stamp-demo
	$(BIN)/graft demo --out $(DEMO_OUT) --force

test: lint
	$(BIN)/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error

# The site, in build/site: open build/site/index.html. The test suite builds it as well, with the same options.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.stamp-bench
	$(BIN)/python bench/tokenizer.py
	$(BIN)/python bench/quant.py

setup: $(VENV)/.stamp-test

$(VENV)/.stamp-demo: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	$(PIP) --editable ".[plot]"
	touch $@

$(VENV)/.stamp-test: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	$(PIP) --editable ".[test,lint,docs]"
	touch $@ $(VENV)/.stamp-demo

$(VENV)/.stamp-bench: $(VENV)/.stamp-test
	$(PIP) --editable ".[test,lint,docs,bench]"
	touch $@

# Stamps lie in the environment, so that they go with it.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 14) else f"graft needs Python 3.11 to 3.14, {sys.executable} is {v[0]}.{v[1]}; run make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
