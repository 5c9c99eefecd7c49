# make quickstart   installs, then trains a tiny Qwen3 to reason on two CPU cores
# make test         installs, then runs lint, type check and all tests
VENV ?= .venv
RUN := $(VENV)/bin
export OMP_NUM_THREADS := 1

.PHONY: install quickstart test lint bench clean

install:
	@tools/install.sh $(VENV)

quickstart: install
	$(RUN)/python examples/quickstart/quickstart.py

test: lint
	$(RUN)/python -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder

lint: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: install
	for program in benchmarks/*.py; do echo "== $$program"; $(RUN)/python $$program || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
