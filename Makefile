# make quickstart   installs, then trains a tiny Qwen3 to reason on two CPU cores
# make test         installs, then runs lint, type check and all tests
# make cluster      runs the tests on a Slurm of two loopback nodes and on three network namespaces (part of `make test`)
# make container    builds the CPU image with buildah and runs `make test` in it (root; an hour)
VENV ?= .venv
RUN := $(VENV)/bin
export OMP_NUM_THREADS := 1

.PHONY: install quickstart test waiting computing cluster container lint packages bench clean

install:
	@tools/install.sh $(VENV)

quickstart: install
	$(RUN)/python examples/quickstart/quickstart.py

# Where they cannot be installed, the tests that need them say so by name.
packages:
	@tools/install_cluster_packages.sh || true

# Beside each other: tests that mostly wait, for servers, jobs and networks, and tests that compute.
test: lint packages
	@$(MAKE) --no-print-directory --jobs 2 --keep-going waiting computing

WAITING := tests/sglang tests/cluster

waiting:
	$(RUN)/python -m pytest -q $(WAITING)

computing:
	$(RUN)/python -m pytest -q $(WAITING:%=--ignore=%)

cluster: install packages
	$(RUN)/python -m pytest -q tests/cluster

container:
	tests/container.sh

lint: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: install
	for program in benchmarks/*.py; do echo "== $$program"; $(RUN)/python $$program || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
