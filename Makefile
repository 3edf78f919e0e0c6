# make plan    one real job, end to end, on a fresh machine (no torch)
# make setup   the development install that everything else builds on
# make test    every test
.POSIX:
.PHONY: plan setup test slow lint bench accuracy exactness exactness-old clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?= meta-llama/Llama-3.1-8B --method qlora --gpu rtx-4090 --task instruction-tuning --trainer trl

plan: $(VENV)/.brim
	$(BIN)/brim plan $(ARGS) --out plan.json --export trl

setup: $(VENV)/.dev

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .

accuracy: $(VENV)/.dev
	$(BIN)/python benchmarks/accuracy.py benchmarks/truth/memory.jsonl --report

exactness: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/exactness.py

# The oldest releases that brim guards: a handful of classes, in an environment of their own.
exactness-old: $(VENV)-old/.dev
	HF_HUB_OFFLINE=1 PYTHONPATH=src $(VENV)-old/bin/python benchmarks/exactness.py --old

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/speed.py --out benchmarks/results/speed.md

clean:
	rm -rf $(VENV) $(VENV)-old build dist plan.json

# Each stamp is younger than what it was made from, so that rerunning is quick.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.brim: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	$(BIN)/python -m compileall -q src/brim
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints-test.txt
	$(BIN)/python -m compileall -q src/brim
	touch $@ $(VENV)/.brim

$(VENV)-old/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)-old
	$(VENV)-old/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[train]' \
	  transformers==4.46.0 trl==0.12.0 accelerate==1.1.1 peft==0.13.2 'tokenizers<0.21'
	touch $@
