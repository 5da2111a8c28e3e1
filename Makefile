# The commands people type. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup test test-slow property lint bench ablate check compare-vllm compare-hf report ui clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# vLLM's own interpreter, built here unless VLLM_PYTHON names one that has vLLM
VLLM_PYTHON ?=
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
VLLM_BUILD := $(if $(shell command -v nvidia-smi),cuda,cpu)

# What an experiment can be told: `make ablate STUDY=my.yaml PROFILE=cpu MODEL=tiny SET="design.blocks=2 workloads.scaled.num_requests=16"`
STUDY ?=
PROFILE ?=
MODEL ?=
SET ?=
OPTIONS = $(if $(STUDY),--study $(STUDY)) $(if $(PROFILE),--profile $(PROFILE)) $(if $(MODEL),--model $(MODEL)) $(foreach s,$(SET),--set $(s))

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## build .venv with the exact versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the versions of constraints.txt into $(VENV) (about two minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check pip==$$(sed -n 's/^# pip==//p' constraints.txt)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[research]' --group dev
	@touch $@

ablate: $(READY)  ## what does each optimization buy on this machine: table, report, MLflow (resumes where it was stopped)
	@$(BIN)/python -m experiments ablate $(OPTIONS)

compare-vllm: $(READY) $(if $(VLLM_PYTHON),,$(VLLM_READY))  ## the engine against vLLM: same work, interleaved, outputs checked (VLLM_PYTHON=existing interpreter)
	@$(BIN)/python -m experiments compare --with vllm --python vllm=$(or $(VLLM_PYTHON),$(VLLM_VENV)/bin/python) $(OPTIONS)

compare-hf: $(READY)  ## the engine against HF transformers, the same way
	@$(BIN)/python -m experiments compare --with hf $(OPTIONS)

$(VLLM_READY): requirements/vllm-$(VLLM_BUILD).txt
	@test -x $(VLLM_VENV)/bin/python || { echo "creating $(VLLM_VENV)"; $(PYTHON) -m venv $(VLLM_VENV); }
	@echo "installing vLLM ($<) into $(VLLM_VENV): two to five minutes and $(if $(filter cpu,$(VLLM_BUILD)),3,12) GB, once"
	@$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check $$(grep '^torch==' $<)
	@$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check $(if $(filter cpu,$(VLLM_BUILD)),--no-deps) -r $<
	@touch $@

check: $(READY) $(if $(VLLM_PYTHON),,$(VLLM_READY))  ## is the output right: all pairs of switches, HF and vLLM through the gate; broken engines must fail
	@$(BIN)/python -m experiments check --python vllm=$(or $(VLLM_PYTHON),$(VLLM_VENV)/bin/python) $(if $(PROFILE),--profile $(PROFILE)) $(if $(MODEL),--model $(MODEL))

test: $(READY)  ## the test suite, under ten minutes on two cores
	@$(BIN)/python -m pytest -m "not slow and not bench"

test-slow: $(READY)  ## what takes longer
	@$(BIN)/python -m pytest -m slow

# `make property`: the fast profile, as in `make test`; DEEP=1: thousands of examples, over an hour; REPEAT=50: fast with 50 seeds;
# MATRIX=1: which property kills which bad implementation, written to docs/bad-implementations.md.
property: $(READY)  ## property tests alone (DEEP=1: over an hour; REPEAT=50: as many seeds; MATRIX=1: the page of bad implementations)
ifdef REPEAT
	@$(BIN)/python -m property_tests.repeat $(REPEAT)
else ifdef MATRIX
	@PYTHONPATH=src:. $(BIN)/python -m property_tests.kill_matrix --write
else ifdef DEEP
	@$(BIN)/python -m pytest property_tests -k "not bad_implementation" --hypothesis-profile=deep --timeout=0 --durations=0
else
	@$(BIN)/python -m pytest property_tests -m "not slow"
endif

lint: $(READY)  ## ruff, mypy, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@PYTHONPATH=src:. $(BIN)/lint-imports

bench: $(READY)  ## pytest-benchmark: scheduler, block manager, kernels
	@$(BIN)/python -m pytest -m bench --benchmark-only --benchmark-columns=median,iqr,ops,rounds

report: $(READY)  ## render every published report, the claims and the questions from their records (RUN=folder: that execution's)
	@$(if $(RUN),$(BIN)/python -m experiments report $(RUN),PYTHONPATH=src:. $(BIN)/python -m reports published)

ui: $(READY)  ## MLflow on 127.0.0.1:5000
	@$(BIN)/mlflow ui --host 127.0.0.1

clean:  ## remove caches and built checkpoints; records in runs/ and mlflow.db stay
	rm -rf .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks build dist
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
