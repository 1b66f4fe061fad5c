# `make demo`, `make task` and `make test`. Each installs what it needs into .venv; `make gpu` takes PYTHON as it is
# where there is none.
PYTHON ?= python3
BIN    := .venv/bin
OUT    ?= runs/demo
ARGS   ?=

.PHONY: demo task test gpu lock lint types docs clean

# What the demo needs; .venv/.installed adds what tests, lint and the site do. Every package is held to the hashes
# of requirements/, but for torch and what it brings for GPUs, of which there are several builds.
.venv/.demo: pyproject.toml requirements/torch.txt requirements/llm.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"alignpro needs Python 3.11 or newer; {sys.executable} is {v[0]}.{v[1]}. Try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@echo "installing into .venv (about 2 GB with the CPU build of torch; several GB with the CUDA build)"
	$(BIN)/pip install --quiet --require-hashes --no-deps --requirement requirements/llm.lock
	$(BIN)/pip install --quiet --requirement requirements/torch.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.installed: .venv/.demo requirements/dev.lock
	$(BIN)/pip install --quiet --require-hashes --no-deps --requirement requirements/dev.lock
	@touch $@

# Newer versions of everything, for every system and Python, as far as pyproject.toml lets them.
LOCK = $(BIN)/uv pip compile pyproject.toml requirements/also.in --override requirements/apart.txt --universal \
	--python-version 3.11 --generate-hashes --no-header --no-annotate --quiet --upgrade
lock:
	$(BIN)/pip install --quiet uv
	$(LOCK) --extra llm --output-file requirements/llm.lock
	$(LOCK) --extra dev --output-file requirements/dev.lock

demo: .venv/.demo
	$(BIN)/alignpro demo --resume --out $(OUT) $(ARGS)

task: OUT = runs/task
task: .venv/.demo
	$(BIN)/alignpro demo --task plain-language --resume --out $(OUT) $(ARGS)

test: .venv/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(ARGS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell README.md CHANGELOG.md docs experiments alignpro

types: .venv/.installed
	$(BIN)/mypy

docs: .venv/.installed
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/docs
	@echo "wrote build/docs/index.html"

clean:
	rm -rf .venv build runs
