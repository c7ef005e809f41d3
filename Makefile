# `make demo` and `make test` set everything up: a virtual environment in .venv, the C++ kernels in r2_kernels/.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench bench-gpu docs lint build clean

demo: build
	$(BIN)/python -m benchmarks.demo $(ARGUMENTS)

# One worker per core with one thread each; the tests of threads choose their own number.
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --quiet tests
	OMP_NUM_THREADS=1 R2_KERNELS_INSTRUCTION_SET=portable \
		$(BIN)/python -m pytest --numprocesses auto --quiet tests/test_properties.py tests/test_quantizers.py --backend cpu
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 \
		$(BIN)/python -m pytest --numprocesses auto --quiet tests/test_properties.py tests/test_granularity.py \
			tests/test_quantizers.py tests/test_triton*.py --backend triton

bench: build
	$(BIN)/python -m benchmarks.run $(ARGUMENTS)

bench-gpu: build
	$(BIN)/python -m benchmarks.gpu $(ARGUMENTS)

docs: build
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs docs/_build
	@echo "docs/_build/index.html"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp')

# Reinstalled where a source changed: the kernels are compiled in about half a minute.
build: .venv/built

.venv/built: .venv/installed setup.py pyproject.toml $(wildcard csrc/*.h csrc/cpu/*)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

.venv/installed: requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf .venv build dist *.egg-info r2_kernels/_C*.so demo-output
