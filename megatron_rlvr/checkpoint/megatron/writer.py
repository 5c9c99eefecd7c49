"""Megatron-core checkpoints, saved and loaded by all ranks in any layout.

A layout cuts what another has written differently: Megatron's dist_checkpointing reads for each rank what it needs.
Names and files are those of `checkpoint_files`.
"""

import gc
import io
import multiprocessing
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_rlvr.atomic import flush, flush_tree, new_folder, temporary_path
from megatron_rlvr.checkpoint.files import CONTENT, HUGGING_FACE, CheckpointReader
from megatron_rlvr.child_process import end_with_parent
from megatron_rlvr.distributed import megatron_on_cpu
from megatron_rlvr.hf.weights import copy_all_but_weights

megatron_on_cpu.import_megatron()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.dist_checkpointing.strategies.base import StrategyAction, register_default_strategy  # noqa: E402
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonSaveStrategy  # noqa: E402
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy  # noqa: E402

# Moments have the shape of their parameter, whichever ranks share them: any layout reads them.
_OF_THE_OPTIMIZER = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_weights(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """What Megatron calls the sharded state dict of this rank's model chunks; ``model0`` is the first one's.

    The scaling factors of Transformer Engine's FP8 are left out: they are found anew.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    states = [_module(chunk).sharded_state_dict(metadata=CONTENT | {"dp_cp_group": group}) for chunk in chunks]
    return {
        f"model{number}": {key: part for key, part in state.items() if not isinstance(part, ShardedObject)}
        for number, state in enumerate(states)
    }


def sharded_optimizer(optimizer: Any, weights: dict[str, Any], *, loading: bool) -> Any:
    """The optimizer's state in Megatron's sharded form, which any layout can read.

    Args:
        weights: `sharded_weights`.
        loading: whether it is to be filled by a checkpoint.
    """
    _allocate_moments(optimizer)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return optimizer.sharded_state_dict(weights, loading, metadata=CONTENT | _OF_THE_OPTIMIZER | {"dp_cp_group": group})


def load_optimizer(optimizer: Any, loaded: Any) -> None:
    """Fills the optimizer from a loaded `sharded_optimizer`."""
    parts = _parts(optimizer)
    states = [loaded] if len(parts) == 1 else [loaded[number] for number in range(len(parts))]
    moments = [state.pop("param_state", None) for state in states]
    for part, state in zip(parts, states, strict=True):
        inner = state.get("optimizer", state)
        # Megatron leaves out the number of steps where it is 0. Fused optimizers count for a whole group, and some
        # refuse a parameter's own.
        if "state" in inner and isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            inner["state"].setdefault("common_step", torch.zeros(()))
    optimizer.load_state_dict(loaded)
    for part, moment in zip(parts, moments, strict=True):
        # With torch's Adam, the distributed optimizer takes the steps, which are not cut, for another moment of the
        # parameter, and has one tensor count the steps of all parameters, each of which would count it up.
        steps = {parameter: state.pop("step", None) for parameter, state in part.optimizer.state.items()}
        if moment is not None:
            part.load_parameter_state_from_fully_reshardable(moment)
        for parameter, step in steps.items():
            if step is not None:
                part.optimizer.state[parameter]["step"] = step.clone()


def _allocate_moments(optimizer: Any) -> None:
    """Gives Adam the moments of its beginning where it has none: they would come with its first step.

    Without them Megatron takes an optimizer that has skipped all of its steps for one without state.
    """
    for part in _parts(optimizer):
        adam = part.optimizer
        part.init_state_fn(adam, part.config)
        if isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
            for state in adam.state.values():
                state.setdefault("step", torch.zeros(()))


def _parts(optimizer: Any) -> list[Any]:
    """Experts have an optimizer of their own."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def begin_checkpoint(
    state: dict[str, Any],
    folder: Path,
    hf_folder: Path,
    finish: Callable[[Path], None] = lambda folder: None,
    *,
    background: bool,
) -> Callable[[], None]:
    """Begins to write a folder; a collective over the world, as what it returns is, which waits for the end.

    The folder gets its name when all ranks have written.

    Args:
        state: `sharded_weights`, and whatever else is to be kept, in Megatron's sharded form.
        hf_folder: whose configuration and tokenizer come along.
        finish: called on the main rank with the folder before it gets its name, to add files to it.
        background: write a copy of this rank's tensors, held in memory, while the caller goes on; or all at the end.

    Raises: OSError on every rank, now or at the end, where the folder cannot be made or written; nothing is left of it.
    """
    building = temporary_path(folder)

    def prepare() -> None:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)

    on_main_rank(prepare)
    # Megatron would start a process that passes on what its writers report, keep it for the next time, and so leave it
    # behind on every machine where a rank is killed.
    filesystem_async._results_queue = queue.Queue()
    common, sharded = _Common(), _Sharded()
    register_default_strategy(StrategyAction.SAVE_COMMON, common.backend, common.version, common)  # it takes no other
    request = dist_checkpointing.save(
        state, str(building), sharded, content_metadata=dict(CONTENT), async_sharded_save=True
    )
    write = _Writer(request, background)

    def complete() -> None:
        failures: list[Exception] = []
        # The second would write metadata.json, on the main rank while the others wait for it; `name` does so.
        gather, _ = request.finalize_fns
        try:
            write.wait()
            gather()
        except CheckpointException as error:  # its failures are known to the main rank, which has heard from all
            failures.extend(failure for failure, _ in error.failures.values() if isinstance(failure, Exception))

        def name() -> None:
            try:
                if failures:
                    cause = failures[0].__cause__ or failures[0]
                    raise cause if isinstance(cause, OSError) else OSError(str(cause))
                common.write(building)
                sharded.write()
                save_config(CheckpointingConfig(sharded.backend, sharded.version), str(building))
                (building / HUGGING_FACE).mkdir()
                copy_all_but_weights(hf_folder, building / HUGGING_FACE)
                finish(building)
                flush_tree(building)
                building.rename(folder)
                flush(folder.parent)
            except OSError:
                shutil.rmtree(building, ignore_errors=True)
                raise

        on_main_rank(name)

    return complete


