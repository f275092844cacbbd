# Two commands: `make book` builds the book, `make test` tests everything. Each sets up .venv first.
# Windows, or no make? The README gives the plain pip commands.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
OUT    := _build/html

.PHONY: help book test weights lab refresh lint pdf clean
help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --upgrade pip

# One stamp for each set of extras, remade when the project's needs change.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@

book: $(VENV)/.book  ## build the book into _build/html
	rm -rf _build
	$(BIN)/jupyter-book build . -W -n --keep-going
	@echo "open $(OUT)/index.html"

weights: $(VENV)/.book  ## download SmolLM2-135M into the user's cache (93 MB, once)
	$(BIN)/minilm fetch smollm2-135m

test: $(VENV)/.book $(VENV)/.test weights  ## test the package, the notebooks, the exercises and the built book
	$(BIN)/python tools/run_tests.py $(ARGS)

lab: $(VENV)/.book weights  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab chapters

refresh: $(VENV)/.test  ## bring notebooks, ledger and exercises up to date with the package
	$(BIN)/python tools/sync_code.py --write
	$(BIN)/python tools/refresh.py $(NB)
	$(BIN)/python tools/student.py --write
	$(BIN)/python tools/ledger.py --write

lint: $(VENV)/.test  ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

pdf: $(VENV)/.book $(VENV)/.test  ## print the book to _build/minilm.pdf (needs Chromium)
	$(BIN)/python tools/pdf.py

clean:  ## remove what was built; .venv stays
	rm -rf _build build dist
