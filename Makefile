# The verbs: demo test bench lint wheel gpu. Each but `gpu` makes and uses the project's own virtual environment.
#
#   PYTHON=python3.12 make test               another Python (>= 3.10)
#   CVC_CUDA=off|on|auto                      native CUDA library (default: auto when torch has CUDA, else off)
#   CVC_CUDA_ARCHITECTURES="80;90"            compute capabilities
#   ARGS="--resolution 1024" make demo        arguments for the command behind a verb

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
READY := $(VENV)/.ready
ARGS ?=
WORKERS ?= auto

.PHONY: help demo test bench lint format wheel gpu build clean
help:
	@sed -n 's/^#   //p; s/^# The/The/p' Makefile

# torch first, alone: a CPU build where there is no NVIDIA driver and an index offers one, else the default build.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -U pip
	command -v nvidia-smi >/dev/null || $(PIP) install -c constraints.txt "torch==2.13.0+cpu" \
	    || echo "no CPU build of torch on the configured index: taking the default build"
	$(PIP) install -c constraints.txt torch triton
	$(PIP) install -c constraints.txt numpy einops setuptools wheel cmake ninja pybind11
	CVC_SKIP_BUILD=1 $(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

# Native libraries and the test module, in place; CMake decides what is out of date.
build: $(READY)
	@CVC_CUDA=$${CVC_CUDA:-$$($(BIN)/python -c "import torch; print('auto' if torch.version.cuda else 'off')")} \
	 CVC_TESTING=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext --inplace

demo: build
	$(BIN)/python -m cvctoolkit demo $(ARGS)

# Idle threads of one test worker sleep instead of spinning on the cores of the next.
test: export OMP_WAIT_POLICY := passive
test: build
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) tests/test_contract.py tests/test_epipolar_triton.py -k triton

PEERS := open3d fcpw libigl numba pandas polars pymeshlab spconv vtk warp-lang
bench: build
	@for peer in $(PEERS); do $(PIP) install -c constraints.txt $$peer \
	    || echo "$$peer is not available for this Python: its rows will be missing"; done
	$(BIN)/python -m cvctoolkit bench $(ARGS)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*' 'benchmarks/*.cpp' | xargs -r $(BIN)/clang-format --dry-run --Werror
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' 'benchmarks/*.cpp' | xargs -r $(BIN)/clang-format -i

# One wheel for every CPython >= 3.10 and every torch >= 2.10; with every architecture when nvcc is found.
wheel: $(READY)
	CVC_TESTING=0 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .
	@ls -l dist/*.whl

# On a GPU machine, in the current interpreter, without network.
gpu:
	$(PYTHON) scripts/gpu.py $(ARGS)

clean:
	rm -rf build dist *.egg-info cvctoolkit/*.so tests/cvctoolkit_testing*.so
