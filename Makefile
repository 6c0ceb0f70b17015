SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench clean

ENGINE ?=
PYTHON ?=
ARGS ?=
export ENGINE PYTHON
BIN := .venv/bin

help:  ## list what there is
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

setup:  ## make .venv with everything in it (ENGINE=stub leaves real vLLM out)
	@scripts/setup

demo: setup  ## answer a question with the example app on real engines (or ENGINE=stub)
	@$(BIN)/maestro demo $(if $(ENGINE),--engine $(ENGINE)) $(ARGS)

test: setup  ## run all tests (ARGS="-m 'not vllm'" leaves the slow ones out)
	@$(BIN)/pytest $(ARGS)

check: setup  ## format, lint, types, generated files
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy -p maestro_agents -p maestro_langgraph -p maestro_backend -p gpu_kit
	@$(BIN)/python -m maestro_agents.protocol | diff docs/protocol.schema.json - \
		|| { echo 'check: stale, run: $(BIN)/python -m maestro_agents.protocol > docs/protocol.schema.json'; exit 1; }

bench: setup  ## list the benchmarks, or run one: make bench NAME=...
	@if [ -n "$(NAME)" ]; then $(BIN)/python benchmarks/$(NAME).py $(ARGS); \
	else for file in benchmarks/*.py; do [ -e "$$file" ] || { echo 'no benchmarks yet'; break; }; \
		printf '%-20s %s\n' "$$(basename "$$file" .py)" "$$(sed -n '1s/"//gp' "$$file")"; done; fi

clean:  ## remove caches, build products and .venv
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
