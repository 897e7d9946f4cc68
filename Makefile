# `make demo` and `make test` are all the set-up there is: each makes .venv and installs what it needs, once.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-slow test-next test-hardware lint format clean

PYTHON ?= $(shell .ci/find-python 3.11 3.12 3.13 || .ci/find-python)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TORCH ?= torch==2.13.0
WORKERS ?= 2

help:
	@echo 'make demo       compare cache methods on the shipped model; prints where the report is'
	@echo 'make test       format check, lint, types, tests; a short smoke on a newer Python if there is one'
	@echo 'make test-slow  the tests that take minutes'
	@echo 'make test-hardware  compile kernels for TPUs and an H100 that need not be here (.venv-hardware)'
	@echo 'make format     rewrite the code the way the format check wants it'
	@echo 'make clean      remove the environments and caches that these commands made'

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo 'kvjax needs Python 3.11 or newer with the venv module (Debian: apt install python3-venv).' >&2; exit 1; }
	@echo "making .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo 'installing kvjax into .venv (downloads on the first run)'
	@$(PIP) --editable .
	@touch $@

.venv/.installed-test: pyproject.toml constraints.txt | .venv/.installed
	@echo 'installing what the tests need into .venv'
	@$(PIP) --editable '.[test]'
	@touch $@

.venv/.installed-hf: pyproject.toml constraints.txt | .venv/.installed-test
	@echo 'installing torch and transformers into .venv'
	@$(PIP) --editable '.[test,hf]' '$(TORCH)'
	@touch $@

demo: .venv/.installed
	@$(BIN)/kvjax demo

lint: .venv/.installed-test
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/basedpyright --warnings

test-fast: .venv/.installed-test
	@$(BIN)/python -m pytest -m 'not slow' --numprocesses $(WORKERS) --dist loadfile

test-slow: .venv/.installed-test
	@$(BIN)/python -m pytest -m slow

test-next: .venv/.installed-test
	@.ci/next

test-hardware:
	@.ci/hardware

test:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test-next
	@$(MAKE) --no-print-directory test-fast

format: .venv/.installed-test
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-next .venv-hardware .jax_cache .pytest_cache .ruff_cache .hypothesis
