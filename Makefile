# The commands of this project.  `make setup` first; the rest uses its virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test soak check errors bench clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install -q -e '.[dev]' -c constraints.txt
	$(BIN)/dist-lm ops build
	touch $@

demo: setup
	$(BIN)/dist-lm demo --out demo

test: setup
	$(BIN)/python -m pytest

# Random faults for MINUTES, and every crash point and signal under every launcher.
MINUTES ?= 20
soak: setup
	DIST_LM_SOAK_MINUTES=$(MINUTES) $(BIN)/python -m pytest -m soak

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m fast

# docs/errors.md, from the classes of errors.
errors: setup
	$(BIN)/python docs/make_errors.py

bench: setup
	$(BIN)/python bench/step.py
	$(BIN)/python bench/data.py

clean:
	rm -rf demo $(VENV)
