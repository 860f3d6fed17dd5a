# Every target does its own set-up; on a fresh machine Python 3.10 or 3.11 and make are enough.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test faults soak test-oldest fuzz lint bench docs lock clean

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements.lock
OLDEST := .venv-oldest
# What leans most on TensorFlow, Keras, gRPC and click themselves, in about a minute and a half.
OLDEST_TESTS := tests/test_import.py tests/test_packaging.py tests/cli tests/sample tests/metrics tests/data/test_dataio.py \
  tests/model/test_model.py tests/model/test_stage.py tests/model/test_optimizer_fn.py tests/federation/test_parity.py \
  tests/federation/test_gating.py
VERSION := import sys; print(sys.version)
UV ?= uv
export PYTHON
export TF_CPP_MIN_LOG_LEVEL ?= 3
# One line per install is enough, and nothing may ask a question.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

help: ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.efl ## Make .venv with everything in it, from requirements.lock.
	@$(if $(PYTHON),$(PYTHON) -c '$(VERSION)' | grep -qxF "$$($(BIN)/python -c '$(VERSION)')" || \
	  echo "$(VENV) is of another Python than PYTHON=$(PYTHON): remove it to have it made anew",:)
	@$(if $(MADE),echo "ready: . $(BIN)/activate",$(if $(filter setup,$(MAKECMDGOALS)),echo "$(VENV) is up to date",:))

# The versions and hashes of the lock, and nothing else.
$(VENV)/.packages: $(LOCK) .ci/find-python
	@PYTHON=$(BIN)/python .ci/find-python >/dev/null 2>&1 || { \
	  python=$$(.ci/find-python) && echo "making $(VENV) with $$python" && "$$python" -m venv --clear $(VENV); }
	@echo "installing the packages of $(LOCK) (the first time takes some minutes)"
	@$(BIN)/python -m pip install --quiet --require-hashes --requirement $(LOCK)
	@touch $@

# Editable, with the setuptools of the lock: nothing is fetched.
$(VENV)/.efl: $(VENV)/.packages pyproject.toml setup.py
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
	$(eval MADE := yes)

demo: setup ## Train MNIST, split between two processes, and compare with one process.
	@$(BIN)/python example/mnist/demo.py $(ARGS)

test: setup ## Run the tests.
	@$(BIN)/python -m pytest -n 2 $(ARGS)

test-oldest: ## Run some tests with the oldest version of every dependency; ARGS=tests for all.
	@$(MAKE) --silent VENV=$(OLDEST) LOCK=requirements-oldest.lock $(OLDEST)/.efl
	@$(OLDEST)/bin/python -m pytest -n 2 $(or $(ARGS),$(OLDEST_TESTS))

# Whose longest runs test leaves out.
LONG_TESTS = tests/example/test_programs.py tests/example/test_entropy_mnist.py tests/federation/test_encrypted_mnist.py tests/model/test_closing.py tests/test_benchmarks.py
faults: setup ## Run all runs with faults (cuts, deaths, signals, full disks), and the longest others; test has a sample.
	@$(BIN)/python -m pytest -n 2 --full tests/faults $(LONG_TESTS) $(ARGS)

SOAK_MINUTES ?= 30
soak: setup ## Train MNIST's model for SOAK_MINUTES (30) under random faults; ARGS="--data DIR" for MNIST itself.
	@$(BIN)/python -m tests.faults.soak --minutes $(SOAK_MINUTES) $(ARGS)

FUZZ_SECONDS ?= 60
fuzz: setup ## Fuzz what reads a peer's bytes, FUZZ_SECONDS (60) for each target; ARGS="link hello" for some.
	@$(BIN)/python -c "import atheris" 2>/dev/null || $(BIN)/python -m pip install --quiet --only-binary :all: "atheris>=2.3"
	@$(BIN)/python -m fuzz.run --seconds $(FUZZ_SECONDS) $(ARGS)

lint: setup ## Check style and types.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup ## Run every benchmark in its quick form.
	@set -e; for benchmark in benchmarks/[!_]*.py; do echo "== $$benchmark"; $(BIN)/python $$benchmark --quick $(ARGS); done

docs: setup ## Build the documentation into site/.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "open site/index.html"

COMPILE = $(UV) pip compile --quiet --universal --python-version 3.10 --generate-hashes --upgrade --no-emit-index-url \
  --custom-compile-command "make lock" pyproject.toml

lock: ## Resolve requirements.lock and requirements-oldest.lock anew (needs uv).
	@$(COMPILE) --all-extras --output-file requirements.lock
	@$(COMPILE) --extra privacy --extra demo --extra dev --resolution lowest-direct --output-file requirements-oldest.lock

clean: ## Remove everything that was made here, .venv included.
	rm -rf $(VENV) $(OLDEST) site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
