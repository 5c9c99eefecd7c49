"""The model that an evaluation samples from: a Hugging Face folder, a checkpoint, or a step of a run.

Imports no torch before the weights are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rlvr.checkpoint.store import FOLDER as CHECKPOINTS
from megatron_rlvr.checkpoint.store import latest_checkpoint
from megatron_rlvr.config import SettingsError
from megatron_rlvr.hf.files import weight_files
from megatron_rlvr.hf.gguf import model_folder
from megatron_rlvr.input_files import is_file, is_folder

if TYPE_CHECKING:
    import torch

_HUGGING_FACE = "hugging_face"


@dataclass(frozen=True)
class Target:
    """Model to evaluate.

    Attributes:
        weights: Folder that has the weights: a Hugging Face folder or a checkpoint.
        folder: Folder that has configuration and tokenizer.
        run: Folder of the run that it belongs to; None if it was not found through a run.
        step: Step of the run; None if it is not known.
    """

    weights: Path
    folder: Path
    run: Path | None = None
    step: int | None = None

    @property
    def is_checkpoint(self) -> bool:
        """True if the weights are a checkpoint of a run, or of `rlvr convert`."""
        return self.weights != self.folder

    def describe(self) -> dict[str, Any]:
        """Return what identifies the weights, JSON-compatible: the folder, and sizes and times of its weight files."""
        names = sorted(self.weights.glob("*.distcp")) if self.is_checkpoint else weight_files(self.weights)
        stats = [(path.name, path.stat()) for path in names]
        return {
            "path": str(self.weights.resolve()),
            "step": self.step,
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats},
        }

    def named_tensors(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield every weight by its Hugging Face name, one at a time.

        Raises:
            ModelError: If weights are missing or do not fit the configuration.
        """
        from megatron_rlvr.convert.conversion import checkpoint_tensors
        from megatron_rlvr.hf.files import read_config
        from megatron_rlvr.hf.weights import TensorReader

        if self.is_checkpoint:
            yield from checkpoint_tensors(self.weights)
            return
        reader = TensorReader(self.folder, read_config(self.folder))
        for name in sorted(reader.names()):
            yield name, reader.read(name)


def find_target(path: Path, step: int | None) -> Target:
    """Return the model at a path.

    Args:
        path: A Hugging Face folder, a GGUF file, a checkpoint, or the folder of a run.
        step: Step of the run; None for its export at the end, or else its latest checkpoint.

    Raises:
        SettingsError: If there is no model, or not of this step.
    """
    direct = _model_at(path)
    if direct is not None:
        if step is not None:
            raise SettingsError(f"--step {step}: {path} is a model and not the folder of a run; remove --step")
        return direct
    if not (is_file(path / "config.yaml") or is_folder(path / CHECKPOINTS)):
        raise SettingsError(
            f"{path} is no model, checkpoint or run (it has no config.json, metadata.json or config.yaml); give the "
            "folder of one"
        )
    found = _of_run(path, step)
    if found is None:
        which = "model" if step is None else f"model of step {step} (it has {_steps(path)})"
        raise SettingsError(f"{path}: the run has no {which}; give --step of a checkpoint or an export that exists")
    return found


def _model_at(path: Path) -> Target | None:
    path = model_folder(path)
    if is_file(path / "config.json"):
        return Target(path, path)
    if is_file(path / "metadata.json") and is_folder(path / _HUGGING_FACE):
        return Target(path, path / _HUGGING_FACE)
    return None


def _of_run(run: Path, step: int | None) -> Target | None:
    places: list[tuple[Path, int | None]]
    if step is not None:
        name = f"step_{step:06d}"
        places = [(run / "exports" / name, step), (run / CHECKPOINTS / name, step)]
    else:
        latest = latest_checkpoint(run / CHECKPOINTS)
        places = [(run / "hf", latest.step if latest else None)] if is_file(run / "summary.json") else []
        places += [(latest.folder, latest.step)] if latest else []
    for place, its_step in places:
        found = _model_at(place)
        if found is not None:
            return Target(found.weights, found.folder, run, its_step)
    return None


def _steps(run: Path) -> str:
    names = {path.name for place in ("exports", CHECKPOINTS) for path in (run / place).glob("step_*") if path.is_dir()}
    return ", ".join(sorted(names)) or "no checkpoint and no export"
