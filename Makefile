PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Three tests at a time, for two cores, since many of them wait; those of a file one after another,
# since they share; in the order of files, of which the last ones are quick: none is waited for.
PYTEST := $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder
NUMERICAL = -m "numerical and not full" $$(grep -rl mark.numerical tests --include='*.py')
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help compare test test-full gpu check docs wheel

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

compare: $(VENV)/.runtime ## Run the paper's deployments side by side on 16 local ranks
	@$(BIN)/expertlane compare
	@echo "The paper's goals, judged by it: $(BIN)/python experiments/paper/study.py results/paper-small"

# Then what computes numbers again with torch alone, and bfloat16 without any set but the baseline,
# which has no kernels for it.
test: $(VENV)/.dev ## Run the tests, without the long ones
	@$(PYTEST) -m "not full"
	@echo "Again with EXPERTLANE_BACKEND=torch: the numerical tests"
	@EXPERTLANE_BACKEND=torch $(PYTEST) $(NUMERICAL)
	@echo "Again with EXPERTLANE_CPU_ISA=baseline: bfloat16 against the reference"
	@EXPERTLANE_CPU_ISA=baseline $(BIN)/pytest tests/parity/test_bfloat16.py

test-full: $(VENV)/.dev ## Run all tests; when interrupted, and with the same files, go on there
	@$(PYTEST) --go-on $(VENV)/passed

gpu: ## Try this machine's GPU with the torch that is installed: tests, speed, a profile
	@PYTHONPATH=src $(PYTHON) benchmarks/gpu.py

check: $(VENV)/.dev ## Lint, formatting, types, and which package imports which
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# Built where it is run, so that it serves systems with this one's C library, or a later one.
wheel: $(VENV)/.dev ## Build a wheel with compiled kernels for this kind of CPU into dist/
	@EXPERTLANE_WHEEL_KERNELS=1 $(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*manylinux*.whl

docs: $(VENV)/.docs ## Build the documentation into docs/_build/html
	@$(BIN)/python docs/option_table.py
	@$(BIN)/sphinx-build -b html -W --keep-going -n -q docs docs/_build/html

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) is missing or older than Python 3.11; name another: make PYTHON=python3.12 …"; \
	    exit 1; }
	@echo "Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Stamps: an install is repeated when pyproject.toml is newer. The second covers the first.
$(VENV)/.runtime: pyproject.toml | $(BIN)/python
	@echo "Installing expertlane into $(VENV) (the first time brings PyTorch: some minutes)"
	@$(PIP) install --editable '.[all]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing expertlane and its test tools into $(VENV) (the first time: some minutes)"
	@$(PIP) install --editable '.[dev]'
	@touch $(VENV)/.runtime $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	@echo "Installing what builds the documentation into $(VENV)"
	@$(PIP) install --editable '.[docs]'
	@touch $@
