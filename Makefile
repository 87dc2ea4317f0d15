# Commands: `make demo`, `make test`, `make docs`. Each makes .venv from the pinned versions first.
# PYTHON picks the interpreter (3.11 or newer) that the environment is made with.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DELETE_ON_ERROR:
.PHONY: demo test docs lint clean

demo: $(READY)
	$(BIN)/whisper-meft demo --output_dir demo_output

# Two processes of one thread each: the tests' tensors are small, and two threads that wait for a busy core are
# many times slower.
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --dist loadfile --durations=15

# Warnings are errors, dead links inside the site among them; links to other sites are not followed.
docs: $(READY)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet docs docs/_build/html
	@echo "open docs/_build/html/index.html"

lint: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The C++ kernels are built against the torch that is installed, so torch comes first.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) 'setuptools>=77' wheel ninja torch
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation -e '.[whisper,peft,speech,quantization,streaming,lhotse,app,export,test,bench,docs,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo_output docs/_build
