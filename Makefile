# One command each; CI runs the same ones. `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# Which interpreter makes the virtual environment.
PYTHON ?= python3
# Which torch. For wheels without CUDA: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# Pinned versions of everything else; empty for the newest that pyproject.toml allows.
LOCK ?= requirements-lock.txt
# Parallel test processes.
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.fewbit-setup
NATIVE := CMakeLists.txt $(shell find src/native -type f)

.PHONY: help setup compare test runtimes test-runtimes sanitize check format wheel schema docs bench lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP) ## .venv with torch, fewbit (editable) and the tools for checks and tests

$(STAMP): pyproject.toml $(wildcard $(LOCK)) $(NATIVE)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 15) else "fewbit needs Python 3.11 to 3.14, $(PYTHON) is %d.%d; set PYTHON=..." % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(BIN)/python -m pip install --quiet $(if $(LOCK),--constraint $(LOCK)) '$(TORCH)' --editable '.[dev]'
	touch $@

compare: setup ## the bundled model, and Qwen2.5-1.5B shapes for speed; results in results/compare
	$(BIN)/fewbit compare --shapes qwen2.5-1.5b --out results/compare

test: setup ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q

runtimes: setup ## the environments of vLLM, llama.cpp, transformers and OpenVINO in FEWBIT_ENVS (~/.cache/fewbit/envs), for verify
	$(BIN)/python scripts/runtimes/environments.py $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

test-runtimes: setup ## every cell of the matrix of checkpoints and runtimes, with the runtimes that are installed; then docs/runtimes.md
	FEWBIT_HEAVY=1 FEWBIT_RECORD=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/runtimes -q
	$(BIN)/python scripts/generate_docs.py

sanitize: setup ## the tests of the native code under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python scripts/sanitize.py

check: setup ## lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: ## a wheel for this interpreter in dist/
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

schema: setup ## rewrite the JSON Schema of results.json from the result types
	$(BIN)/python -m fewbit.report.results_file

docs: setup ## rewrite the generated pages of docs/: cli.md, reference.md, runtimes.md
	$(BIN)/python scripts/generate_docs.py

bench: setup ## the bars of benchmarks/
	$(BIN)/python benchmarks/compare_bars.py

lock: setup ## write the installed versions to requirements-lock.txt
	$(BIN)/python scripts/write_lock.py

clean: ## everything that is made, the virtual environment included
	rm -rf .venv build dist results .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
