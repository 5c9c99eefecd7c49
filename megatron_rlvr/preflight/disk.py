"""Whether the run folder's file system can hold what the run will write, fast enough, and as checkpoints rely on it.

Bytes a parameter in a checkpoint: its weight in `model.dtype`, and the optimizer's: Adam's two moments in fp32, and
beside them the fp32 weight where the model's is bfloat16, or where the distributed optimizer keeps its own.
"""

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

from megatron_rlvr.checkpoint.store import FOLDER
from megatron_rlvr.config import Settings
from megatron_rlvr.hf.families import rows_of, tensor_shapes
from megatron_rlvr.preflight.context import Site, existing, faults_in
from megatron_rlvr.preflight.results import Finding, from_sentence, in_gb, in_spans

_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
_MOMENTS_BYTES, _MAIN_WEIGHT_BYTES = 8, 4

# That a rank writes, and all ranks together at most.
_PROBE_BYTES, _PROBES_BYTES = 2**26, 2**33
# A network file system may keep for this long that a file is not there.
_SEEN_SECONDS = 60.0
_REPLACEMENTS = 200
# A checkpoint that takes longer is worth a word.
_LONG_SECONDS = 300.0


@dataclass(frozen=True)
class Wanted:
    """What a run wants of a disk.

    Attributes:
        checkpoint: bytes of one.
        checkpoints: that are there at once, at most, the one that is being built among them.
        exports: bytes of the Hugging Face folders on the way and at the end.
        sync: bytes of the weights in `sync.dir`, the new ones beside the old.
    """

    checkpoint: int
    checkpoints: int
    exports: int
    sync: int

    def __str__(self) -> str:
        parts = [f"{self.checkpoints} checkpoint(s) of {in_gb(self.checkpoint)}"]
        parts += [f"{in_gb(self.exports)} of exports"] if self.exports else []
        parts += [f"{in_gb(self.sync)} for servers to load"] if self.sync else []
        return " + ".join(parts)


