# `make demo` and `make test` do all their own set-up. Everything else is for developers.
VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := $(VENV)/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt
# What else is installed, of pyproject.toml's extras. The image (cluster/Dockerfile) sets its own; dev brings the peers, too.
EXTRAS := demo,eval,dev
SOURCES := diffdis platform jobs tests

.PHONY: demo test test-ray test-ranks test-unit test-slow lint audit setup clean-demo

demo: setup
	@$(PYTHON) jobs/run_demo.py

# Side by side, because the Ray tier waits for processes most of the time. More threads per process only slow them down.
test: setup
	@$(MAKE) --no-print-directory --jobs 4 --keep-going --output-sync=target lint test-ray test-ranks test-unit

test-ray test-ranks test-unit: setup
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "$(@:test-%=%) and not slow and not gpu"

# What takes minutes: trainings that fail in every way, other tracking stores, all recipes and pages.
test-slow: setup
	$(PYTHON) -m pytest -m slow

lint: setup
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(PYTHON) -m mypy diffdis platform/ray_platform platform/diffdis_platform jobs
	PYTHONPATH=platform $(VENV)/bin/lint-imports

# Asks a service in the network for known vulnerabilities of the pinned versions.
audit:
	.ci/audit

setup: $(VENV)/.installed

# torch first and pinned: a later resolve that wants another torch would fetch its CUDA packages.
# deepspeed without build isolation: its set-up imports torch; DS_BUILD_OPS=0 compiles nothing.
# The peers whose results the tests compare with, without their requirements: torchvision breaks diffusers beside CPU torch.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a few minutes, once) …"
	@python3 -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@test -x $(PYTHON) || python3 -m venv $(VENV)
	@$(PIP) torch setuptools wheel ninja packaging
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable ".[$(EXTRAS)]"
	@$(if $(findstring dev,$(EXTRAS)),$(PIP) --no-deps clip-benchmark torch-fidelity torchmetrics lightning-utilities foolbox)
	@touch $@

clean-demo:
	rm -rf outputs/demo
