PYTHON ?= python3.11
BIN := .venv/bin
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test thorough lint compat bench clean

# The slowest tests and set-ups of each part, so that a slow-down shows.
SLOWEST := --durations=15

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: ## make .venv with vLLM for CPUs and this package
	@scripts/setup.sh

demo: setup ## serve a small model with the plugin and drive it with real clients
	@$(BIN)/python -m demo.run

test: setup lint ## the checks and the suite, on a real engine
	@# What needs no engine runs on all cores; engines would take each other's.
	$(BIN)/pytest $(SLOWEST) -n auto tests/core
	$(BIN)/pytest $(SLOWEST) --ignore=tests/compat --ignore=tests/core --ignore=tests/lmcache
	@# By itself: LMCache imports llvmlite, over which vLLM 0.32 falls when it starts on a CPU.
	$(BIN)/pytest $(SLOWEST) tests/lmcache

thorough: setup ## the long forms of tests: more examples, larger bodies, longer trouble
	$(BIN)/pytest -n auto --hypothesis-profile=thorough -m 'slow or not slow' tests/core
	$(BIN)/pytest -m slow tests/redis

lint: setup ## ruff, and mypy --strict on the core
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

compat: setup ## what other versions must do as well: vLLM 0.31, and Valkey where there is one
	@scripts/setup.sh --venv .venv-0.31 --engine 0.31.0
	.venv-0.31/bin/pytest tests/compat tests/redis/test_replicas.py
	.venv-0.31/bin/pytest tests/lmcache/test_engines.py
	$(BIN)/pytest tests/compat
	! command -v valkey-server || REDIS_SERVER=valkey-server $(BIN)/pytest tests/redis

bench: setup ## measure what the plugin costs and saves
	@$(BIN)/python -m benchmarks

clean: ## remove what building, testing and the demo left; keep the environments
	rm -rf build dist *.egg-info .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
