# `make quickstart` and `make test` do all the set-up a fresh machine needs.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: quickstart test check docs photos clean

$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

quickstart: $(STAMP)
	recipes/quickstart.sh

test: $(STAMP)
	$(VENV)/bin/pytest

check: $(STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright

docs: $(STAMP)
	$(VENV)/bin/mkdocs build --strict

photos: $(STAMP)
	recipes/photos.sh

clean:
	rm -rf $(VENV)
