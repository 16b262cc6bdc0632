# Each target sets up what it needs; nothing else has to be done on a fresh machine.
#   make demo      the main job, on real documents
#   make test      all tests that every change must pass
#   make test-all  the whole matrix: compiled too, and both ends of the supported vLLM versions
#   make lint      ruff, mypy and the import contracts
#   make docs      the documentation, into docs/_build/html
#   make bench     measures, and writes docs/results/
#   make clean     removes what these leave behind; `make clean-all` also removes the environments

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
VLLM ?= 0.32.0
# The oldest version we support; its environment is beside the first.
OLDEST ?= 0.27.1

BIN := $(VENV)/bin
READY := $(VENV)/.installed-$(VLLM)
SOURCES := tools/install.py constraints.txt pyproject.toml $(wildcard integrations/*/pyproject.toml)
SUITES := tests $(wildcard integrations/*/tests)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench clean clean-all

help:
	@sed -n 's/^#   //p' Makefile

$(READY): $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or later is needed: make PYTHON=python3.11')"
	$(BIN)/python tools/install.py $(VLLM)
	@touch $@

demo: $(READY)
	$(BIN)/kvblend demo

test: $(READY)
	@failed=; for suite in $(SUITES); do \
	  echo "== vLLM $(VLLM): $$suite"; $(BIN)/python -m pytest -q $(MARKS) $$suite || failed="$$failed $$suite"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

BRIEFLY := --tb=line --show-capture=no
# Every suite runs, whatever failed before it: an hour's run is to tell all it can. The last result stays in the repository.
test-all: $(READY)
	@mkdir -p docs/results
	@bash -o pipefail -c '{ \
	  echo "# make test-all"; date -u +%Y-%m-%d; failed=0; \
	  $(MAKE) --no-print-directory test MARKS="$(BRIEFLY) -m \"full or not full\"" || failed=1; \
	  $(MAKE) --no-print-directory test MARKS="$(BRIEFLY)" VENV=.venv-$(OLDEST) VLLM=$(OLDEST) || failed=1; \
	  exit $$failed; \
	} 2>&1 | tee docs/results/test-all.txt'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: docs
docs: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(READY)
	$(BIN)/kvblend bench match --json docs/results/match.json
	$(BIN)/kvblend bench ttft --json docs/results/cpu-ttft.json
	$(BIN)/kvblend bench ingest --json docs/results/cpu-ingest.json

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache docs/_build
	find . -name __pycache__ -not -path "./.venv*" -prune -exec rm -rf {} +

clean-all: clean
	rm -rf .venv .venv-*
