# The commands of everyday work. `make help` lists them; PYTHON is the Python that runs them.
PYTHON ?= .venv/bin/python
export OMP_NUM_THREADS ?= 1

.PHONY: help install build lint types test golden docs benchmarks torture asan all

help:  ## List the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /:\t/' | expand -t 14

install:  ## Make the virtual environment with everything that development needs
	python3 -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e '.[test,lint,docs]'

build:  ## Compile the engines in place, and show what the compiler says
	$(PYTHON) setup.py build_ext --inplace

lint:  ## Check style and format (ruff)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:  ## Check types (mypy, strict)
	$(PYTHON) -m mypy

test:  ## Run the tests, two files at a time
	$(PYTHON) -m pytest --numprocesses=2 --dist=loadfile

golden:  ## Compare seeded studies with the recorded values, bit for bit
	$(PYTHON) -W ignore -m tests.golden check

docs:  ## Build the documentation; warnings are errors
	$(PYTHON) -m sphinx -W --keep-going -b html docs docs/_build/html

benchmarks:  ## Measure a step, whole studies, the storage's load and the import
	$(PYTHON) -m tests.benchmarks.steps
	$(PYTHON) -m tests.benchmarks.study --data all
	$(PYTHON) -m tests.benchmarks.storage_load
	$(PYTHON) -m tests.benchmarks.import_time

torture:  ## Kill a study fifty times and count what it has lost
	$(PYTHON) -m tests.torture --kills 50 --trials 1500

asan:  ## Run the engines' tests with AddressSanitizer and UBSan
	bash .ci/sanitize

all: lint types test golden docs  ## Everything that CI checks
