# `make pretrain` and `make test` are the two commands of the README; PYTHON picks the interpreter that makes .venv.
PYTHON ?= python3
BIN := .venv/bin
PYTEST_ARGS ?=

.PHONY: pretrain test bench install clean

pretrain: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed engine/pretrain.py --deepspeed_config ds_configs/zero2.json $(ARGS)

test: .venv/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest $(PYTEST_ARGS)

bench: .venv/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest benchmarks/ $(PYTEST_ARGS)

install: .venv/.install

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/.install: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/.test: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test,bench]'
	@touch $@ .venv/.install

clean:
	rm -rf .venv build dist *.egg-info
