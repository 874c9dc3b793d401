# SPDX-License-Identifier: GPL-2.0-or-later

# The first of these that is Python 3.11 or later makes .venv; choose with `make PYTHON=... demo`.
PYTHON := python3 python3.11 python3.12 python3.13

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CHECKS := ruff-check ruff-format mypy pytest

.PHONY: help demo test $(CHECKS) test-slow real selftests bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       the main job on the built-in fixtures, in seconds"
	@echo "make test       ruff, mypy --strict and pytest; the first failure stops"
	@echo "make test-slow  all of pytest, with what takes long"
	@echo "make real       fetch the stock Debian kernel that tests/real/ needs and build the kernel's livepatch modules,"
	@echo "                in a cache outside the tree"
	@echo "make selftests  the kernel's own livepatch selftests on an emulated kernel; needs root and FUSE"
	@echo "make bench      the benchmarks, as ratios; as JSON with ARGS=--json"
	@echo "make clean      remove .venv and what the tools left; the kernel in the cache stays"
	@echo
	@echo "All but clean set up .venv first, which needs Python 3.11 and the package registry, nothing else."

demo: .venv/.installed
	@$(BIN)/klpemu demo

# One after the other also under -j: what is reported is the first failure.
test: .venv/.installed-test
	@for check in $(CHECKS); do $(MAKE) --no-print-directory $$check || exit 1; done
	@echo "== all of it passed: $(CHECKS)"

ruff-check: .venv/.installed-test
	@echo "== ruff check"
	@$(BIN)/ruff check

ruff-format: .venv/.installed-test
	@echo "== ruff format --check"
	@$(BIN)/ruff format --check

mypy: .venv/.installed-test
	@echo "== mypy --strict"
	@$(BIN)/mypy

pytest: .venv/.installed-test
	@echo "== pytest, without the slow tests"
	@$(BIN)/pytest -m "not slow" -n auto

test-slow: .venv/.installed-test
	@echo "== pytest, all"
	@$(BIN)/pytest -n auto

real: .venv/.installed
	@$(BIN)/python -m klpemu.fetch_stock_kernel

selftests: .venv/.installed-test real
	@$(BIN)/python -m klpemu.selftests

bench: .venv/.installed-test
	@$(BIN)/python -m bench $(ARGS)

clean:
	rm -rf .venv dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@if [ -d fixtures ]; then $(MAKE) --no-print-directory -C fixtures clean; fi

.venv/.installed: pyproject.toml
	@for python in $(PYTHON); do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; \
		python=; \
	done; \
	if [ -z "$$python" ]; then \
		echo "klpemu needs Python 3.11 or later; tried: $(PYTHON)" >&2; exit 1; \
	fi; \
	if $(BIN)/python -m pip --version >/dev/null 2>&1; then exit 0; fi; \
	if ! $$python -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "$$python cannot make a virtual environment: install the Debian package python3-venv" >&2; exit 1; \
	fi; \
	echo "making .venv with $$($$python --version)"; \
	$$python -m venv --clear .venv
	@echo "installing klpemu into .venv"
	@$(PIP) install --editable .
	@touch $@

.venv/.installed-test: .venv/.installed
	@echo "installing the test tools into .venv"
	@$(PIP) install --editable '.[test]'
	@touch $@
