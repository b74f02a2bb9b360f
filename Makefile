# `make demo` and `make test` install everything that they need. The other targets are for developers.
VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := $(VENV)/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt
# Extras of pyproject.toml to install. The image (cluster/Dockerfile) overrides them. `dev` also installs the peers below.
EXTRAS := demo,eval,dev
SOURCES := diffdis platform jobs tests docs/site_hooks.py

.PHONY: demo test test-ray test-ranks test-unit test-slow lint audit setup clean-demo

demo: setup
	@$(PYTHON) jobs/run_demo.py

# The tiers run in parallel because the Ray tier mostly waits for processes. More threads per process would only slow them down.
test: setup
	@$(MAKE) --no-print-directory --jobs 4 --keep-going --output-sync=target lint test-ray test-ranks test-unit

test-ray test-ranks test-unit: setup
	@OMP_NUM_THREADS=1 $(if $(filter test-ray,$@),,nice) $(PYTHON) -m pytest -m "$(@:test-%=%) and not slow and not gpu"

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

# torch is installed first and pinned: resolving it later could select another build and download its CUDA packages.
# deepspeed is installed without build isolation because its setup imports torch; DS_BUILD_OPS=0 skips compiling its kernels.
# The peer libraries that the tests compare results with are installed without dependencies: torchvision breaks diffusers when
# it is installed alongside the CPU build of torch.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a few minutes, once) …"
	@python3 -c 'import sys; sys.exit("error: Python 3.11 or newer is required, but this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@test -x $(PYTHON) || python3 -m venv $(VENV)
	@$(PIP) torch setuptools wheel ninja packaging
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable ".[$(EXTRAS)]"
	@$(if $(findstring dev,$(EXTRAS)),$(PIP) --no-deps clip-benchmark torch-fidelity torchmetrics lightning-utilities foolbox)
	@touch $@

clean-demo:
	rm -rf outputs/demo
