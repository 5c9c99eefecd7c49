"""The phases of one rehearsed rank, under the modes that record them."""

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_rlvr.batching.batch import MicroBatch
from megatron_rlvr.checkpoint.megatron import sharded_state
from megatron_rlvr.checkpoint.megatron.pending import copied_to_host
from megatron_rlvr.checkpoint.megatron.sharded_state import ShardedOptimizer, ShardedWeights, load_replicated
from megatron_rlvr.checkpoint.megatron.shares import boxes
from megatron_rlvr.checkpoint.size import BOX_BYTES
from megatron_rlvr.config import SettingsError
from megatron_rlvr.config.loading import validate
from megatron_rlvr.distributed import accelerator
from megatron_rlvr.distributed.ranks import initialize_ranks
from megatron_rlvr.hf.files import read_config
from megatron_rlvr.policy import policy as policy_module
from megatron_rlvr.policy.build import DTYPES, check_passthrough
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.preflight.memory import largest_micro_batch
from megatron_rlvr.rehearsal import stand_ins, world
from megatron_rlvr.rehearsal.command import Job
from megatron_rlvr.rehearsal.recorder import Phase, Recorder
from megatron_rlvr.rehearsal.report import Outcome, PhaseOutcome
from megatron_rlvr.rehearsal.stage_parameters import parameters_of_stages
from megatron_rlvr.startup.assembly import load_reference, make_loss

_TRAIN_STEPS = 2
_MIN_MICRO_BATCHES = 2  # the second adds to the gradients of the first


