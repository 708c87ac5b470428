# A thin front: DVC owns the graph (dvc.yaml), Python does the work (stages/). Nothing here is a second graph.
# A comment that starts with two hashes is a line of `make help`.

.DEFAULT_GOAL := help
.SUFFIXES:
SHELL := /bin/sh
PY := .venv/bin/python
DVC := .venv/bin/dvc

# A variable as one shell word, whatever it holds.
quote = '$(subst ','\'',$(1))'
# A required variable: stops with an example where it is empty, before anything is set up.
need = $(if $($(1)),,$(error $(1) is missing; for example: make $(2)))
comma := ,

.PHONY: help setup repro train sweep review chat report collect plan rehearse compare-published base publish bench test test-all lint format \
	doctor gpu-check need-BETAS need-BASE need-REPO

help:
	@echo 'Every target sets .venv up first, and does so once.'
	@echo
	@sed -n 's/^## //p' Makefile

## make setup       install what the locks pin for the device into .venv  PYTHON=/path/to/python3.12 DEVICE=cpu make setup
setup:
	@./setup.sh

## make repro       bring every result up to date                         make repro PROFILE=cpu
repro: setup
	$(PY) -m tools.repro $(if $(PROFILE),--profile $(call quote,$(PROFILE)))

OVERRIDES = $(if $(BETA),-S $(call quote,beta=$(BETA))) $(if $(LOSS),-S $(call quote,loss_type=$(LOSS))) \
	$(if $(SEED),-S $(call quote,seed=$(SEED)))

## make train       train, as an experiment when a value is given         make train BETA=0.05 LOSS=ipo SEED=1
train: setup
	$(DVC) $(if $(strip $(OVERRIDES)),exp run $(strip $(OVERRIDES)) train,repro train)

## make sweep       one experiment for each beta, or for each seed        make sweep BETAS=0.05,0.1,0.2
need-BETAS:
	@:$(if $(SEEDS),,$(call need,BETAS,sweep BETAS=0.05$(comma)0.1$(comma)0.2))
sweep: need-BETAS setup
	$(PY) -m tools.sweep $(if $(BETAS),--betas $(call quote,$(BETAS))) $(if $(SEEDS),--seeds $(call quote,$(SEEDS)))

## make review      what a change does to the results                     make review BASE=main HEAD=my-branch
need-BASE:
	@:$(call need,BASE,review BASE=main)
review: need-BASE setup
	$(PY) -m tools.review --base $(call quote,$(BASE)) $(if $(HEAD),--head $(call quote,$(HEAD)))

## make chat        talk to the trained model
chat: setup
	$(PY) -m tools.chat

## make plan        memory, disk and time that a profile needs            make plan PROFILE=a40 GPU='RTX 4090'
plan: setup
	$(PY) -m tools.plan $(if $(PROFILE),--profile $(call quote,$(PROFILE))) $(if $(GPU),--gpu $(call quote,$(GPU)))

## make rehearse    a profile on random weights of its model's shape      make rehearse PROFILE=a40
rehearse: setup
	$(PY) -m tools.rehearse $(if $(PROFILE),--profile $(call quote,$(PROFILE))) $(if $(LAYERS),--layers $(call quote,$(LAYERS))) \
		$(if $(PAIRS),--pairs $(call quote,$(PAIRS)))

## make compare-published   the 2K subset beside the published one        after make repro PROFILE=a40_published
compare-published: setup
	$(PY) -m tools.compare_published

## make base        merge the A40 profiles' base anew                      make base RESOLVE=1
base: setup
	$(PY) -m tools.merge_base $(if $(RESOLVE),--resolve)

## make publish     show a release, or push it                            make publish REPO=owner/name PROFILE=cpu PUSH=1
need-REPO:
	@:$(call need,REPO,publish REPO=owner/name)
publish: need-REPO setup
	$(PY) -m tools.publish --repo $(call quote,$(REPO)) $(if $(PROFILE),--profile $(call quote,$(PROFILE))) \
		$(if $(LICENCE),--licence $(call quote,$(LICENCE))) $(if $(PUSH),--push)

## make report      bring reports/ up to date, and what it rests on
report: setup
	$(DVC) repro report

## make collect     sample data/embedded again, where it stopped
collect: setup
	$(DVC) repro fetch_model
	$(PY) -m tools.collect

## make bench       measure it beside the alternatives                    make bench FULL=1
bench: setup
	$(DVC) repro tokenize
	$(PY) -m benchmarks.bench $(if $(FULL),--full)

## make test        run the fast tests
test: setup
	$(PY) -m pytest -q -m 'not slow and not gpu' tests

## make test-all    run the slow ones too
test-all: setup
	@./setup.sh math
	$(PY) -m pytest -q -m 'not gpu' tests

## make lint        check style, formatting and types
lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

## make format      rewrite the code in the house format
format: setup
	.venv/bin/ruff check --fix-only --quiet .
	.venv/bin/ruff format .

## make doctor      look for what breaks runs, and say how to mend it     make doctor PROFILE=a40
doctor: setup
	$(PY) -m tools.doctor $(if $(PROFILE),--profile $(call quote,$(PROFILE)))

## make gpu-check   try on the GPU that is here what no CPU can           about ten minutes
gpu-check: setup
	$(PY) -m tools.gpu_check
