# `make demo` and `make test` set up what they need; nothing else has to be typed.
VENV := .venv
PYTHON ?= $(shell command -v python3.12 || command -v python3)
RUN := $(VENV)/bin/python
GPU_PYTHON ?= $(RUN)
GPU_WORKERS ?= 12
ORACLE := .venv-oracle
KERNELS_CI := .venv-kernels-ci
ORACLE_PYTHON ?= $(shell command -v python3.11 || command -v python3)

.PHONY: demo test test-slow test-faults docs transcript check check-kernels test-gpu test-oracle setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@if command -v uv >/dev/null && ! command -v python3.12 >/dev/null; \
	then uv venv --seed $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@echo "installing into $(VENV): 1.5 GB or so, some minutes"
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(RUN) scripts/demo.py

test: setup
	JAX_PLATFORMS=cpu $(RUN) -m pytest -q -n 2 --dist worksteal -m "not gpu and not network and not slow"

# Everything, for hours: each fault at each point, 200 kills, 10,000 random inputs.
test-slow: setup
	JAX_PLATFORMS=cpu $(RUN) -m pytest -q -m slow
	JAX_PLATFORMS=cpu $(RUN) -m pytest -q --hypothesis-profile thorough \
	-k "random or any_bytes or any_rows or any_settings or any_file"

# Every test that docs/faults.md names, but the slow ones.
test-faults: setup
	JAX_PLATFORMS=cpu $(RUN) -m pytest -q -m "not slow" \
	$$(grep -o '[a-z0-9_/]*\.py::[a-z0-9_]*' docs/faults.md | sort -u | sed 's|^|tests/|')

docs: setup
	$(RUN) -c "from fastjax.cli_help import settings_page as p; print(p(), end='')" \
	> docs/settings.md
	$(RUN) -m sphinx -q -W -b html docs build/site

# A new user's first half hour: what the commands of docs/quickstart.md print.
transcript: setup
	mkdir -p build
	$(RUN) docs/write_transcript.py > build/first_half_hour.md
	mv build/first_half_hour.md docs/first_half_hour.md

check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports
	$(RUN) -m sphinx -q -W -b dummy docs build/site-check

# The longest first, one at a time. XLA's references multiply by cuBLAS: it would try
# its own ways for 20 seconds a program.
test-gpu:
	JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false \
	XLA_FLAGS=--xla_gpu_enable_triton_gemm=false \
	$(GPU_PYTHON) -m pytest -q -n $(GPU_WORKERS) --maxschedchunk 1 -m gpu \
	-p no:cacheprovider -p no:benchmark \
	$(addprefix tests/kernels/,lora_matmul attention cross_entropy) tests/kernels

# Compiles every kernel for Hopper; needs no GPU. Its own environment: 1.9 GB.
$(KERNELS_CI)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(KERNELS_CI)
	$(KERNELS_CI)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[kernels-ci]'
	@touch $@

check-kernels: $(KERNELS_CI)/.ready
	rm -rf build/kernels && mkdir -p build/kernels
	JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false MOSAIC_GPU_DUMP_PTXAS=1 \
	MOSAIC_GPU_DUMP_TO=build/kernels $(KERNELS_CI)/bin/python scripts/check_kernels.py

$(ORACLE)/.ready: tests/oracle/requirements.txt
	$(ORACLE_PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/python -m pip install --quiet -r tests/oracle/requirements.txt
	@touch $@

test-oracle: setup $(ORACLE)/.ready
	rm -rf build/oracle
	JAX_PLATFORMS=cpu $(RUN) tests/oracle/export.py build/oracle
	$(ORACLE)/bin/python tests/oracle/verify.py build/oracle
	JAX_PLATFORMS=cpu $(RUN) tests/oracle/export_formats.py build/oracle
	$(ORACLE)/bin/python -P tests/oracle/verify_formats.py build/oracle \
	benchmarks/results/cpu/formats-oracle.json

clean:
	rm -rf $(VENV) $(ORACLE) $(KERNELS_CI) build outputs