def wanted(settings: Settings, config: Mapping[str, Any]) -> Wanted:
    """From the number of parameters of a model with this ``config.json``."""
    run, parameters = settings.run, parameter_count(config)
    weight = _WEIGHT_BYTES[settings.model.dtype]
    main = settings.model.dtype != "float32" or bool(settings.megatron.get("use_distributed_optimizer"))
    saves = 1 if not run.save_every else math.ceil(run.steps / run.save_every)
    kept = run.steps // run.keep_every if run.keep_every else 0
    exports = (run.steps // run.export_every if run.export_every else 0) + run.export
    return Wanted(
        checkpoint=parameters * (weight + _MOMENTS_BYTES + (_MAIN_WEIGHT_BYTES if main else 0)),
        checkpoints=min(saves, run.keep_last + 1 + kept),
        exports=exports * parameters * weight,
        sync=2 * parameters * weight if settings.sync.method == "disk" and settings.rollout.engine == "sglang" else 0,
    )


def parameter_count(config: Mapping[str, Any]) -> int:
    """Parameters of a model with this ``config.json``; tied ones once."""
    return sum(math.prod(shape) for (row,) in rows_of(config) for shape in tensor_shapes(row, config))


def check_disk(site: Site) -> Finding:
    """Room and speed for checkpoints, one folder for all ranks, and files that are replaced in one step."""
    settings = site.resolved.settings
    folder = site.new_folder(Path(settings.run.dir))
    if site.ranks.is_main:
        (folder / "0").touch()
    waits = site.attempt(lambda: _seconds_until(folder / "0"))
    if faults := faults_in(waits):
        blind = in_spans([fault.rank for fault in faults])
        return Finding(
            "disk",
            "failed",
            f"what rank 0 writes to {folder.parent} is not seen on ranks {blind} in {_SEEN_SECONDS:.0f} s",
            "choose a run.dir on a file system that all hosts share, under the same path",
        )
    wants = wanted(settings, site.resolved.hf_config)
    if lacking := site.gather(_lacking(settings, wants) if site.ranks.is_main else None)[0]:
        return lacking
    size = min(_PROBE_BYTES, _PROBES_BYTES // site.ranks.world_size)
    times = site.attempt(lambda: _write(folder / str(site.ranks.rank), size))
    if faults := faults_in(times):
        return from_sentence("disk", faults[0].sentence)
    problems = site.attempt(lambda: _problem(folder, site.ranks.world_size) if site.ranks.is_main else None)
    if faults := faults_in(problems):
        return from_sentence("disk", faults[0].sentence)
    if problems[0]:
        return Finding("disk", "failed", f"{folder.parent}: {problems[0]}", "choose a run.dir on a POSIX file system")
    speed = site.ranks.world_size * size / max(seconds for seconds in times if isinstance(seconds, float))
    seconds = wants.checkpoint / speed
    _, _, free = next(_budgets(settings, wants))
    found = f"{in_gb(free)} free at {settings.run.dir} for {wants}; {in_gb(speed)}/s from all ranks together, "
    found += f"{seconds:.0f} s a checkpoint"
    if seconds > _LONG_SECONDS:
        remedy = "raise run.save_every so that saving is a small part of the run, or choose a faster file system"
        return Finding("disk", "warned", found, remedy)
    return Finding("disk", "passed", found)


def _seconds_until(path: Path) -> float:
    """How long it takes until a file is there. TimeoutError if it does not come."""
    start = time.monotonic()
    while not path.exists():
        if time.monotonic() - start > _SEEN_SECONDS:
            raise TimeoutError(f"{path} is not there")
        with suppress(OSError):
            os.listdir(path.parent)  # has a network file system look again
        time.sleep(0.05)
    return time.monotonic() - start


def _write(path: Path, size: int) -> float:
    """Seconds for a file of so many bytes to be on the disk."""
    block = os.urandom(min(size, 2**22))  # not zeros, which some file systems do not write
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def _problem(folder: Path, ranks: int) -> str | None:
    """Whether all ranks' files come to be seen, and what is wrong with renaming."""
    for rank in range(ranks):
        _seconds_until(folder / str(rank))
    return renaming_problem(folder)


def _lacking(settings: Settings, wants: Wanted) -> Finding | None:
    for place, needed, free in _budgets(settings, wants):
        if needed > free:
            return Finding(
                "disk",
                "failed",
                f"{in_gb(free)} are free at {place}, and {in_gb(needed)} are needed: {wants}",
                "make room, choose another folder, or keep less: run.keep_last, run.keep_every, run.export_every",
            )
    return None


def _budgets(settings: Settings, wants: Wanted) -> Iterator[tuple[str, int, int]]:
    """(place, bytes needed, bytes free) of every file system that the run writes to."""
    run = Path(settings.run.dir)
    saved = [path for path in (run / FOLDER).rglob("*") if path.is_file()]
    # Checkpoints that are there have their room already.
    at_run = max(0, wants.checkpoint * wants.checkpoints - sum(path.stat().st_size for path in saved)) + wants.exports
    sync = Path(settings.sync.dir) if settings.sync.dir else run
    together = existing(sync).stat().st_dev == existing(run).stat().st_dev
    yield settings.run.dir, at_run + (wants.sync if together else 0), shutil.disk_usage(existing(run)).free
    if not together:
        yield str(sync), wants.sync, shutil.disk_usage(existing(sync)).free


def renaming_problem(folder: Path) -> str | None:
    """Why files cannot be replaced, or folders renamed, the way checkpoints do it; None if they can.

    A reader looks at a file all the while that it is replaced, and must never find it missing, empty or mixed.
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
        return "a file that is replaced is seen half-done by who reads it"
    building = folder / "named.incomplete"
    building.mkdir()
    (building / "inside").write_text("whole", encoding="ascii")
    building.rename(folder / "named")
    if building.exists() or (folder / "named" / "inside").read_text(encoding="ascii") != "whole":
        return "a folder that is renamed loses its content"
    return None
