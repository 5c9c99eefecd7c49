"""Background writing of this rank's part of a checkpoint, in forked processes.

Megatron plans which tensors go to which file, in buckets. A thread of this process forks one writer process per bucket
and collects their results. Each process also digests the file that it has written, which is still in the machine's
memory. It replaces Megatron's own version, which waits forever for a writer that was killed, and
leaves the others running if one cannot be forked. Megatron gathers the results of all ranks on the main rank, so every
failure is reported as a result: raised here, it would leave the other ranks waiting.
"""

import gc
import multiprocessing
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_rlvr.checkpoint.manifest import FileDigest, digest_of
from megatron_rlvr.child_process import end_with_parent


class BackgroundWriter:
    """Writes the files that Megatron has planned for this rank.

    Args:
        request: Megatron's ``AsyncRequest``, returned by `megatron_versions.plan_files`.
            Its tensors are on the CPU and do not change.
        background: If True, start writing now; else write in `wait`.

    Attributes:
        digests: {name: size and digest} of the files that this rank has written, after `wait`; {} if that failed.
    """

    def __init__(self, request: Any, background: bool) -> None:
        self.digests: dict[str, FileDigest] = {}
        self._request = request
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._arguments = list(request.async_fn_args)
        self._write_in_wait = request.async_fn is not None  # None: this rank has nothing to write
        if background and self._write_in_wait:
            self._write_in_wait = False
            with self._reporting_failures():
                self._thread.start()

    def wait(self) -> None:
        """Return when all files are written or have failed; Megatron reports which to the main rank."""
        if self._thread.ident is not None:
            self._thread.join()
        elif self._write_in_wait:
            self._run()

    def _run(self) -> None:
        _, buckets, results = self._arguments
        transforms, _ = self._request.async_fn.args
        with self._reporting_failures(), _writers_end_with_this_process():
            written, self.digests = _write_buckets(transforms, buckets)
            results.put(written)

    @contextmanager
    def _reporting_failures(self) -> Iterator[None]:
        """Put an exception where Megatron looks for results."""
        try:
            yield
        except Exception as error:
            self._arguments[2].put(error)


def _write_buckets(transforms: Any, buckets: Sequence[Any]) -> tuple[dict[int, Any], dict[str, FileDigest]]:
    """Write each bucket in its own process; return {bucket number: Megatron's result} and {name of a file: digest}.

    Raises:
        Exception: The failure of the first bucket that failed. All writers have exited by then.
    """
    context = multiprocessing.get_context("fork")
    writers: list[tuple[Any, Any]] = []
    try:
        for number, bucket in enumerate(buckets):
            receiver, sender = context.Pipe(duplex=False)
            with sender:  # closed here, so that the receiver reads end-of-file when the writer exits
                writer = context.Process(target=_write_bucket, args=(sender, transforms, number, bucket))
                writer.start()
            writers.append((writer, receiver))
        written = [_result_of(writer, receiver) for writer, receiver in writers]
        results = {number: result for number, result, _ in written}
        return results, {Path(buckets[number][0]).name: digest for number, _, digest in written}
    finally:
        for writer, _ in writers:
            writer.kill()
            writer.join()


def _write_bucket(sender: Any, transforms: Any, number: int, bucket: Any) -> None:
    """Run Megatron's writer in this process, with queues of its own; send its result and the digest of its file."""
    results: queue.Queue[Any] = queue.Queue()
    in_progress: queue.Queue[int] = queue.Queue()
    in_progress.put(number)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, results, in_progress, True)
    _, result = results.get()
    try:
        digest = None if isinstance(result, Exception) else digest_of(Path(bucket[0]))
    except OSError as error:
        result, digest = error, None
    sender.send((number, result, digest))


def _result_of(writer: Any, receiver: Any) -> tuple[int, Any, FileDigest]:
    try:
        number, result, digest = receiver.recv()
    except EOFError:
        writer.join()
        raise ChildProcessError(f"a process that wrote ended with status {writer.exitcode}") from None
    if isinstance(result, Exception):
        raise result
    return number, result, digest


_saving_process, _saving_thread = 0, 0


@contextmanager
def _writers_end_with_this_process() -> Iterator[None]:
    """Make processes that this thread forks inside the block end with this process, even if it is killed.

    Processes forked by other threads are excluded: for the kernel, the end of the forking thread is that of the parent.
    """
    global _saving_process, _saving_thread
    _saving_process, _saving_thread = os.getpid(), threading.get_ident()
    try:
        yield
    finally:
        _saving_process = 0


def _after_fork_in_child() -> None:
    if _saving_process and threading.get_ident() == _saving_thread:
        gc.disable()  # inherited GPU objects cannot be freed in a forked process
        end_with_parent(_saving_process)


os.register_at_fork(after_in_child=_after_fork_in_child)
