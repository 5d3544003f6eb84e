# make reproduce   from an empty machine to the results table, on phantom studies (about five minutes, no data needed)
# make audit       the same run held against its controls, leaks and the released code's defects (forty minutes more)
# make test        everything the project promises, checked: notebooks, tests, a smoke run, the pages
# make lab         JupyterLab on the notebooks            make docs    the pages, in _docs/
# make install     the environment of requirements.lock   make hooks   git hooks that keep notebooks clean
# make clean       remove what can be made again (runs/ and the environment stay)
#
# Settings: STUDIES=400 SEED=1 TEST=0.2 PRESET=smoke VENV=/elsewhere PYTHON=/path/to/python3.11

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: reproduce audit install test lab docs clean hooks smoke drift cohort fine elsewhere
.DEFAULT_GOAL := reproduce

VENV ?= .venv
BIN = $(VENV)/bin
STUDIES ?= 1800
SIZE ?= 320
SEED ?= 13
TEST ?= 0.38
PRESET ?= quickstart
RUN ?= runs/$(PRESET)
IS_311 = import sys; sys.exit(sys.version_info[:2] != (3, 11))
PYTHON ?= $(shell for p in python3.11 python3 python; do if $$p -c '$(IS_311)' 2>/dev/null; then echo $$p; break; fi; done)
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

reproduce: cohort
	@$(BIN)/neural run --preset $(PRESET) --manifest build/phantom/manifest.csv --run $(RUN)

# The environment is made again only when the lock or the packaging changed.
install:
	@if ! "$(PYTHON)" -c '$(IS_311)' 2>/dev/null; then echo "Python 3.11 is needed and was not found. Install it, or name it: make install PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@want="$$(cat requirements.lock pyproject.toml | cksum) $$(pwd)"; \
	if [ "$$(cat $(VENV)/.installed 2>/dev/null || true)" != "$$want" ]; then \
	  echo "installing the environment into $(VENV) (a few minutes, about 2 GB)"; \
	  "$(PYTHON)" -m venv $(VENV) || { echo "python -m venv failed; on Debian and Ubuntu install python3.11-venv" >&2; exit 1; }; \
	  $(BIN)/python -m pip install -qq -r requirements.lock; \
	  $(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .; \
	  echo "$$want" > $(VENV)/.installed; \
	fi

# The audit also reads the same studies at 1024 pixels, a cohort drawn from another seed, and the published numbers of Open-i. Paths given to a stage are relative to the run folder.
audit: cohort fine elsewhere
	@$(BIN)/neural run 10-59 --preset $(PRESET) --manifest build/phantom/manifest.csv --run $(RUN) -p fine=../../build/phantom-1024/manifest.csv -p elsewhere=../../build/elsewhere/manifest.csv -p beside=../../figures/open-i

# Memory a film leaves is kept for the next one, not handed back to the kernel page by page: a sixth of the drawing, on Linux.
KEEP = MALLOC_TRIM_THRESHOLD_=268435456 MALLOC_MMAP_THRESHOLD_=33554432

# $(call draw,FOLDER,STUDIES,SIZE,SEED): phantom studies and their manifest; made again when a setting or the code that draws them changed.
define draw
	@want="$(2) $(3) $(4) $(TEST) $$(cat neural/phantom.py neural/study.py | cksum)"; \
	if [ "$$(cat $(1).made 2>/dev/null || true)" != "$$want" ]; then \
	  rm -rf $(1) $(1).made; mkdir -p build; \
	  $(KEEP) $(BIN)/neural phantom $(1) --studies $(2) --size $(3) --seed $(4) --test $(TEST); \
	  $(BIN)/neural index mimic-cxr $(1) -o $(1)/manifest.csv --labels $(1)/truth/labels.csv; \
	  echo "$$want" > $(1).made; \
	fi
endef

cohort: install
	$(call draw,build/phantom,$(STUDIES),$(SIZE),$(SEED))

fine: install
	$(call draw,build/phantom-1024,$(STUDIES),1024,$(SEED))

elsewhere: install
	$(call draw,build/elsewhere,400,$(SIZE),$$(($(SEED) + 1000)))

test: install
	@$(MAKE) --no-print-directory drift
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --path nbs/api --n_workers 2
	$(BIN)/python -m pytest -q
	@$(MAKE) --no-print-directory smoke
	@$(MAKE) --no-print-directory docs

# A fresh export and clean must change nothing. Told only from a clean checkout; elsewhere tests/test_house.py compares modules with notebooks.
drift:
	@if ! git rev-parse --git-dir >/dev/null 2>&1; then echo "drift check left out: not a git checkout"; \
	elif [ -n "$$(git status --porcelain)" ]; then echo "drift check left out: the checkout has changes of its own"; \
	else $(BIN)/nbdev_export; $(BIN)/nbdev_clean; changed="$$(git status --porcelain)"; \
	  if [ -n "$$changed" ]; then echo "notebooks and modules have drifted apart; run nbdev_export and nbdev_clean, and commit:" >&2; echo "$$changed" >&2; exit 1; fi; fi

# Every stage notebook, small, by papermill.
smoke: install
	@rm -rf build/smoke; mkdir -p build
	@$(BIN)/neural phantom build/smoke/cohort --studies 160 --size 192 --seed 3
	@$(BIN)/neural index mimic-cxr build/smoke/cohort -o build/smoke/manifest.csv --labels build/smoke/cohort/truth/labels.csv
	@$(BIN)/neural run --preset smoke --manifest build/smoke/manifest.csv --run build/smoke/run

docs: install
	@$(BIN)/python -m neural.docs

lab: install
	@$(BIN)/jupyter lab nbs

hooks: install
	@$(BIN)/nbdev_install_hooks

clean:
	@rm -rf build _proc _docs _site_src .pytest_cache .last_checked
	@find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf
