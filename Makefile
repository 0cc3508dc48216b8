SHELL := /bin/bash

CONFIG   ?= configs/first.yaml
RUN      ?= first
ARGS     ?=
TORCHREC ?= 1.8.0
EXTRAS   ?= examples,serve,dev

# A GPU set where a driver answers, the CPU set elsewhere; DEVICE=cpu overrules.
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
NPROC  ?= $(if $(filter gpu,$(DEVICE)),$(shell nvidia-smi -L | wc -l),2)

VENV  := .venv$(if $(filter-out 1.8.0,$(TORCHREC)),-torchrec-$(TORCHREC))
BIN   := $(VENV)/bin
COMMA := ,
STAMP := $(VENV)/.complete-$(DEVICE)-$(subst $(COMMA),-,$(EXTRAS))

# The shipped purchases are prepared when the configuration reads them from there.
SHIPPED := data/completejourney
DATA    := $(if $(shell grep -l '$(SHIPPED)' $(CONFIG) 2>/dev/null),$(SHIPPED)/manifest.json)

.DEFAULT_GOAL := help
.PHONY: help venv data train test test-faults lint doctor clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  CONFIG=$(CONFIG) RUN=$(RUN) NPROC=$(NPROC) DEVICE=$(DEVICE) TORCHREC=$(TORCHREC)"
	@echo "  ARGS='key.sub=value …' is appended to the training command."

venv: $(STAMP) ## virtual environment with the CPU or GPU version set

# A moved or deleted interpreter leaves a stamp without an environment.
ifneq ($(shell $(BIN)/python -c '' 2>/dev/null && echo runs),runs)
.PHONY: $(STAMP)
endif
$(STAMP): setup.cfg pyproject.toml $(wildcard packaging/*.txt packaging/*.sh packaging/*/*)
	@packaging/install.sh $(VENV) $(DEVICE) $(TORCHREC) $(EXTRAS) $@

data: $(SHIPPED)/manifest.json ## prepare the shipped purchases
$(SHIPPED)/manifest.json: | $(STAMP)
	$(BIN)/longer-rec prepare completejourney --out $(SHIPPED)

# OMP_NUM_THREADS=1: two threads a rank are slower and erratic on CPU. TORCH_DISABLE_SHARE_RDZV_TCP_STORE: a rank
# that is restarted would otherwise dial its dead peer's old port (pytorch#135712).
train: $(STAMP) $(DATA) ## train CONFIG on NPROC ranks into runs/RUN, evaluate, write report.html
	OMP_NUM_THREADS=1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \
	  $(BIN)/torchrun --standalone --nproc_per_node $(NPROC) -m longer_rec train $(CONFIG) run_dir=runs/$(RUN) $(ARGS)

test: lint ## lint, then every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

test-faults: $(STAMP) ## every fault test at its full count; writes benchmarks/results/reliability_*.md
	OMP_NUM_THREADS=1 LONGER_REC_FAULTS=full $(BIN)/python -m pytest tests/integration/faults tests/integration/serving/test_server.py \
	  tests/integration/test_portable.py tests/unit/test_user_cache.py --timeout 3600 $(ARGS)

lint: $(STAMP) ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

doctor: $(STAMP) ## what this machine can and cannot do
	$(BIN)/longer-rec doctor

clean: ## remove environments and caches; data/ and runs/ stay
	rm -rf .venv .venv-torchrec-* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
