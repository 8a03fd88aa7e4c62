# septet: `make demo` and `make test` do all the set-up themselves. `make help` lists the rest.
# tools/setup_environment.sh says what is installed, and where from. PYTHON=... picks the interpreter.

SETUP := ./tools/setup_environment.sh
BIN := .venv/bin
.DEFAULT_GOAL := help
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Tests multiply small matrices: OpenMP threads that wait for each other on a busy machine are slower than one.
test-python test-oldest-transformers: export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo mlir test test-python test-oldest-transformers lint generate clean distclean

help:
	@echo "make demo      quantize SmolLM2-135M to 3.5 bits, measure what it cost, ask it a question"
	@echo "make test      lint, import contract, all tests on every backend, the oldest transformers"
	@echo "make lint      style and import contract only"
	@echo "make generate  write the generated files again: native tables, the tree in ARCHITECTURE.md, docs/quality.md and docs/performance.md"
	@echo "make mlir      Fortran through MLIR, level by level, and the figures of docs/mlir.md"
	@echo "make setup     install everything into .venv, without running anything"
	@echo "make clean     remove builds, the demo's output and caches; make distclean also the environments"

# Tests want the Fortran compilers, an emulated AArch64 and what compiles GPU kernels, too, where they can be had.
test: export TEST_STAGES := fortran emulation
test: export GPU_STAGE := gpu

setup:
	@$(SETUP) venv $$TEST_STAGES torch package $$GPU_STAGE

demo:
	@$(SETUP) venv torch package demo
	$(BIN)/septet demo

mlir:
	@$(SETUP) venv fortran torch package
	$(BIN)/python tools/lower_through_mlir.py

test: lint test-python test-oldest-transformers

lint: setup
	$(BIN)/ruff check .
	$(BIN)/lint-imports

test-python: lint
	SEPTET_EXPECT_BACKENDS="$$($(BIN)/python tools/expected_backends.py)" $(BIN)/python -m pytest

test-oldest-transformers: test-python
	@$(SETUP) oldest
	SEPTET_EXPECT_BACKENDS="$$(.venv-transformers-min/bin/python tools/expected_backends.py)" \
		.venv-transformers-min/bin/python -m pytest tests/test_transformers.py

generate: setup
	$(BIN)/python tools/generate_tables.py
	$(BIN)/python tools/draw_tree.py
	$(BIN)/python tools/draw_quality.py
	$(BIN)/python tools/draw_performance.py
	$(BIN)/python tools/draw_gpu.py

clean:
	rm -rf build dist demo demo.partial .pytest_cache .ruff_cache .hypothesis .import_linter_cache .venv/septet-sources.sha256
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-transformers-min .venv.lock
