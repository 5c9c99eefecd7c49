# make quickstart   install, then train a tiny Qwen3 to reason on two CPU cores
# make check        install, then run lint, type check and the fast unit tests (a few minutes)
# make test         install, then run lint, type check and all tests
# make cluster      run the tests on Slurm (two loopback nodes) and on three network namespaces (part of `make test`)
# make container    build the CPU image with buildah and run `make test` in it (needs root; takes an hour)
VENV ?= .venv
RUN := $(VENV)/bin
export OMP_NUM_THREADS := 1

.PHONY: install quickstart check test waiting computing cluster container lint packages bench clean

install:
	@tools/install.sh $(VENV)

quickstart: install
	$(RUN)/python examples/quickstart/quickstart.py

# If the packages cannot be installed, the tests that need them are skipped and listed by name.
packages:
	@tools/install_cluster_packages.sh || true

# Two processes in parallel: tests that mostly wait for servers, Slurm jobs and networks, and tests that compute.
test: lint packages
	@$(MAKE) --no-print-directory --jobs 2 --keep-going waiting computing

WAITING := tests/sglang tests/cluster

waiting:
	$(RUN)/python -m pytest -q $(WAITING)

computing:
	$(RUN)/python -m pytest -q $(WAITING:%=--ignore=%)

UNITS := tests/test_words.py tests/test_imports.py tests/test_atomic.py tests/algo tests/batching tests/checkpoint \
	tests/config tests/data tests/hf tests/rollout/test_group_buffer.py

check: lint
	$(RUN)/python -m pytest -q $(UNITS)

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
