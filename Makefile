# Everything from a fresh clone: `make demo`, `make test`. The environment lives in .venv (or set VENV=...).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test notebooks lint format bench soak docs pictures fuzz audit lock study study-gpu ablation
.DEFAULT_GOAL := test

# Every dependency is checked against the registry's sha256 and comes as a wheel: nothing of it is built or run here. Then the
# project itself, with nothing fetched. Elsewhere than on Linux (x86_64, aarch64): pip install -e '.[dev]' -c constraints.txt
$(READY): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes --no-deps --only-binary :all: --requirement requirements.lock
	$(PIP) --no-index --no-deps --no-build-isolation --editable .
	$(BIN)/pip check
	touch $@

demo: $(READY)
	rm -rf runs/demo runs/demo-probe
	$(BIN)/python -m ssl_geo.pretrain --out runs/demo
	$(BIN)/python -m ssl_geo.probe --ckpt runs/demo --out runs/demo-probe --seeds 1
	@echo "open runs/demo/report.html and runs/demo-probe/report.html"

test: $(READY)
	$(BIN)/python -m pytest

# One after another: the first leaves a short run that the others look into. Then each on a folder of small sites.
notebooks: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 --nbmake --nbmake-timeout=600 notebooks
	rm -rf runs/notebooks-sites
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/notebooks.py runs/notebooks-sites

# Fifty kills of a run, each resumed; a handful of them are in the tests.
soak: $(READY)
	$(BIN)/python tests/soak/imagery.py runs/soak/imagery
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/kills.py --data runs/soak/imagery --kills 50 runs/soak/kills
	rm -rf runs/soak/hostile
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/hostile.py runs/soak/hostile

# Ten thousand damaged inputs to each reader; a few hundred are in the tests.
fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/mutations.py --count 10000

# Known vulnerabilities and licences of what is installed; ADVISORIES: a checkout of the public pypa/advisory-database.
audit: $(READY)
	$(BIN)/python tests/soak/audit.py $(ADVISORIES)

# After a change of pyproject.toml or constraints.txt: the same versions with the registry's hashes. Wants uv (pip install uv).
lock:
	uv pip compile pyproject.toml --extra dev --constraint constraints.txt --python-version 3.11.5 \
	  --python-platform x86_64-manylinux_2_28 --only-binary :all: --generate-hashes --no-header --no-annotate \
	  --output-file requirements.lock

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
