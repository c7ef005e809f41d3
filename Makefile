# `make demo` and `make test` set everything up: a virtual environment in .venv, the C++ kernels in r2_kernels/.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench bench-gpu docs lint build wheel clean

demo: build
	$(BIN)/python -m benchmarks.demo $(ARGUMENTS)

# One worker per core with one thread each; the tests of threads choose their own number.
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --quiet tests
	OMP_NUM_THREADS=1 R2_KERNELS_INSTRUCTION_SET=portable \
		$(BIN)/python -m pytest --numprocesses auto --quiet tests/test_properties.py tests/test_quantizers.py \
			tests/test_palettization.py --backend cpu
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

# The oldest supported, and the one that requirements-dev.txt pins.
TORCH_VERSIONS ?= 2.10.0 2.13.0

# The sdist, and from it, so that nothing is missing there, the CPU part's wheel for every torch and every Python.
dist/built: .venv/installed MANIFEST.in setup.py pyproject.toml README.md \
		$(shell find csrc r2_kernels -name '*.h' -o -name '*.cpp' -o -name '*.cu*' -o -name '*.py')
	rm -rf dist
	FORCE_CUDA=0 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m build --no-isolation
	touch $@

wheel: $(TORCH_VERSIONS:%=test-wheel-with-torch-%)

# In a virtual environment of its own, which has the wheel and cannot see the checkout's package.
test-wheel-with-torch-%: dist/built
	rm -rf build/torch-$*
	$(PYTHON) -m venv build/torch-$*
	build/torch-$*/bin/python -m pip install --quiet torch==$* hypothesis numpy pytest dist/*.whl
	cd build/torch-$* && bin/python -c "import r2_kernels, sys; assert r2_kernels.__file__.startswith(sys.prefix)"
	cd build/torch-$* && bin/python -m r2_kernels
	cd build/torch-$* && OMP_NUM_THREADS=1 bin/pytest --quiet ../../tests/test_properties.py --backend cpu \
		-k "sizes or layouts or ties or mixed_dtypes"
	rm -rf build/torch-$*

clean:
	rm -rf .venv build dist *.egg-info r2_kernels/_C*.so demo-output
