PYTHON ?= python3.11
BIN := .venv/bin
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup programs frontends demo test thorough lint compat clients bench fleet clean

# The slowest tests and set-ups of each part, so that a slow-down shows.
SLOWEST := --durations=15

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: ## make .venv with vLLM for CPUs and this package
	@scripts/setup.sh

programs:
	@scripts/programs.sh

frontends: setup ## install vLLM's Rust and gRPC servers, SMG and Dynamo
	@scripts/frontends.sh

demo: setup ## serve a small model and drive it with real clients; HOLD=1 leaves its page open
	@$(BIN)/python -m demo.run $(if $(HOLD),--hold)

test: setup programs lint ## the checks and the suite, on a real engine
	@# What needs no engine runs on all cores; engines would take each other's.
	$(BIN)/pytest $(SLOWEST) -n auto tests/core tests/page tests/usage
	$(BIN)/pytest $(SLOWEST) --ignore=tests/compat --ignore=tests/core --ignore=tests/lmcache \
		--ignore=tests/page --ignore=tests/usage
	@# By itself: LMCache imports llvmlite, over which vLLM 0.32 falls when it starts on a CPU.
	$(BIN)/pytest $(SLOWEST) tests/lmcache

thorough: setup programs frontends ## the long forms of tests: more examples, larger bodies, longer trouble
	$(BIN)/pytest -n auto --hypothesis-profile=thorough -m 'slow or not slow' tests/core
	$(BIN)/pytest -m slow tests/redis
	$(BIN)/pytest -m slow tests/monitoring
	$(BIN)/pytest -m slow tests/engine
	$(BIN)/pytest -m slow tests/page
	$(BIN)/pytest tests/frontends tests/routers

lint: setup ## ruff, mypy --strict, and which room may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

compat: setup ## what vLLM 0.31, 0.32 and 0.33 must do alike, in a table; Valkey where there is one
	@$(BIN)/python scripts/compat.py

clients: setup ## real agents and SDKs through a tool call and a resumed session, in a table
	@$(BIN)/python -m clients $(if $(ONLY),--only $(ONLY))

bench: setup ## measure what the plugin costs and saves
	@$(BIN)/python -m benchmarks

fleet: setup frontends ## two replicas behind each router: tokens read, first tokens, in a table; QUICK=1
	@$(BIN)/python -m benchmarks.fleet $(if $(QUICK),--quick)

clean: ## remove what building, testing and the demo left; keep the environments
	rm -rf build dist *.egg-info .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
