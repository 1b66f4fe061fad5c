# `make demo`, `make task` and `make test`. Each installs what it needs into .venv.
PYTHON ?= python3
BIN    := .venv/bin
OUT    ?= runs/demo
ARGS   ?=

.PHONY: demo task test lint types docs clean

# What the demo needs; .venv/.installed adds what tests, lint and the site do.
.venv/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"alignpro needs Python 3.11 or newer; {sys.executable} is {v[0]}.{v[1]}. Try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@echo "installing into .venv (about 2 GB with the CPU build of torch; several GB with the CUDA build)"
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[llm]'
	@touch $@

.venv/.installed: .venv/.demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/.demo
	$(BIN)/alignpro demo --resume --out $(OUT) $(ARGS)

task: OUT = runs/task
task: .venv/.demo
	$(BIN)/alignpro demo --task plain-language --resume --out $(OUT) $(ARGS)

test: .venv/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

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
