"""Runs of the trainer in a process of the tests, which can stop them after any step."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from megatron_rlvr.config.loading import load_settings


class StopAfter:
    """Stand-in for signals: SIGTERM arrives at the end of the given step of this process."""

    stop_signal = "SIGTERM"

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def stop_wanted(self) -> bool:
        return self.left <= 0

    def counted(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``train_step``, whose ends are counted."""

        def step(*arguments: Any, **named: Any) -> Any:
            metrics = train_step(*arguments, **named)
            self.left -= 1
            return metrics

        return step

    def deferring(self, *_: Any) -> Any:
        return nullcontext()

    saving = deferring

    def accept(self) -> None: ...


@contextmanager
def destroying_groups() -> Iterator[None]:
    """Destroy Megatron's process groups at the end, so that the next run of this process may have others."""
    from megatron.core import parallel_state

    from megatron_rlvr.distributed import process_group

    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        process_group.shut_down()


def train_process(config: str, steps: int = 10**6, writers_wait: float = 0.0) -> str:
    """Run the trainer on this rank and stop it after ``steps`` steps; return its message to the user, or "".

    Args:
        config: Settings file.
        steps: Number of steps after which the run is stopped.
        writers_wait: Seconds by which writing checkpoints is delayed.
    """
    import os
    from unittest import mock

    from megatron_rlvr.checkpoint.megatron.writer import BackgroundWriter
    from megatron_rlvr.checkpoint.store import CheckpointError
    from megatron_rlvr.errors import InputError
    from megatron_rlvr.learner import SkippedStepsError
    from megatron_rlvr.reward.graders import GraderPool
    from megatron_rlvr.startup.resolve import resolve
    from megatron_rlvr.startup.run import train
    from megatron_rlvr.trainer import Trainer

    write = BackgroundWriter._run

    def late(self: Any) -> None:
        time.sleep(writers_wait)
        write(self)

    stop = StopAfter(steps)
    folder = str(Path(config).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = folder  # the graders'
    try:
        settings = load_settings(config)
        resolved = resolve(settings)
        with (
            GraderPool(settings.reward.function, workers=1, timeout_seconds=10.0) as graders,
            destroying_groups(),
            mock.patch.object(BackgroundWriter, "_run", late),
            mock.patch.object(Trainer, "train_step", stop.counted(Trainer.train_step)),
        ):
            train(resolved, graders, stop)  # type: ignore[arg-type]
    except (InputError, CheckpointError, SkippedStepsError) as error:
        return str(error)
    return ""
