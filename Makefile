# make compare   the main job: set up, then compare methods on the built-in model; writes laconic-report/
# make test      set up, then check the style and run the tests
# make bench     set up, then run the speed suite
# make docs      set up, then build the documentation into build/site
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(if $(shell $(p) -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null | grep True),$(p))))
VENV := .venv
STAMP := $(VENV)/.ready

.PHONY: setup compare test bench docs clean
.DEFAULT_GOAL := compare

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Laconic needs Python 3.11 or newer on the PATH (or PYTHON=/path/to/python)." >&2; exit 2; }
	@test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

compare: $(STAMP)
	$(VENV)/bin/laconic compare

test: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest

bench: $(STAMP)
	$(VENV)/bin/laconic bench

docs: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(VENV)/bin/python -m laconic.docs docs/methods.md
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

clean:
	rm -rf $(VENV) laconic-report build dist *.egg-info