def save_checkpoint(
    state: dict[str, Any], folder: Path, hf_folder: Path, finish: Callable[[Path], None] = lambda folder: None
) -> None:
    """See `begin_checkpoint`; returns when the folder has its name."""
    begin_checkpoint(state, folder, hf_folder, finish, background=False)()


class _Common(TorchCommonSaveStrategy):
    """Keeps what is common to all ranks for `write`.

    Megatron has the main rank write it at once, between collectives, where no other would hear that it could not.
    """

    def __init__(self) -> None:
        super().__init__("torch", 1)
        self._content = io.BytesIO()

    def save_common(self, common_state_dict: Any, checkpoint_dir: str | Path) -> None:
        if dist.get_rank() == 0:
            torch.save(common_state_dict, self._content)

    def write(self, folder: Path) -> None:
        """To be called on the main rank."""
        (folder / COMMON_STATE_FNAME).write_bytes(self._content.getbuffer())


class _Sharded(TorchDistSaveShardedStrategy):
    """Megatron's own, which keeps what the main rank is to write at the end, for the same reason."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.write: Callable[[], None] = lambda: None
        """Writes .metadata; to be called on the main rank when all have told what they wrote."""

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        finish = writer.finish

        def keep(*arguments: Any) -> None:
            self.write = lambda: finish(*arguments)

        writer.finish = keep
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)


class _Writer:
    """Writes what Megatron has planned for this rank, in processes forked from a thread of ours."""

    def __init__(self, request: Any, background: bool) -> None:
        self._request = request
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._arguments = list(request.async_fn_args)
        self._left_to_do = request.async_fn is not None  # or nothing is this rank's
        if background and self._left_to_do:
            self._left_to_do = False
            with self._telling():
                self._arguments[1] = _copied(self._arguments[1])
                self._thread.start()

    def wait(self) -> None:
        """Returns when all is written, or could not be: Megatron tells the main rank."""
        if self._thread.ident is not None:
            self._thread.join()
        elif self._left_to_do:
            with self._telling():
                self._arguments[1] = self._request.preload_fn()
                self._run()

    def _run(self) -> None:
        _, buckets, results = self._arguments
        transforms, _ = self._request.async_fn.args
        with self._telling(), _writers_end_with_this_process():
            results.put(_written(transforms, buckets))

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """What fails goes where Megatron looks for results: raised here, it would leave the other ranks waiting."""
        try:
            yield
        except Exception as error:
            self._arguments[2].put(error)


def _written(transforms: Any, buckets: Sequence[Any]) -> dict[int, Any]:
    """Has each of Megatron's buckets written by a process of its own; what they tell, by the number of the bucket.

    Instead of Megatron's own, which waits for good for a process that was killed, and leaves others writing where one
    cannot be forked.

    Raises: what the first to fail says; none writes any more.
    """
    context = multiprocessing.get_context("fork")
    writers: list[tuple[Any, Any]] = []
    try:
        for number, bucket in enumerate(buckets):
            pipe, theirs = context.Pipe(duplex=False)
            with theirs:  # once it is closed here, the pipe ends with the process
                writer = context.Process(target=_write, args=(theirs, transforms, number, bucket))
                writer.start()
            writers.append((writer, pipe))
        return dict(_told(writer, pipe) for writer, pipe in writers)
    finally:
        for writer, _ in writers:
            writer.kill()
            writer.join()


def _write(pipe: Any, transforms: Any, number: int, bucket: Any) -> None:
    results: queue.Queue[Any] = queue.Queue()
    busy: queue.Queue[int] = queue.Queue()
    busy.put(number)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, results, busy, True)
    pipe.send(results.get())


def _told(writer: Any, pipe: Any) -> tuple[int, Any]:
    try:
        number, told = pipe.recv()
    except EOFError:
        writer.join()
        raise ChildProcessError(f"a process that wrote ended with status {writer.exitcode}") from None
    if isinstance(told, Exception):
        raise told
    return number, told


def _copied(buckets: Sequence[Any]) -> list[Any]:
    """Megatron's buckets of what to write, with tensors of their own: training changes the others.

    Megatron's own way to the CPU leaves those as they are that are there already.
    """
    return [
        (path, name, (texts, [(item, tensor.to("cpu", copy=True)) for item, tensor in tensors]))
        for path, name, (texts, tensors) in buckets
    ]


def link_checkpoint(same: Path, folder: Path, finish: Callable[[Path], None]) -> None:
    """Writes a folder that has the files of ``same``, as further names of them; a collective over the world.

    For ``finish`` and errors see `save_checkpoint`.
    """

    def link() -> None:
        with new_folder(folder) as building:
            shutil.copytree(same, building, copy_function=_link, dirs_exist_ok=True)
            finish(building)

    on_main_rank(link)


def _link(source: str, target: str) -> None:
    """A copy where the file system knows no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


