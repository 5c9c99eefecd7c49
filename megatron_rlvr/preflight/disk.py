"""Check of the run folder's file system: enough space for the run, fast, shared, and with atomic replacement."""

import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.checkpoint.size import WEIGHT_BYTES, checkpoint_bytes
from megatron_rlvr.checkpoint.store import FOLDER
from megatron_rlvr.config import Settings
from megatron_rlvr.hf.families import parameter_count
from megatron_rlvr.number_ranges import format_ranges
from megatron_rlvr.preflight.context import PreflightContext, nearest_existing, rank_failures
from megatron_rlvr.preflight.results import CheckResult, failure, format_bytes

# Bytes that each rank writes to measure the speed, and the most that all ranks write together.
_PROBE_BYTES, _MAX_PROBES_BYTES = 2**26, 2**33
# A network file system may cache for this long that a file does not exist.
_VISIBLE_SECONDS = 60.0
_REPLACEMENTS = 200
# A checkpoint that takes longer causes a warning.
_SLOW_CHECKPOINT_SECONDS = 300.0


@dataclass(frozen=True)
class DiskUse:
    """Disk space that a run needs.

    Attributes:
        checkpoint: Bytes of one checkpoint.
        checkpoints: Maximum number of checkpoints at the same time, including one that is being built.
        exports: Bytes of all Hugging Face folders exported during the run and at its end.
        sync: Bytes of the weights in `sync.dir`: the new ones beside the old.
    """

    checkpoint: int
    checkpoints: int
    exports: int
    sync: int

    def __str__(self) -> str:
        parts = [f"{self.checkpoints} checkpoint(s) of {format_bytes(self.checkpoint)}"]
        parts += [f"{format_bytes(self.exports)} of exports"] if self.exports else []
        parts += [f"{format_bytes(self.sync)} of weights for servers to load"] if self.sync else []
        return " + ".join(parts)


