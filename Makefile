# A thin front: DVC owns the graph (dvc.yaml), Python does the work (stages/). Nothing here is a second graph.
# A comment that starts with two hashes is a line of `make help`.

# What the command line sets, looked at before anything is; `override` keeps that, and `make -e`, from what this file sets.
override GIVEN := $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $v)),$v)) $(if $(filter command,$(origin v)),v)
.DEFAULT_GOAL := help
.SUFFIXES:
override SHELL := /bin/sh
override .SHELLFLAGS := -c
override PY := .venv/bin/python
override DVC := .venv/bin/dvc

# What each target takes beside DEVICE and PYTHON, which are set-up's; what it cannot do without (one of these), and an example.
override takes.repro := PROFILE
override takes.train := PROFILE BETA LOSS SEED
override takes.sweep := BETAS SEEDS GRID JOBS
override takes.review := BASE HEAD
override takes.verify := STAGE QUICK BITS
override takes.plan := PROFILE GPU PRICE
override takes.rehearse := PROFILE LAYERS PAIRS
override takes.base := RESOLVE
override takes.chat := MODEL
override takes.publish := REPO PROFILE LICENCE DATA PUSH
override takes.wandb-report := ENTITY SAVE
override takes.bench := FULL
override takes.doctor := PROFILE
override needs.sweep := BETAS SEEDS GRID
override needs.review := BASE
override needs.publish := REPO
override needs.wandb-report := ENTITY
override example.sweep := BETAS=0.05,0.1,0.2
override example.review := BASE=main
override example.publish := REPO=owner/name
override example.wandb-report := ENTITY=name
override SWITCHES := RESOLVE PUSH FULL QUICK DATA SAVE
override SETUP := DEVICE PYTHON
override SPLIT := -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder # of tests, a file to each free core

# Everything is checked here, before anything is set up. A value of the environment counts for set-up alone, so that a SEED that happens
# to be there changes no run; it is mentioned where the target could have taken it from the command line.
override GOALS := $(or $(value MAKECMDGOALS),help)
override comma := ,
override space := $(subst ,, )
override define newline


endef
override taken = $(takes.$1) $(if $(filter help,$1),,$(SETUP))
override listed = $(or $(subst $(space),$2,$(strip $1)),no variable)
override refuse = $(error make $1 does not take $2; it takes $(call listed,$(call taken,$1),$(comma) ))
override miss = $(error make $1 needs $(call listed,$(needs.$1), or ); for example: make $1 $(example.$1))
override check_goal = $(foreach v,$(filter-out $(call taken,$1),$(GIVEN)),$(call refuse,$1,$v)) \
	$(if $(needs.$1),$(if $(filter $(needs.$1),$(GIVEN)),,$(call miss,$1))) \
	$(foreach v,$(takes.$1),$(if $(filter environment,$(origin $v)),$(warning $v of the environment is not used; write: make $1 $v=...)))
override check_value = $(if $(strip $(value $1)),,$(error $1 is empty; give it a value or leave it out)) \
	$(if $(findstring $(newline),$(value $1)),$(error $1 has more than one line)) \
	$(if $(filter $1,$(SWITCHES)),$(if $(filter-out 1,$(value $1)),$(error $1 is 1 or is left out)))
override ignored := $(foreach goal,$(GOALS),$(call check_goal,$(goal))) $(foreach v,$(GIVEN),$(call check_value,$v))

# From here on a value is plain text, which make does not expand. `quote` makes one shell word of it, and `option` an option that
# cannot be taken for another: $(call option,PROFILE,--profile=) is --profile='...' where PROFILE is given, and nothing where it is not.
$(foreach v,$(GIVEN),$(eval override $v := $$(value $v)))
override MAKEOVERRIDES :=
$(foreach v,$(filter $(SETUP),$(GIVEN)),$(eval export $v))
unexport PYTHONPATH PYTHONHOME PYTHONSAFEPATH
unexport taken listed refuse miss check_goal check_value # make would expand one that the environment has, for a recipe
override quote = '$(subst ','\'',$1)'
override option = $(if $(filter $1,$(GIVEN)),$2$(call quote,$($1)))
override switch = $(if $(filter $1,$(GIVEN)),$2)

.PHONY: help setup checked repro train sweep verify experiments review chat report collect plan rehearse compare-published base publish wandb-report bench \
	test test-all test-slow lint format doctor gpu-check

help:
	@echo 'Every target sets .venv up first, and does so once. Variables go behind it; one that it does not take is refused.'
	@sed -n 's/^## \{0,1\}//p' Makefile

##
## Run
## make setup               install what the locks pin into .venv       make setup DEVICE=cpu PYTHON=/path/to/python3.12
setup:
	@./setup.sh

