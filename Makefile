# Everything runs in a virtual environment of its own; python3 and make are all that is needed.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# Every process of a test or benchmark imports the package anew: it is compiled once, wherever this may be set.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint bench simulate mutants kill9 bank duplicates nemesis powercuts clean

# DB=postgres or DB=mariadb: the services of its orders have databases, which it starts from installed binaries.
DB ?=
demo: $(STAMP)
	@$(PY) -m coordlib.cli demo $(if $(DB),--db $(DB))

# Spread over the processors; `.venv/bin/pytest` alone runs the same tests one after another.
test: $(STAMP)
	$(PY) -m pytest --numprocesses auto --dist worksteal

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	$(PY) benchmarks/run.py

# SEEDS: how many, or from-to; TWICE: so many of them again in other processes, to compare their traces.
SEEDS ?= 1000
TWICE ?= 40
simulate: $(STAMP)
	$(PY) -m coordlib.testing.simulation --seeds $(SEEDS) --twice $(TWICE)

# Planted bugs, one at a time, until somebody notices each: half an hour on two cores. docs/planted-bugs.md
mutants: $(STAMP)
	$(PY) -m tests.mutants

kill9: $(STAMP)
	$(PY) benchmarks/kill9.py

# So many ids by eight real processes, which are closed, killed, stopped and forked: none may be there twice.
IDS ?= 100000000
duplicates: $(STAMP)
	$(PY) benchmarks/duplicate_hunt.py --ids $(IDS)

# Transfers between databases, a service and maps while everything is killed at random. Needs PostgreSQL's binaries.
MINUTES ?= 30
bank: $(STAMP)
	$(PY) benchmarks/bank.py --minutes $(MINUTES)

# The log on a real file system whose power is cut. Only as root.
CUTS ?= 1000
powercuts: $(STAMP)
	$(PY) benchmarks/powercuts.py --cuts $(CUTS)

# Real faults on real processes; all of them only as root. docs/nemesis.md
nemesis: $(STAMP)
	$(PY) -m coordlib.testing.nemesis --members 3
	$(PY) -m coordlib.testing.nemesis --members 5

# The stamp is written last: an interrupted installation is begun anew.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[test,lint]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
