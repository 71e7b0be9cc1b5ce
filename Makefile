# Two commands do all the set-up: `make demo` and `make test`.

PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-all test-fast check bench study study-smoke results clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[train,dev]'
	touch $@

$(VENV)/.installed-all: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[all,dev]'
	touch $@

demo: $(VENV)/.installed  ## train and compare four routers on built-in text, with a report
	$(BIN)/etr demo

test: $(VENV)/.installed  ## all tests that need no optional extra
	$(BIN)/python -m pytest

test-fast: $(VENV)/.installed  ## without the tests that take more than 10 s
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.installed-all  ## all tests, with every optional extra installed
	$(BIN)/python -m pytest

check: $(VENV)/.installed  ## formatting, lint, types, import contracts
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed  ## speed of the layer against its floors, as ratios of one run
	$(BIN)/python -m benchmarks

study: $(VENV)/.installed  ## the quality study: docs/results/quality.md (hours; resumes)
	$(BIN)/etr study --out docs/results --weights runs/study/weights

study-smoke: $(VENV)/.installed  ## the whole path of the study on a few steps
	$(BIN)/etr study --smoke --out runs/study-smoke

results: $(VENV)/.installed  ## regenerate docs/results/demo.md and its picture (two seeds)
	$(BIN)/etr demo --out runs/results --seeds 0 1 --markdown docs/results/demo.md
	$(BIN)/etr report runs/results --figures
	cp runs/results/figures/loss-by-steps.svg docs/images/demo-loss.svg
	cp runs/results/results.json docs/results/demo.json

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
