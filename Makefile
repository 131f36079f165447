# `make` lists the targets. Everything runs in .venv, made once: a second run neither installs nor builds again, and
# the native core is built anew only when its sources changed.

PYTHON ?= python3
VENV ?= .venv
NATIVE ?= build/native
BIN := $(VENV)/bin
OPS := $(filter-out __init__,$(basename $(notdir $(wildcard tests/cases/*.py))))
NATIVE_SOURCES := CMakeLists.txt pyproject.toml $(shell find cmake csrc -type f)

.PHONY: help setup demo test bench lint asan gpu clean

help:
	@echo "Targets:"
	@echo "  demo    run the documented models with torch and with interfuse side by side, and train one"
	@echo "  test    run all C++ and Python tests"
	@echo "  bench   time interfuse against the peers installed"
	@echo "  lint    ruff and mypy"
	@echo "  asan    C++ tests and native Python tests under address and undefined-behaviour sanitizers"
	@echo "  gpu     build, test and time on a machine with an NVIDIA GPU, with the torch it has"
	@echo "  clean   remove what these targets made"

$(VENV)/.installed: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "interfuse needs Python 3.10 or newer; \
	this is %d.%d. Name another with PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --requirement constraints.txt
	@touch $@

# The C++ tests are built beside the module, from the same object files.
$(VENV)/.built: $(VENV)/.installed $(NATIVE_SOURCES)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation \
	  -Cbuild-dir=$(NATIVE) -Ccmake.define.INTERFUSE_TESTS=ON --editable .
	@touch $@

setup: $(VENV)/.built

demo: setup
	$(BIN)/interfuse demo

test: setup
	$(BIN)/ctest --test-dir $(NATIVE) --output-on-failure
	$(BIN)/python -m pytest

# pytest-benchmark's cases of every op and of the models, then each against its peers.
bench: setup
	@mkdir -p out
	$(BIN)/python -m pytest $(OPS:%=bench/%.py) bench/models.py bench/zoo.py --benchmark-enable --benchmark-json out/pytest_benchmark.json
	for op in $(OPS) models zoo; do $(BIN)/interfuse bench $$op || exit 1; done

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

asan: $(VENV)/.installed
	scripts/asan.sh $(BIN)/python

gpu:
	scripts/gpu.sh $(PYTHON) out/gpu $(STEPS)

clean:
	rm -rf $(VENV) build dist out .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
