# Two commands do all the set-up: `make demo` and `make test`.

PYTHON ?= python3.11
VENV   ?= .venv
# Exact versions; `make LOCK= ...` takes what is newest within the bounds of pyproject.toml.
LOCK   ?= constraints.txt
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check
INSTALL = $(PIP) install --quiet $(LOCK:%=--constraint %)
PYTEST  = $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder --durations 40

# Tests start many processes, which then need not compile every module anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-newest test-lowest test-pythons test-peers criteria check lock bench speed speed-gpu docs \
        transforms dlm serving gallery study study-smoke results clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Without isolation, so that the locked setuptools builds what comes as source.
$(VENV)/.train: pyproject.toml $(LOCK) | $(BIN)/python
	$(INSTALL) --upgrade setuptools
	$(INSTALL) --no-build-isolation --editable '.[train]'
	touch $@

$(VENV)/.all: $(VENV)/.train
	$(INSTALL) --no-build-isolation --editable '.[all,dev]'
	touch $@

demo: $(VENV)/.train  ## train and compare two routers on built-in text, with a report
	$(BIN)/etr demo

test: $(VENV)/.all  ## all tests
	$(PYTEST)

test-fast: $(VENV)/.all  ## without the tests that take more than 10 s
	$(PYTEST) -m "not slow"

test-newest:  ## all tests with the newest allowed versions, in an environment of their own
	rm -rf .venv-newest
	$(MAKE) VENV=.venv-newest LOCK= test

test-lowest: build/lowest.txt  ## all tests with the lowest allowed versions (but for torch)
	$(MAKE) VENV=.venv-lowest LOCK=build/lowest.txt test

test-pythons:  ## all tests on the other Pythons
	$(MAKE) PYTHON=python3.12 VENV=.venv-3.12 test
	$(MAKE) PYTHON=python3.13 VENV=.venv-3.13 test

test-peers: $(VENV)/.all  ## transformers' own model tests; more of them with TRANSFORMERS_TESTS=DIR
	$(BIN)/python tests/peers --page docs/results/peers.md $(TRANSFORMERS_TESTS:%=--tests %)

criteria: $(VENV)/.all  ## tests of all methods (METHODS="a b": of these), and the page of them
	$(BIN)/python tools/criteria.py $(METHODS)
	$(BIN)/etr methods --page docs/methods.md

build/lowest.txt: pyproject.toml tools/versions.py
	mkdir -p build
	$(PYTHON) tools/versions.py lowest > $@

lock: | $(BIN)/python  ## renew constraints.txt: the newest allowed versions of all extras
	mkdir -p build
	DS_BUILD_OPS=0 $(PIP) install --quiet --dry-run --ignore-installed --report build/lock.json \
	    '.[all,dev,docs,bench,megatron]'
	$(BIN)/python tools/versions.py lock build/lock.json > build/constraints.txt
	mv build/constraints.txt constraints.txt

check: $(VENV)/.all  ## formatting, lint, types, import contracts
	$(BIN)/ruff format --check src tests benchmarks tools
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.train  ## speed of the layer against its floors, as ratios of one run
	$(BIN)/python -m benchmarks

speed: $(VENV)/.train  ## regenerate the page of speed and README's sentence; wants a quiet machine
	DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation --editable '.[bench]'
	$(BIN)/python -m benchmarks --markdown docs/results/speed.md
	cp runs/bench/speed.json docs/results/speed.json
	$(BIN)/python tools/readme.py

# Where the lock's torch is for CPUs alone: make LOCK= VENV=.venv-gpu speed-gpu
speed-gpu: $(VENV)/.all  ## on a CUDA device: tests of the kernels there, then the page of speed
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python -m benchmarks --device cuda --no-mallopt --out runs/bench-gpu --markdown docs/results/speed-gpu.md

study: $(VENV)/.train  ## the quality study: docs/results/quality.md (hours; resumes)
	$(BIN)/etr study --out docs/results --weights runs/study/weights

study-smoke: $(VENV)/.train  ## the whole path of the study on a few steps
	$(BIN)/etr study --smoke --out runs/study-smoke

# 16 blocks of text a step, as wide as quality claims ask for; STEPS=700 shows the path.
STEPS ?= 10000
dlm: $(VENV)/.train  ## a block-diffusion model on built-in text (a night on 2 cores; resumes), and its page
	$(BIN)/etr train --out runs/dlm --auto-resume --steps $(STEPS) --objective block_diffusion:block=16 \
	    --router token_choice --capacity none --num-experts 32 --top-k 4 --expert-size 32 \
	    --hidden-size 128 --num-layers 2 --sequence-length 64 --batch-size 16 --warmup-steps 50 \
	    --eval-every 1000 --checkpoint-every 500
	$(BIN)/python tools/dlm.py runs/dlm docs/results/dlm.md

# The last model wants the packages of docs/results/downstream.md, and is left out without them.
TRANSFORMS = $(BIN)/python tools/transforms.py --sequence-length 128
transforms: $(VENV)/.train  ## every transform at three budgets, with controls (an hour of one core; resumes)
	$(TRANSFORMS) qwen3_moe demo dense versions --num-batches 2 --max-tokens-per-domain 2048 --draws 2
	$(TRANSFORMS) smollm2 --batch-size 4 --num-batches 2 --max-tokens-per-domain 2048 --draws 1 --rounds 2

serving: $(VENV)/.train  ## a small model, and docs/results/serving.md: where its experts are and which are used
	$(BIN)/python tools/serving.py runs/serving

results: $(VENV)/.train  ## regenerate the pages of the demo (two seeds of the full one), and README's table
	$(BIN)/etr demo --full --out runs/results --seeds 0 1 --markdown docs/results/demo.md
	cp runs/results/results.json docs/results/demo.json
	$(BIN)/etr demo --out runs/results-quick --markdown docs/results/demo-quick.md
	cp runs/results-quick/results.json docs/results/demo-quick.json
	$(BIN)/python tools/readme.py

docs: $(VENV)/.train  ## the documentation as a site, with an API page and search: build/site
	$(INSTALL) --no-build-isolation --editable '.[docs]'
	$(BIN)/python tools/site.py

gallery: $(VENV)/.train  ## the pictures of docs/gallery.md, from the whole demo; screens need Chromium
	$(BIN)/etr demo --full --out runs/gallery
	for name in baseline locmoe etr_paper etr; do \
	    $(BIN)/etr trace runs/gallery/$$name-seed0 --max-tokens 4096 || exit 1; done
	$(BIN)/python tools/pictures.py runs/gallery

clean:
	rm -rf $(VENV) .venv-* build runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
