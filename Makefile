# Everything a fresh machine needs: each target makes the environment first, once.
#
#   make demo     denoise a photograph region by region, inside a stated memory
#   make test     lint, types, import contract and tests: the same as the CI
#   make test-slow      what takes long: large models of the zoo, all of keras.applications
#   make bench    the benchmarks, against the untouched framework in the same run
#   make format   put the code into its usual layout
#   make clean    remove the environment, caches and outputs
#
# Another PyTorch, such as one built for CUDA:  make test TORCH="torch==2.13.0 --index-url URL"

PYTHON ?= python3
# Installed first, so that no later requirement brings another build of it.
TORCH ?= torch==2.13.0
JOBS ?= 2
ENVIRONMENT := .venv
BIN := $(ENVIRONMENT)/bin
READY := $(ENVIRONMENT)/.ready

# XLA plans and fuses as ever but makes plainer machine code: on JAX nearly all of the time is compiling. `make test-slow`
# compiles in full.
QUICKLY := JAX_DISABLE_MOST_OPTIMIZATIONS=1

.PHONY: demo test test-slow lint bench format clean

demo: $(READY)
	$(BIN)/python examples/denoise_retina.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow" --ignore=tests/keras
	for backend in tensorflow jax torch; do \
	  echo "Keras on $$backend"; \
	  $(QUICKLY) KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow" tests/keras || exit 1; \
	done

# What takes long and is not part of `make test`: large models of the zoo, all of keras.applications, heavy compilations.
test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m slow --ignore=tests/keras
	for backend in tensorflow jax torch; do \
	  KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m slow tests/keras || exit 1; \
	done

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m benchmarks

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(ENVIRONMENT) out .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis

# Made again only when the requirements change; an interrupted installation leaves no stamp.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(ENVIRONMENT)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $(READY)
