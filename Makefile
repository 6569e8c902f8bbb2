# make setup | demo | lint | types | test | bench | soak
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
# TORCH=cpu takes PyTorch's own CPU index: a small build, for machines without a GPU.
TORCH  ?=
INDEX  := $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu,)

.PHONY: setup demo lint types unit test bench soak

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(INDEX) -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet $(INDEX) -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/streamlstm demo

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/pyright

unit: setup
	$(BIN)/python -m pytest -m 'not soak'

test: lint types unit

bench: setup
	$(BIN)/python bench/engine.py
	$(BIN)/python bench/read.py
	$(BIN)/python bench/decode.py
	$(BIN)/python bench/encode.py
	$(BIN)/python bench/help.py
	$(BIN)/python bench/accuracy.py

soak: setup
	$(BIN)/python -m pytest -m soak --timeout 7200
