# `make demo` and `make test` install everything that they need. The other targets are for developers.
VENV := .venv
PYTHON := $(VENV)/bin/python
SYSTEM_PYTHON ?= python3
# Extras of pyproject.toml to install. The image (cluster/Dockerfile) overrides them. `dev` also installs what tests compare with.
EXTRAS := demo,eval,dev
SOURCES := diffdis platform jobs tests docs/site_hooks.py install.py

NICENESS_test-ray := 0
NICENESS_test-unit := 5
NICENESS_test-ranks := 10

.PHONY: demo test test-ray test-ranks test-unit test-slow lint audit setup clean-demo

demo: setup
	@$(PYTHON) jobs/run_demo.py

# The tiers run in parallel, with more CPU time for those that take longer if they had all that they can use: the Ray tier waits
# for many short processes, and the unit tests are one process. More threads per process would only slow them down.
test: setup
	@$(MAKE) --no-print-directory --jobs 4 --keep-going --output-sync=target lint test-ray test-ranks test-unit

# Compiled modules are kept even where PYTHONDONTWRITEBYTECODE is set: each of Ray's workers would compile them again.
test-ray test-ranks test-unit: setup
	@CUDA_VISIBLE_DEVICES= PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 nice -n $(NICENESS_$@) $(PYTHON) -m pytest -m "$(@:test-%=%) and not slow and not gpu"

# Tests that take minutes: training runs with injected faults, other tracking stores, all recipes and pages.
test-slow: setup
	$(PYTHON) -m pytest -m slow

lint: setup
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(PYTHON) -m mypy diffdis platform/ray_platform platform/diffdis_platform jobs
	PYTHONPATH=platform $(VENV)/bin/lint-imports

# Ask an online service for known vulnerabilities of the pinned versions.
audit:
	.ci/audit

setup: $(VENV)/.installed

$(VENV)/.installed: install.py pyproject.toml constraints.txt
	@$(SYSTEM_PYTHON) install.py $(VENV) $(EXTRAS)
	@touch $@

clean-demo:
	rm -rf outputs/demo
