# make demo: one photo in, that person in many styles out; make test, make lint: what the checks run;
# make golden: write tests/golden again.
# Everything happens in .venv, made on first use from pyproject.toml and constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
JOBS ?= 2
VENV := .venv
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test golden lint clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

demo: $(READY) ## personalise a rendered person and a real photo; prints where the pictures are
	$(VENV)/bin/hyperdb demo

test: $(READY) ## run the tests
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) $(ARGS)

golden: $(READY) ## write the figures of tests/golden from what the code does now
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -k golden --write-golden

lint: $(READY) ## ruff, mypy and the layers of imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

clean: ## remove the environment and the caches (not runs/, not data/)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis multirun

$(READY): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
