# make quickstart   the whole job on synthetic receipts, on a CPU, in a few minutes
# make test         everything that must hold: generated files fresh, notebooks, pytest, pages, README
# make test-all     that, and the tests that take minutes
# make docs         check the site's pages; build them where Quarto is installed
# make readme       README.md from nbs/index.ipynb
# make bench        measure the figures that README shows again, and record them
# Each makes .venv when it is missing and reuses it when it is not.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
RESULTS := nbs/bench/results

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all docs readme bench fresh notebooks

help:
	@sed -n 's/^# //p' Makefile

.venv/bin/python:
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ...'; exit 1; }
	'$(PYTHON)' -m venv .venv

# torch first, so that nothing later chooses a build of it
.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	python -m pip install -q -c constraints.txt torch setuptools wheel
	python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

quickstart: .venv/installed
	vlm quickstart

# What nbdev-export and nbdev-clean write must be there already: the tree is the same before and after.
STATE = { git status --porcelain && git diff | git hash-object --stdin; }

fresh: .venv/installed
	@set -e; before=$$($(STATE)); nbdev-export; nbdev-clean; after=$$($(STATE)); \
	if [ "$$before" != "$$after" ]; then git status --short; \
	echo 'Generated files or notebooks were stale. They are fresh now: look at them, commit them, run it again.'; exit 1; fi

notebooks: fresh
	OMP_NUM_THREADS=1 nbdev-test --n-workers 2 --timing

test: notebooks
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile

test-all: test
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile -m slow -rs

docs: .venv/installed
	@command -v quarto >/dev/null || echo 'Without Quarto the pages are checked, not built: https://quarto.org/docs/get-started/'
	python tests/docs_check.py
	@! command -v quarto >/dev/null || nbdev-docs

readme: .venv/installed
	python tests/readme.py

bench: .venv/installed
	rm -rf runs/recorded && mkdir -p $(RESULTS)
	vlm quickstart runs/recorded --json > $(RESULTS)/quickstart.json.new
	mv $(RESULTS)/quickstart.json.new $(RESULTS)/quickstart.json
	python tests/readme.py