# A mistake anywhere in params.yaml stops a target that runs the experiment before it begins.
checked: setup
	@$(PY) -m tools.check_params $(call option,PROFILE,--profile=)
repro train sweep report plan rehearse publish wandb-report bench: checked

## make repro               bring every result up to date               make repro PROFILE=cpu
repro: setup
	$(PY) -m tools.repro $(call option,PROFILE,--profile=)

## make train               train, an experiment if a value is given    make train BETA=0.05 LOSS=ipo SEED=1 PROFILE=cpu
train: setup
	$(PY) -m tools.repro $(call option,PROFILE,--profile=) $(call option,BETA,--set-param=beta=) \
		$(call option,LOSS,--set-param=loss_type=) $(call option,SEED,--set-param=seed=) train

## make sweep               an experiment for each value, or of a grid  make sweep GRID='beta=0.05,0.1 seed=1,2' JOBS=2
sweep: setup
	$(PY) -m tools.sweep $(call option,BETAS,--betas=) $(call option,SEEDS,--seeds=) $(call option,GRID,--grid=) $(call option,JOBS,--jobs=)

## make verify              rebuild the committed results, compare bits  make verify STAGE=train QUICK=1
verify: setup
	$(PY) -m tools.verify $(call option,STAGE,--stage=) $(call option,BITS,--bits=) $(call switch,QUICK,--quick)

## make chat                talk to the trained model, in any form      make chat MODEL=gptq
chat: setup
	$(PY) -m tools.chat $(call option,MODEL,--model=)

##
## Read
## make experiments         this repository's experiments in a table
experiments: setup
	$(PY) -m tools.experiments

## make review              what a change does to the results           make review BASE=main HEAD=my-branch
review: setup
	$(PY) -m tools.review $(call option,BASE,--base=) $(call option,HEAD,--head=)

## make report              bring reports/ up to date
report: setup
	$(DVC) repro report

## make compare-published   the 2K subset beside the published one      after make repro PROFILE=a40_published
compare-published: setup
	$(PY) -m tools.compare_published

##
## Plan
## make doctor              find what breaks runs, and how to mend it   make doctor PROFILE=a40
doctor: setup
	$(PY) -m tools.doctor $(call option,PROFILE,--profile=)

## make plan                memory, disk and time that a profile needs  make plan PROFILE=a40 GPU=A40 PRICE=0.40
plan: setup
	$(PY) -m tools.plan $(call option,PROFILE,--profile=) $(call option,GPU,--gpu=) $(call option,PRICE,--price=)

## make rehearse            a profile on random weights of its shape    make rehearse PROFILE=a40 LAYERS=2 PAIRS=8
rehearse: setup
	$(PY) -m tools.rehearse $(call option,PROFILE,--profile=) $(call option,LAYERS,--layers=) $(call option,PAIRS,--pairs=)

## make gpu-check           try on a GPU what no CPU can                about ten minutes on an H100
gpu-check: setup
	$(PY) -m pytest -m gpu tests/gpu

##
## Make
## make base                merge the A40 profiles' base anew           make base RESOLVE=1
base: setup
	$(PY) -m tools.merge_base $(call switch,RESOLVE,--resolve)

## make collect             sample data/embedded, or go on with it
collect: setup
	$(DVC) repro fetch_model
	$(PY) -m tools.collect

## make publish             show a release, or push it                  make publish REPO=owner/name PROFILE=cpu PUSH=1
publish: setup
	$(PY) -m tools.publish $(call option,REPO,--repo=) $(call option,PROFILE,--profile=) $(call option,LICENCE,--licence=) \
		$(call switch,DATA,--data) $(call switch,PUSH,--push)

## make wandb-report        compose a W&B report, or save it           make wandb-report ENTITY=name SAVE=1
wandb-report: setup
	$(PY) -m tools.wandb_report $(call option,ENTITY,--entity=) $(call switch,SAVE,--save)

## make test                run the fast tests
test: setup
	$(PY) -m pytest -q $(SPLIT) -m 'not slow and not gpu' tests

## make test-all            run the slow ones too
test-all: setup
	@./setup.sh math
	$(PY) -m pytest -q $(SPLIT) -m 'not gpu' tests

## make test-slow           run the slow ones alone
test-slow: setup
	@./setup.sh math
	$(PY) -m pytest -q $(SPLIT) -m 'slow and not gpu' tests

## make lint                check style, formatting and types
lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

## make format              rewrite the code in the house format
format: setup
	.venv/bin/ruff check --fix-only --quiet .
	.venv/bin/ruff format .

## make bench               measure it beside the alternatives          make bench FULL=1
bench: setup
	$(DVC) repro tokenize
	$(PY) -m benchmarks.bench $(call switch,FULL,--full)
