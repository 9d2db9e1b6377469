# Two commands do everything on a machine that has only Python: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Where this is set, each process that the tests start would compile all source again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test check format bench clean

setup: $(STAMP)

# torch first and by its exact version: where a CPU build is offered under it, pip takes that instead of 3 GB of CUDA.
# One for CUDA itself says which builds of NVIDIA's packages it takes: beside it, ours do not apply.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	grep -Ev '^(nvidia|cuda)-' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt torch
	$(BIN)/python -c 'import torch; exit(torch.version.cuda is not None)' && cp constraints.txt $(VENV)/constraints.txt; \
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[test]'
	touch $@

demo: setup
	$(BIN)/flowreel demo demo --overwrite

test: check
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/flowreel bench --short

clean:
	rm -rf $(VENV) demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
