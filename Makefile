# Everything from a fresh clone: `make demo`, `make test`. The environment lives in .venv (or set VENV=...).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format bench
.DEFAULT_GOAL := test

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	rm -rf runs/demo runs/demo-probe
	$(BIN)/python -m ssl_geo.pretrain --out runs/demo
	$(BIN)/python -m ssl_geo.probe --ckpt runs/demo --out runs/demo-probe --seeds 1 --epochs 5

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks
