# `make train`, `make test` and `make docs` need git, make, g++ and python3 >= 3.11 with venv and headers. They set up the rest:
# `make train` what training needs, the others what they need besides.
#
#   TORCH   what pip installs where the environment holds no torch:
#           make train TORCH='torch==2.11.0 --index-url https://download.pytorch.org/whl/cu130'
#   TRITON  likewise, for tests, where torch brought no triton
#   VENV    the environment: made if absent. One that holds a working torch keeps it: make test VENV=/path/to/env
#   PYTHON  the interpreter that makes it
#   DISCOVLA_CUDA  the CUDA kernels of csrc/: auto (built where nvcc is), 1 (or fail), 0 (never)
#   CONFIG, ARGS, PROCESSES   what to train, its overrides, on how many GPUs or by how many processes:
#           make train CONFIG=configs/x.toml ARGS="optim.lr=1e-4" PROCESSES=8

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
CONFIG ?= configs/quickstart.toml
ARGS ?=
PROCESSES ?= 1

BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

PIP = python -m pip install -q -c constraints.txt -c $(VENV)/torch.txt

.PHONY: train test docs install

train: install
	discovla train --processes $(PROCESSES) $(CONFIG) $(ARGS)
	@echo
	@echo 'Before the next commands (discovla, deepspeed):   source $(VENV)/bin/activate'

test: $(VENV)/dev
	python -m pytest -q -m "not slow" -n logical --maxprocesses 8 --dist loadfile $(ARGS)

docs: install
	@python -c 'import mkdocs' 2>/dev/null || $(PIP) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --site-dir build/docs

install: $(VENV)/installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("python >= 3.11 is needed, PYTHON is " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch goes in first, with the torchvision of the same index, and both are pinned as found: torchvision asks for one exact
# torch, and pip would else fetch that over ours. CUDA builds bring their triton; beside a CPU build it only interprets.
define PINS
from importlib.metadata import distributions
names = {"torch", "torchvision", "triton"}
print(*sorted({f"{d.name}=={d.version}" for d in distributions() if d.name in names}), sep="\n")
endef
export PINS

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*) | $(BIN)/python
	@python -c 'import torch' 2>/dev/null || python -m pip install $(TORCH) torchvision
	@python -c "$$PINS" > $(VENV)/torch.txt
	$(PIP) -e .
	@touch $@

$(VENV)/dev: $(VENV)/installed
	@python -c 'import triton' 2>/dev/null || python -m pip install $(TRITON)
	@python -c "$$PINS" > $(VENV)/torch.txt
	$(PIP) -e '.[dev]'
	@touch $@
