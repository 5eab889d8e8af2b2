# make demo: from nothing to a table.  make test: the tests.  make setup: the set-up alone.
# The tests run two at a time, each on one thread: tiny models are quicker so, and large ones as quick.
# PYTHON chooses the interpreter, TORCH_INDEX the package index for torch (see scripts/install.sh).
.PHONY: setup demo test lint again

needs := constraints.txt pyproject.toml scripts/install.sh
ifdef TORCH_INDEX
needs += again  # another torch may be wanted than the one installed
endif
run := .venv/bin/python

setup: .venv/.installed
	$(run) -m steer_heal.model.smollm2_135m

demo: setup
	$(run) -m steer_heal.main -m reg=nll,kl_fwd,kl_rev,wd

test: setup .venv/.installed-dev
	OMP_NUM_THREADS=1 $(run) -m pytest -rs -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

lint: .venv/.installed-dev
	$(run) -m ruff format --check .
	$(run) -m ruff check .
	$(run) -m mypy

.venv/.installed: $(needs)
	scripts/install.sh
	touch $@

.venv/.installed-dev: $(needs) .venv/.installed
	scripts/install.sh dev
	touch $@
