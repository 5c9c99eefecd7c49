"""Models that analyses look into: Hugging Face folders, checkpoints, and steps of a run."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_rlvr.errors import InputError
from megatron_rlvr.evaluation.command.target import Target, find_target


class StepsError(InputError):
    """Steps of which it is not known whose they are."""


def find_models(paths: Sequence[Path], steps: Sequence[int] | None) -> list[Target]:
    """Return the models at the paths; with steps, those steps of the only path, which is a run.

    Raises: StepsError, SettingsError if there is no such model.
    """
    if steps is None:
        return [find_target(path, None) for path in paths]
    if len(paths) != 1:
        raise StepsError(f"--step {steps[0]}: needs one --model, the folder of a run; give one, or remove --step")
    return [find_target(paths[0], step) for step in sorted(set(steps))]


def name_of(model: Target) -> str:
    """Return the name of a model in tables and plots."""
    return str(model.weights) if model.step is None else f"step {model.step}"


@contextmanager
def hugging_face_folder(
    model: Target, place: Path, write: Callable[[Callable[[], None]], None] = lambda action: action()
) -> Iterator[Path]:
    """Give a Hugging Face folder of a model: its own, or one in ``place`` that lasts as long as the block.

    Args:
        model: The model.
        place: Folder for the weights of a checkpoint.
        write: Runs what writes the folder; on several ranks a collective that runs it on one.
    """
    if not model.is_checkpoint:
        yield model.folder
        return
    folder = place / "model"

    def convert() -> None:
        from megatron_rlvr.convert.conversion import checkpoint_tensors
        from megatron_rlvr.hf.weights import write_folder

        place.mkdir(parents=True, exist_ok=True)
        write_folder(folder, model.folder, checkpoint_tensors(model.weights), fsync=False)

    write(convert)
    yield folder
    # After a failure of one rank the others would wait here; then the folder stays, and the next command replaces it.
    write(lambda: shutil.rmtree(folder, ignore_errors=True))
