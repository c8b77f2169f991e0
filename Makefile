# `make pretrain` and `make test` are the two commands of the README; PYTHON picks the interpreter that makes .venv.
# For those who change the code: `make quick` (two or three minutes, every room), `make lint`.
PYTHON ?= python3
BIN := .venv/bin
PYTEST_ARGS ?=
# Two processes of tests, each with one thread; a file's tests stay together.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: pretrain test quick lint bench install clean

pretrain: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed engine/pretrain.py --deepspeed_config ds_configs/zero2.json $(ARGS)

test: .venv/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

quick: .venv/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q $(WORKERS) \
		-m "not process and not ranks and not compile and not gpu and not slow" $(PYTEST_ARGS)

# In a checkout the modules of `mirl` stand in several folders; a type checker wants to see them in one.
lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .venv/types && mkdir -p .venv/types/mirl
	ln -s $(CURDIR)/mirl/*.py $(CURDIR)/engine $(CURDIR)/kernels $(CURDIR)/dataloaders .venv/types/mirl/
	$(BIN)/basedpyright

bench: .venv/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest benchmarks/ $(PYTEST_ARGS)

install: .venv/.install

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/.install: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

# Most of what is installed is never imported: Python compiles what is.
.venv/.test: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[test,bench]'
	@touch $@ .venv/.install

clean:
	rm -rf .venv build dist *.egg-info
