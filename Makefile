# Two commands need nothing but Python 3.10 or newer and make: `make quickstart` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint base clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.installed ## Fine-tune the packaged tiny model with rsLoRA, offline, in about two minutes
	$(BIN)/rslightning fit --config recipes/quickstart.yaml

test: $(VENV)/.installed-test ## Run all tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-dev ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

base: $(VENV)/.installed ## Train the quickstart's base model anew, from generated text
	$(BIN)/python -m rslightning.assets.toy_world --output runs/toy_world
	$(BIN)/python -m rslightning.assets.toy_model --text runs/toy_world/stories_train.txt \
	    --output runs/toy_world/toy_llama
	$(BIN)/rslightning fit --config recipes/quickstart_base.yaml

clean: ## Remove the virtual environment and what tools left
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and \
	"rslightning needs Python 3.10 or newer, %s is %d.%d: make PYTHON=/path/to/python3" \
	% (sys.executable, v[0], v[1]))'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
