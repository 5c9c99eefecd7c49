"""Configuration and file names of a Hugging Face model folder, read without a weight. Imports no torch."""

from pathlib import Path
from typing import Any

from megatron_rlvr.hf.families import ModelError
from megatron_rlvr.input_files import is_file, read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
"""Endings of files with weights in formats that are not read."""


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return ``config.json`` of a model folder.

    Raises:
        ModelError: If it does not exist or is not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not is_file(path):
        raise ModelError(f"{folder} holds no config.json; give the folder of a Hugging Face model")
    return read_json_object(path, ModelError, "copy the model's own")


def weight_files(folder: str | Path) -> list[Path]:
    """Return the safetensors files of a model folder.

    Raises:
        ModelError: If there are none, if one that the index names does not exist, or if there are a whole file and an
            index of others: transformers would load the one, SGLang the others.
    """
    folder = Path(folder)
    index = folder / INDEX
    if not is_file(index):
        if is_file(folder / SINGLE):
            return [folder / SINGLE]
        raise ModelError(_no_weights(folder))
    files = read_json_object(index, ModelError, "download it again").get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ModelError(f"{index} does not name the files of tensors; download it again")
    names = sorted(set(files.values()))
    outside = [name for name in names if Path(name).name != name]
    missing = [name for name in names if not is_file(folder / name)]
    if outside:
        raise ModelError(f"{index} names {outside[0]}, which is not in its folder; download it again")
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names; complete the download")
    if SINGLE not in names and is_file(folder / SINGLE):
        raise ModelError(f"{folder} holds {SINGLE} and {INDEX}, which names other files; remove one of the two")
    return [folder / name for name in names]


def _no_weights(folder: Path) -> str:
    """Return why a folder without safetensors cannot be used, and what to do."""
    problem, remedy = "", "give a folder with safetensors"
    try:
        names = sorted(path.name for path in folder.iterdir())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} cannot be read ({error}); give the folder of a Hugging Face model") from None
    if "adapter_config.json" in names:
        problem, remedy = " but an adapter", "merge it into its base model and give the merged folder"
    elif parts := [name for name in names if name.endswith(".safetensors")]:
        problem, remedy = f" but {parts[0]}", "complete the download"
    elif others := [name for name in names if name.endswith(OTHER_FORMATS)]:
        problem = f" but {others[0]}, which is not read"
        remedy = "load it with transformers' from_pretrained and give the folder that its save_pretrained writes"
        if others[0].endswith(".gguf"):
            problem, remedy = f" but {others[0]}", f"give the path of that file, {folder / others[0]}"
    return f"{folder} holds no weights ({SINGLE} or {INDEX}){problem}; {remedy}"
