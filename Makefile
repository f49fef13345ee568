# Everything runs in .venv, which `make` creates and keeps up to date with pyproject.toml and the constraints.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-lowest style lint clean

quickstart: $(VENV)/installed
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest $(ARGS)

# The lowest supported versions. Downloads a few gigabytes.
test-lowest: $(VENV)-lowest/installed
	$(VENV)-lowest/bin/python -m pytest $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable .
	touch $@

$(VENV)-lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --group dev --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest quickstart-output dist .pytest_cache .ruff_cache
