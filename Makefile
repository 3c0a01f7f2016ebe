# `make help` lists the targets. PYTHON=python3.12 picks another Python; ARGS="..." is added to the command that is run;
# JOBS=1 runs one test at a time.
PYTHON ?= python3
ARGS ?=
JOBS ?= 2
BIN := .venv/bin
# The first variable pins the packages that build Instep in new versions of pip, the second in old ones.
PIP := PIP_BUILD_CONSTRAINT=constraints.txt PIP_CONSTRAINT=constraints.txt \
	$(BIN)/python -m pip --quiet --disable-pip-version-check
NEEDS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help train compare test test-all prove check bench figures docs clean
.NOTPARALLEL:

help:
	@echo 'make train      train a small GPT with 2 workers in step; ARGS="--steps 20" changes it'
	@echo 'make compare    train it under four update rules, a slow worker among two, and make the page'
	@echo 'make test       run the quick tests, up to half an hour on 2 cores; ARGS="-k digest" picks tests'
	@echo 'make test-all   run these and then the slow tests'
	@echo 'make prove      run campaigns over several hosts, as root; what they find goes to benchmarks/results'
	@echo 'make check      format, lint, types and the direction of imports, without changing a file'
	@echo 'make bench      measure speed and memory against DDP and a bare PyTorch loop'
	@echo 'make figures    make the figures of docs/ anew, by the commands that are named there; needs Chromium'
	@echo 'make docs       make the pages of docs/, with the API from the docstrings, in site/'
	@echo 'make clean      remove .venv, caches and build outputs; runs/ stays'

train: .venv/.runtime
	$(BIN)/instep train gpt $(ARGS)

compare: .venv/.dev
	$(BIN)/instep compare gpt --steps 120 --workers 2 --slow 1:4x --rules synchronous,synchronous,team.balance=off,bounded_staleness:4,asynchronous,diloco:5 $(ARGS)

test: .venv/.dev
	$(BIN)/pytest -n $(JOBS) $(ARGS)

test-all: test
	$(BIN)/pytest -m slow -n $(JOBS) $(ARGS)

prove: .venv/.dev
	INSTEP_HOSTS=required $(BIN)/pytest -m prove -n 0 --timeout 7200 $(ARGS)

check: .venv/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

figures: .venv/.dev
	$(BIN)/python benchmarks/figures.py

bench: .venv/.dev
	$(BIN)/python benchmarks/lockstep.py $(ARGS)

docs: .venv/.dev
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo 'The pages are made: site/index.html'

clean:
	rm -rf site .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

.venv/.runtime: $(NEEDS)
	$(call install,.)
	@touch $@

.venv/.dev: $(NEEDS)
	$(call install,.[dev])
	@touch .venv/.runtime $@

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Instep needs Python 3.11 or later and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12.")'
	@echo 'Installing Instep and its pinned packages into .venv; torch is large, the first time takes a minute or more.'
	@$(PYTHON) -m venv .venv
	@$(PIP) install --constraint constraints.txt --editable '$(1)'
endef
