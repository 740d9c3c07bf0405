# Everything from a fresh clone: `make demo`, `make test`. The environment lives in .venv (or set VENV=...).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test notebooks lint format bench soak docs pictures fuzz study study-gpu ablation
.DEFAULT_GOAL := test

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	rm -rf runs/demo runs/demo-probe
	$(BIN)/python -m ssl_geo.pretrain --out runs/demo
	$(BIN)/python -m ssl_geo.probe --ckpt runs/demo --out runs/demo-probe --seeds 1
	@echo "open runs/demo/report.html and runs/demo-probe/report.html"

test: $(READY)
	$(BIN)/python -m pytest

# One after another: the first leaves a short run that the others look into.
notebooks: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 --nbmake --nbmake-timeout=600 notebooks

# Fifty kills of a run, each resumed; a handful of them are in the tests.
soak: $(READY)
	$(BIN)/python tests/soak/imagery.py runs/soak/imagery
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/kills.py --data runs/soak/imagery --kills 50 runs/soak/kills

# Ten thousand damaged inputs to each reader; a few hundred are in the tests.
fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/mutations.py --count 10000

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# After `make demo`: the pictures of README and site.
pictures: $(READY)
	$(BIN)/python docs/pictures.py runs/demo runs/demo-probe

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks

# Does pretraining pay? Meant for an hour on two cores; docs/learning.md says what came out.
study: $(READY)
	$(BIN)/python -m benchmarks.study --steps-real 800

# Two million chips on one GPU, in blocks of ten minutes: call it until it no longer ends with 75.
study-gpu: $(READY)
	$(BIN)/python -m benchmarks.study --only real --out runs/study-gpu --steps-real 31250 --block 540

ablation: $(READY)
	$(BIN)/python -m benchmarks.study.ablation
