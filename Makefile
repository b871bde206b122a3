# demo, test and the rest set up .venv themselves; nothing else is needed but Python 3.11+ and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-gpu lint format typecheck notebooks wheel clean

demo: $(STAMP)
	$(BIN)/acmil demo --out demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# The same tests of the kernels as in `test`, at full size and on the GPU in place of the interpreter, and what else needs one.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest tests/test_kernels
	$(BIN)/python -m pytest -m gpu tests/test_acmil tests/test_preprocessing

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/typed --upgrade dist/*.whl
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml acmil

notebooks: $(STAMP)
	$(BIN)/jupyter lab notebooks

wheel: $(STAMP)
	rm -rf dist build
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist demo *.egg-info

# torch goes first: an index that offers several builds then keeps the one chosen here.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=python3.12, say."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