def _read(shards: Sequence[ShardedTensor], folder: Path) -> dict[str, Any]:
    """Fill tensors as torch's reader does, which reads box by box, each while it still holds the one before."""
    for shard in shards:
        data = shard.data
        assert data is not None
        for offset, size in boxes(data.shape, 0, data.numel(), BOX_BYTES // data.element_size()):
            box = torch.empty(size, dtype=data.dtype, device="cpu")
            data[tuple(slice(start, start + n) for start, n in zip(offset, size, strict=True))].copy_(box)
    return {}


class RankRehearsal:
    """A rank's way through all phases.

    Attributes:
        outcome: What was recorded so far.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._settings = validate(dict(job.settings))
        self._recorder = Recorder(FakeTensorMode(allow_non_fake_inputs=True))
        self.outcome = Outcome(job.rank, job.stage)
        self._reference: Policy | None = None

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        recorder = self._recorder
        recorder.phase = phase = Phase()
        recorder.device.reset_peak()
        recorder.host.reset_peak()
        self.outcome.failed = name
        yield
        self.outcome.failed = ""
        collectives = [(what, ranks, times, size) for (what, ranks), (times, size) in phase.collectives.items()]
        self.outcome.phases.append(
            PhaseOutcome(
                name,
                *(recorder.device.now, recorder.device.peak, recorder.host.now, recorder.host.peak, phase.operators),
                waits=[(*key, times) for key, times in phase.waits.most_common()],
                collectives=sorted(collectives, key=lambda each: -each[3]),
            )
        )

    def run(self) -> None:
        """Run all phases; an exception of one of them is recorded and ends the rehearsal."""
        settings = self._settings
        try:
            check_passthrough(settings.megatron, settings.model, settings.parallel, read_config(settings.model.path))
            with (
                torch.autograd.set_multithreading_enabled(False),
                world.entered(self._world(), self._recorder, int(self._job.memory)),
                stand_ins.in_place(),
                self._recorder.fake,
                self._recorder,
            ):
                self._run_phases()
        except SettingsError as error:
            self.outcome.invalid = str(error)
        except Exception as error:  # of any library: what does not get through is the result
            traceback.print_exc()
            self.outcome.failed = self.outcome.failed or "start"
            self.outcome.error = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
        self.outcome.guesses = dict(self._recorder.values.guesses)

    def _world(self) -> world.FakeWorld:
        parallel, config = self._settings.parallel, read_config(self._settings.model.path)
        parameters = parameters_of_stages(config, parallel, DTYPES[self._settings.model.dtype])
        return world.FakeWorld(self._job.rank, self._job.world, parallel, parameters)

    def _run_phases(self) -> None:
        policy = self._build()
        if self._settings.loss.kl_coefficient:
            with self._phase("reference"):
                self._reference = load_reference(self._settings, policy.ranks)
        batches = self._micro_batches(policy)
        parallel, tokens = self._settings.parallel, len(batches[0].tokens)
        sequence_ranks = parallel.context * (parallel.tensor if parallel.sequence else 1)
        with stand_ins.stage_messages((tokens // sequence_ranks, 1, policy.hf_config["hidden_size"])):
            self._train(policy, batches)
        with self._phase("export"):
            for _ in policy.export_weights():
                pass
        with self._phase("save"):
            weights = ShardedWeights(policy.chunks)
            optimizer = ShardedOptimizer(policy.optimizer, weights, loading=False)
            copies = copied_to_host(chain(weights.written(), optimizer.written()))
            self.outcome.saved = sum(copy.data.nbytes for copy in copies if copy.data is not None)
            common = optimizer.common
            del copies, optimizer
        with self._phase("load"), world.replaced((sharded_state, "load_sharded", _read)):
            optimizer = ShardedOptimizer(policy.optimizer, weights, loading=True)
            replicated = weights.replicated() + optimizer.replicated()
            load_replicated(replicated, optimizer.own(loading=True), Path())
            optimizer.restore(common)

    def _build(self) -> Policy:
        """Build the policy in three phases: the model, its weights, its optimizer."""
        settings = self._settings
        build_chunks, build_optimizer = policy_module.build_chunks, policy_module.build_optimizer
        phases = contextlib.ExitStack()

        def chunks(*arguments: Any, **options: Any) -> Any:
            with self._phase("build"):
                built = build_chunks(*arguments, **options)
            phases.enter_context(self._phase("weights"))
            return built

        def optimizer(*arguments: Any) -> Any:
            phases.close()
            with self._phase("optimizer"):
                return build_optimizer(*arguments)

        with self._phase("ranks"):
            ranks = initialize_ranks(settings.parallel, settings.run.timeout_minutes)
        with world.replaced((policy_module, "build_chunks", chunks), (policy_module, "build_optimizer", optimizer)):
            return Policy(
                settings.model,
                settings.parallel,
                ranks,
                optimizer=settings.optimizer,
                megatron=settings.megatron,
                temperature=settings.rollout.temperature,
                seed=settings.run.seed,
            )

    def _micro_batches(self, policy: Policy) -> list[MicroBatch]:
        """Return the largest micro-batches of the run, as many as a pipeline holds at once."""
        packing = policy.packing(self._settings.batch.tokens_per_micro_batch)
        batch = largest_micro_batch(self._settings, packing, policy.hf_config["vocab_size"])
        count = max(_MIN_MICRO_BATCHES, self._settings.parallel.pipeline)
        count += -count % packing.micro_batch_multiple
        outcome = self.outcome
        outcome.tokens, outcome.longest, outcome.micro_batches = len(batch.tokens), batch.max_length, count
        return [batch] * count

    def _train(self, policy: Policy, batches: list[MicroBatch]) -> None:
        settings, values = self._settings, self._recorder.values
        with self._phase("score"):
            if self._reference is not None:
                self._reference.score(batches)
            scores = policy.score(batches)
        rows = len(batches[0].rows)
        current = settings.selection.entropy == "current"
        selected = torch.zeros(rows, dtype=torch.bool, device=accelerator.device())
        selected[:: max(1, round(1 / settings.selection.largest_fraction))] = True
        mask = values.get(selected)
        assert mask is not None
        self.outcome.rows = rows if current else int(mask.sum())

        def of_entropy(batch: MicroBatch, entropy: Tensor) -> Tensor:
            return selected

        loss, count = make_loss(settings.loss), rows * len(batches)
        inputs = scores.plain_inputs(batches)
        for step in range(1, _TRAIN_STEPS + 1):
            with self._phase(f"train {step}"):
                masks = of_entropy if current else [selected] * len(batches)
                policy.train_step(batches, masks, inputs, loss, count)
