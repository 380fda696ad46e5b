# The whole project in five commands; each sets up what it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 0
# DeepSpeed compiles what its ranks on one host share memory with at a first start: now, and not in somebody's run.
BUILD_OP := from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: setup demo test test-long bench lint clean

setup: $(VENV)/.ready

# Pinned versions, once; again only where the pins change.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu $(BIN)/python -c "$(BUILD_OP)"
	touch $@

demo: setup
	$(BIN)/gemsmith demo --out runs/demo$(if $(filter-out 0,$(SEED)),-seed$(SEED)) --seed $(SEED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A file's tests stay together: they share what they have trained. Two at a time, since many wait for processes.
test: lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile

test-long: setup
	$(BIN)/pytest -m long

# Its rows and their peers are of cores, GPU or not.
bench: export DS_ACCELERATOR = cpu
bench: export CUDA_VISIBLE_DEVICES =
bench: setup
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
