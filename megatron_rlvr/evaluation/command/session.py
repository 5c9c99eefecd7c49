"""Sampling of an evaluation by the ranks of this process group, from the engine to summary.json.

all done        the table, summary.json, status 0
Ctrl-C, SIGTERM what is sampled is graded and recorded; summary.json says that it is not complete; status 128 + n
fault           as after Ctrl-C, with status 1
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rlvr.config import SettingsError
from megatron_rlvr.distributed import accelerator, process_group
from megatron_rlvr.distributed.collectives import on_main_rank
from megatron_rlvr.distributed.ranks import Ranks, initialize_replicas
from megatron_rlvr.engines.embedded.engine import EmbeddedEngine
from megatron_rlvr.engines.sglang.connect import connect
from megatron_rlvr.engines.sglang.engine import SglangEngine
from megatron_rlvr.engines.sglang.weight_sync.current import AT_START, CurrentWeights
from megatron_rlvr.engines.two_temperatures import TwoTemperatures
from megatron_rlvr.errors import FaultError, RlvrError
from megatron_rlvr.evaluation.command.progress import EvaluationProgress
from megatron_rlvr.evaluation.command.results import report
from megatron_rlvr.evaluation.command.target import Target
from megatron_rlvr.evaluation.evaluator import Evaluator
from megatron_rlvr.evaluation.folder import check_folder, write_description
from megatron_rlvr.evaluation.majority import same_answers
from megatron_rlvr.evaluation.records import read_records
from megatron_rlvr.input_files import is_folder, same_place
from megatron_rlvr.policy.build import DTYPES
from megatron_rlvr.protocols import RolloutEngine
from megatron_rlvr.reward.graders import GraderPool
from megatron_rlvr.rollout.sampler import Sampler
from megatron_rlvr.signals import Stopped
from megatron_rlvr.startup.evaluation import ResolvedEvaluation
from megatron_rlvr.startup.process import leave, logger, print_error

_TIMEOUT_MINUTES = 24 * 60.0  # ranks wait for the longest response of another
_STOP_SECONDS = 20.0


def run_session(
    resolved: ResolvedEvaluation,
    target: Target,
    description: dict[str, Any],
    out: Path,
    graders: GraderPool,
    *,
    two_temperatures: Sequence[float] | None,
    served: Sequence[Path],
    as_json: bool,
) -> None:
    """Sample what is not recorded yet, and report. Every rank calls it; one that is interrupted exits the process.

    Args:
        resolved: Settings with the content of the files that they name.
        target: Model to evaluate.
        description: Description of the evaluation.
        out: Folder of the evaluation.
        graders: Grader processes of this rank.
        two_temperatures: Values of `TwoTemperatures`; None for `evaluate.temperature`.
        served: Folders from which servers may have loaded the target.
        as_json: Print JSON instead of a table.

    Raises:
        RlvrError: On every rank.
    """
    settings = resolved.settings
    ranks = initialize_replicas(_TIMEOUT_MINUTES)
    with ExitStack() as resources:
        on_main_rank(partial(_prepare, out, description))
        temperatures = None if two_temperatures is None else TwoTemperatures(*two_temperatures)
        engine = _engine(resolved, target, ranks, temperatures, served, resources)
        evaluator = Evaluator(
            Sampler(engine, resolved.tokenizer, graders, settings.reward),
            settings.evaluate,
            {name: prompts.prompts for name, prompts in resolved.evaluation.items()},
            share=slice(ranks.rank, None, ranks.world_size),
            same=same_answers(settings.reward, graders, resolved.answer_after),
            max_response_tokens=settings.rollout.max_response_tokens,
            seed=settings.run.seed,
        )
        recorded = evaluator.recorded(out)
        engine.update_weights(target.named_tensors(), 0)
        store = process_group.store()
        status = 0
        with EvaluationProgress(
            evaluator.size - len(recorded), enabled=ranks.is_main, add=partial(_count, store)
        ) as progress:
            try:
                evaluator.run(out, recorded, progress.finished)
            except Stopped as stopped:
                status = stopped.exit_status
            except RlvrError as error:
                print_error(error)
                status = error.exit_status
            except OSError as error:  # a full disk: nothing more can be written, a summary neither
                print_error(FaultError(f"{out} cannot be written ({error}); make room, and run the command again"))
                leave(1, graders)
            except Exception:
                logger.exception("rank %s failed", ranks.rank)
                status = 1
            seconds = progress.seconds
        if status:
            _wait_for_records(store, ranks)
        if ranks.is_main:
            report(out, resolved, read_records(out), graders, tokens=progress.tokens, seconds=seconds, as_json=as_json)
        if status:
            leave(status, graders)
    process_group.shut_down()


def _prepare(out: Path, description: dict[str, Any]) -> None:
    check_folder(out, description)
    write_description(out, description)


def _count(store: dist.Store, tokens: int) -> tuple[int, int]:
    """Add a completion to the counts of all ranks; return the number of completions and of tokens."""
    return store.add("evaluation/completions", 1), store.add("evaluation/tokens", tokens)


def _wait_for_records(store: dist.Store, ranks: Ranks) -> None:
    """Wait on the main rank, which reports, until the other ranks have recorded what they have sampled."""
    deadline = time.monotonic() + _STOP_SECONDS
    arrived = store.add("evaluation/stopped", 1)
    while ranks.is_main and arrived < ranks.world_size and time.monotonic() < deadline:
        time.sleep(0.05)
        arrived = store.add("evaluation/stopped", 0)


def _engine(
    resolved: ResolvedEvaluation,
    target: Target,
    ranks: Ranks,
    two_temperatures: TwoTemperatures | None,
    served: Sequence[Path],
    resources: ExitStack,
) -> RolloutEngine:
    """Make the engine, which ``resources`` closes."""
    settings = resolved.settings
    if settings.rollout.engine == "embedded":
        return EmbeddedEngine(
            str(target.folder),
            dtype=DTYPES[settings.model.dtype],
            device=accelerator.device(),
            stop_token_ids=resolved.stop_token_ids,
            pad_token_id=resolved.tokenizer.pad_token_id,
            max_batch_tokens=settings.rollout.max_batch_tokens,
            max_batch_rows=settings.rollout.max_batch_rows,
            process_logits=two_temperatures,
        )
    longest = settings.max_sequence_tokens
    pool = connect(
        *(settings.rollout, ranks, resolved.hf_config), max_sequence_tokens=longest, key="--servers", model="TARGET"
    )
    assert pool is not None, "one rank, which is a leader"
    resources.callback(pool.close)
    for url, info in pool.everywhere(lambda server: server.info()).items():
        if isinstance(info, Exception):
            raise info
        if problem := _other_model(info.model_path, info.weights, served):
            raise SettingsError(f"--servers {url}: {problem}")
    engine = SglangEngine(
        pool,
        CurrentWeights(pool, ranks),
        stop_token_ids=resolved.stop_token_ids,
        vocab_size=resolved.hf_config["vocab_size"],
        max_sequence_tokens=longest,
        two_temperatures=two_temperatures,
    )
    resources.callback(engine.close)
    return engine


def _other_model(path: str | None, weights: str | None, served: Sequence[Path]) -> str | None:
    """Return why a server samples from other weights than the target's, and what to do, or None.

    A folder that this machine does not have may be the target under another name, which cannot be known.

    Args:
        path: Folder from which the server has loaded its model.
        weights: Name of the weights that it holds.
        served: Folders of the target; empty if the servers' own model is the target.
    """
    if not served:
        return None
    if weights not in (None, AT_START):
        return (
            f"the server holds weights that a run has pushed ({weights}), not those of TARGET; start it on TARGET, or "
            "leave TARGET out to evaluate what it holds"
        )
    if path is not None and is_folder(path) and same_place(path) not in [same_place(own) for own in served]:
        return f"the server serves {path}, not TARGET ({served[0]}); start it on TARGET, or give {path} as TARGET"
    return None