def disk_use(settings: Settings, config: Mapping[str, Any]) -> DiskUse:
    """Compute the disk space that a run needs, for a model with this ``config.json``."""
    run, parameters = settings.run, parameter_count(config)
    weight_bytes = WEIGHT_BYTES[settings.model.dtype]
    saves = 1 if not run.save_every else math.ceil(run.steps / run.save_every)
    kept = run.steps // run.keep_every if run.keep_every else 0
    exports = (run.steps // run.export_every if run.export_every else 0) + run.export
    syncs_by_disk = settings.sync.method == "disk" and settings.rollout.engine == "sglang"
    distributed_optimizer = bool(settings.megatron.get("use_distributed_optimizer"))
    return DiskUse(
        checkpoint=checkpoint_bytes(parameters, weight_bytes, distributed_optimizer=distributed_optimizer),
        checkpoints=min(saves, run.keep_last + 1 + kept),
        exports=exports * parameters * weight_bytes,
        sync=2 * parameters * weight_bytes if syncs_by_disk else 0,
    )


def check_disk(context: PreflightContext) -> CheckResult:
    """Check space and speed for checkpoints, that all ranks share the folder, and that replacing files is atomic."""
    settings, ranks = context.resolved.settings, context.ranks
    folder = context.new_folder(Path(settings.run.dir))
    if ranks.is_main:
        (folder / "0").touch()
    if failures := rank_failures(context.try_on_all_ranks(lambda: _wait_until_visible(folder / "0"))):
        return CheckResult(
            "disk",
            "failed",
            f"a file that rank 0 writes to {folder.parent} is not visible on ranks "
            f"{format_ranges(failed.rank for failed in failures)} after {_VISIBLE_SECONDS:.0f} s",
            "choose a run.dir on a file system that all hosts share, under the same path",
        )
    use = disk_use(settings, context.resolved.hf_config)
    if too_small := context.gather(_too_small(settings, use) if ranks.is_main else None)[0]:
        return too_small
    size = min(_PROBE_BYTES, _MAX_PROBES_BYTES // ranks.world_size)
    times = context.try_on_all_ranks(lambda: _write(folder / str(ranks.rank), size))
    if failures := rank_failures(times):
        return failure("disk", failures[0].sentence)
    problems = context.try_on_all_ranks(lambda: _problem(folder, ranks.world_size) if ranks.is_main else None)
    if failures := rank_failures(problems):
        return failure("disk", failures[0].sentence)
    if problems[0]:
        remedy = "choose a run.dir on a POSIX file system"
        return CheckResult("disk", "failed", f"{folder.parent}: {problems[0]}", remedy)
    speed = ranks.world_size * size / max(seconds for seconds in times if isinstance(seconds, float))
    seconds = use.checkpoint / speed
    _, _, free = next(_budgets(settings, use))
    message = (
        f"{format_bytes(free)} free at {settings.run.dir} for {use}; {format_bytes(speed)}/s from all ranks together, "
        f"{seconds:.0f} s per checkpoint"
    )
    if seconds > _SLOW_CHECKPOINT_SECONDS:
        remedy = "raise run.save_every so that saving is a small part of the run, or choose a faster file system"
        return CheckResult("disk", "warned", message, remedy)
    return CheckResult("disk", "passed", message)


def _wait_until_visible(path: Path) -> None:
    """Wait until a file exists. Raises TimeoutError after `_VISIBLE_SECONDS`."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} is not visible")
        with suppress(OSError):
            os.listdir(path.parent)  # makes a network file system look again
        time.sleep(0.05)


def _write(path: Path, size: int) -> float:
    """Return the seconds to write a file of ``size`` bytes and flush it to the disk."""
    block = os.urandom(min(size, 2**22))  # not zeros, which some file systems do not write
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def _problem(folder: Path, ranks: int) -> str | None:
    """Wait until the files of all ranks are visible, and return what is wrong with renaming."""
    for rank in range(ranks):
        _wait_until_visible(folder / str(rank))
    return renaming_problem(folder)


def _too_small(settings: Settings, use: DiskUse) -> CheckResult | None:
    for place, needed, free in _budgets(settings, use):
        if needed > free:
            return CheckResult(
                "disk",
                "failed",
                f"{format_bytes(free)} are free at {place}, and {format_bytes(needed)} are needed: {use}",
                "free some space, choose another folder, or keep less: run.keep_last, run.keep_every, run.export_every",
            )
    return None


def _budgets(settings: Settings, use: DiskUse) -> Iterator[tuple[str, int, int]]:
    """Yield (place, bytes needed, bytes free) for every file system that the run writes to."""
    run = Path(settings.run.dir)
    saved = [path for path in (run / FOLDER).rglob("*") if path.is_file()]
    # Existing checkpoints already occupy part of the space.
    at_run = max(0, use.checkpoint * use.checkpoints - sum(path.stat().st_size for path in saved)) + use.exports
    sync = Path(settings.sync.dir) if settings.sync.dir else run
    same_file_system = nearest_existing(sync).stat().st_dev == nearest_existing(run).stat().st_dev
    free = shutil.disk_usage(nearest_existing(run)).free
    yield settings.run.dir, at_run + (use.sync if same_file_system else 0), free
    if not same_file_system:
        yield str(sync), use.sync, shutil.disk_usage(nearest_existing(sync)).free


def renaming_problem(folder: Path) -> str | None:
    """Return why files cannot be replaced, or folders renamed, as checkpoints need it; None if they can.

    While a file is replaced, a reader in another thread must never find it missing, empty or mixed.
    """
    path, contents = folder / "replaced", {"a" * 4096, "b" * 4096}
    path.write_text("a" * 4096, encoding="ascii")
    over, seen = threading.Event(), set[str]()

    def read() -> None:
        while not over.is_set():
            try:
                seen.add(path.read_text(encoding="ascii"))
            except OSError as error:
                seen.add(str(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for number in range(_REPLACEMENTS):
            building = folder / "replaced.incomplete"
            building.write_text("ab"[number % 2] * 4096, encoding="ascii")
            building.replace(path)
    finally:
        over.set()
        reader.join()
    if seen - contents:
        return "a reader can see a file that is only partly replaced"
    building = folder / "named.incomplete"
    building.mkdir()
    (building / "inside").write_text("complete", encoding="ascii")
    building.rename(folder / "named")
    if building.exists() or (folder / "named" / "inside").read_text(encoding="ascii") != "complete":
        return "a renamed folder loses its contents"
    return None
