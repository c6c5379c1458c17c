# Every target works alone on a machine with Python >= 3.11 and git: the environment is made when it is missing, and
# again when pyproject.toml or constraints.txt changes. Nothing needs an activated environment or a terminal.
#
#   make demo                       the whole story on real data, ending in demo/report.html
#   make test PYTHON=python3.12     another interpreter for a new environment
#
# `check` depends on `test`, and make runs a target once per call: `make check test demo` runs the tests once.
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) choose where packages come from, such as a CPU build of torch.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# Two test processes with one torch thread each: two threads on a busy two-core machine can be 100 times slower than one.
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check format lint types contract slow fuzz results coupling studies sst2 clean

help:  ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1\t/' | expand -t 12

demo: $(VENV)/.stamp-demo  ## Train, prune, fine-tune and measure a small network; write demo/report.html
	$(BIN)/secateur demo $(ARGS)

test: $(VENV)/.stamp-dev  ## All tests but the slow ones, with coverage of src/ of at least 90 %
	$(BIN)/python -m pytest -m "not slow" --cov --cov-report=term:skip-covered --cov-fail-under=90 $(ARGS)

check: format lint types contract test  ## What must pass before a change goes in: format, lint, types, imports, tests

format: $(VENV)/.stamp-dev  ## Is every file formatted? (.venv/bin/ruff format mends it)
	$(BIN)/ruff format --check .

lint: $(VENV)/.stamp-dev  ## Lint
	$(BIN)/ruff check .

types: $(VENV)/.stamp-dev  ## Type-check the package, strictly
	$(BIN)/mypy

contract: $(VENV)/.stamp-dev  ## Do imports point one way?
	$(BIN)/lint-imports

slow: $(VENV)/.stamp-dev  ## The tests that take long (compilers, real training)
	$(BIN)/python -m pytest -m slow $(ARGS)

NETS ?= 10000
FIRST ?= 0
fuzz: $(VENV)/.stamp-dev  ## Laws over 10,000 generated nets (NETS=...), in numbered portions of 50 (FIRST=... goes on from there)
	SECATEUR_FUZZ_NETS=$(NETS) SECATEUR_FUZZ_FIRST=$(FIRST) $(BIN)/python -m pytest -vv --dist=worksteal tests/test_fuzz.py $(ARGS)

results: $(VENV)/.stamp-dev  ## Train and prune ResNet-20 on CIFAR-10, then write docs/results.md
	$(BIN)/python benchmarks/cifar10_resnet20.py $(ARGS)
	$(BIN)/python benchmarks/write_results.py

coupling: $(VENV)/.stamp-dev  ## Prune every architecture of the zoo with Secateur and with Torch-Pruning, side by side
	$(BIN)/python benchmarks/coupling.py $(ARGS)
	$(BIN)/python benchmarks/write_results.py

# What is missing of a study, and what is kept of it: command, file, profile, folder in docs/studies/.
define study
	$(1) study run studies/$(2).toml --profile $(3) $(ARGS)
	$(1) study report studies/$(2).toml --profile $(3) --out docs/studies/$(4)
	$(1) study rows studies/$(2).toml --profile $(3) > docs/studies/$(4)/rows.csv

endef

studies: $(VENV)/.stamp-dev  ## Run the source documents' studies at the scale of a CPU, and write their reports to docs/studies/
	$(foreach name,s1 s2 s3 s4 s5,$(call study,$(BIN)/secateur,$(name),cpu,$(name)))
	$(call study,$(BIN)/secateur,s3,wide,s3_wide)
	$(BIN)/python benchmarks/study_index.py

runs/minilm: $(VENV)/.stamp-dev $(VENV)/.stamp-minilm
	$(BIN)/python benchmarks/minilm.py $@

sst2: runs/minilm  ## Run the studies of text classifiers on SST-2, and write their reports to docs/studies/
	$(foreach name,sst2_weights sst2_weights_sgd sst2_structured,$(call study,$(BIN)/python benchmarks/text_studies.py,$(name),cpu,$(name)))
	$(BIN)/python benchmarks/study_index.py

clean:  ## Remove the environment and everything generated
	rm -rf $(VENV) demo runs build htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# `.stamp-demo` and `.stamp-dev` say that the extra of that name is installed. The build tools are pinned like the rest,
# hence no build isolation, which would fetch its own.
$(VENV)/.stamp-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Secateur needs Python 3.11 or newer, $(PYTHON) is not: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
