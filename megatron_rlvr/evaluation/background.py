"""Evaluation beside training, on servers of its own (`evaluate.servers`): training does not wait for its responses.

    start(step)     pushes the weights of the step to these servers, then a thread of the main rank samples and grades
    collect()       None while it samples; then the step and its metrics, on every rank

One evaluation is in flight at a time: the next one waits for it. A fault of the evaluation, from the push of its
weights on, ends the evaluation, and not the run. If the run stops meanwhile, the evaluation stays unfinished, and its
records are kept.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_rlvr.errors import RlvrError
from megatron_rlvr.evaluation.training import TrainingEvaluation
from megatron_rlvr.protocols import EngineError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5

PushWeights = Callable[["Iterable[tuple[str, torch.Tensor]]", int], None]
"""Gives weights of a version to the evaluation's servers; a collective over the world."""


class BackgroundEvaluation:
    """Evaluates a run's policy on servers of its own. All ranks make the same calls, which are collectives.

    Args:
        evaluation: Evaluates on the main rank.
        push: Gives weights to the servers.
        stop: Set to end the sampling of the thread.
    """

    def __init__(self, evaluation: TrainingEvaluation, push: PushWeights, stop: threading.Event) -> None:
        self._evaluation = evaluation
        self._push = push
        self._stop = stop
        self._step: int | None = None
        self._thread: threading.Thread | None = None
        self._metrics: dict[str, float] = {}
        self._failure: str | None = None

    @property
    def step(self) -> int | None:
        """Step whose evaluation is in flight; None if none is."""
        return self._step

    def start(self, step: int, named_tensors: "Iterable[tuple[str, torch.Tensor]]", *, resumed: bool = False) -> None:
        """Push the weights of a step, and begin to evaluate them; the last evaluation must have been collected.

        Args:
            resumed: Keep what an earlier process has recorded of the evaluation of these weights.
        """
        assert self._step is None, "one evaluation is in flight"
        self._step, self._metrics, self._failure = step, {}, None
        self._evaluation.start(step, resumed=resumed)
        try:
            self._push(named_tensors, step)
        except EngineError as error:  # raised on every rank: no server took the weights
            self._failure = _in_words(error)
            return
        if dist.get_rank() == 0:
            self._thread = threading.Thread(target=self._run, args=(step,), name="evaluation", daemon=True)
            self._thread.start()

    def collect(
        self, *, wait: bool, stop_wanted: Callable[[], bool] = lambda: False
    ) -> tuple[int, dict[str, float], str | None] | None:
        """Return the step of the evaluation in flight, its metrics, and None or the fault that ended it.

        Args:
            wait: Wait for its end; otherwise return None while it samples.
            stop_wanted: A collective that says whether to wait no longer.

        Returns: the same on every rank; None also if no evaluation is in flight.
        """
        if self._step is None:
            return None
        while True:
            done: list[Any] = [None]
            if self._thread is None or not self._thread.is_alive():  # only that of the main rank is broadcast
                done = [(self._step, self._metrics, self._failure)]
            dist.broadcast_object_list(done, src=0)
            if done[0] is not None:
                self._step = self._thread = None
                return done[0]
            if not wait or stop_wanted():
                return None
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """End the evaluation in flight, if any, without its metrics; not a collective."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, step: int) -> None:
        try:
            self._metrics = self._evaluation.run_alone(step)
        except (RlvrError, OSError) as error:
            self._failure = _in_words(error)
        except Exception as error:  # of a thread, which would end unseen
            logger.exception("the evaluation after step %s failed", step)
            self._failure = _in_words(error)


def _in_words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