_saving_process, _saving_thread = 0, 0


@contextmanager
def _writers_end_with_this_process() -> Iterator[None]:
    """Those that are forked to write; they would go on where this one is killed.

    Those that other threads fork are not meant: the kernel takes the end of a thread for that of the parent.
    """
    global _saving_process, _saving_thread
    _saving_process, _saving_thread = os.getpid(), threading.get_ident()
    try:
        yield
    finally:
        _saving_process = 0


def _begin_as_a_writer() -> None:
    if _saving_process and threading.get_ident() == _saving_thread:
        gc.disable()  # what this process has of the other's on a GPU cannot be freed in it
        end_with_parent(_saving_process)


os.register_at_fork(after_in_child=_begin_as_a_writer)


def on_main_rank(act: Callable[[], Any]) -> None:
    """Runs it on the main rank; an OSError there is raised on every rank, so that none is left waiting."""
    told: list[OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            act()
        except OSError as error:
            told = [error]
    dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise told[0]


def load_weights(chunks: Sequence[torch.nn.Module], folder: Path, hf_config: Mapping[str, Any]) -> None:
    """Fills this rank's parameters from a checkpoint; a collective over the world.

    Raises: ModelError that names weights that are missing or do not fit ``hf_config``, on every rank.
    """
    CheckpointReader(folder).check(hf_config)
    fill_weights(chunks, dist_checkpointing.load(sharded_weights(chunks), str(folder)))


def fill_weights(chunks: Sequence[torch.nn.Module], loaded: Mapping[str, Any]) -> None:
    """Copies loaded `sharded_weights` into this rank's parameters."""
    for number, chunk in enumerate(chunks):
        with torch.no_grad():
            for name, parameter in _module(chunk).named_parameters():
                parameter.copy_(loaded[f"model{number}"][name])


def _module(chunk: Any) -> Any:
    return getattr(chunk, "module", chunk)
