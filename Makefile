# Every target sets up what it needs in .venv; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo testbed test lint format bench hub clean

demo: $(VENV)/ready
	$(BIN)/esmerge demo -o demo

# Hours on a few cores; what is done is kept, so it can be interrupted.
testbed: $(VENV)/ready
	$(BIN)/python -m benchmarks.testbed.study

test: $(VENV)/ready
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A Hub to try things on, until Ctrl-C; its first line says what to export.
hub: $(VENV)/ready
	$(BIN)/python tests/hub_server.py

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.speed.coefficients

# torch comes first and by itself: pinned to a release whose CPU build is small where one is offered.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "esmerge needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,testbed]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
