"""Configuration and file names of a Hugging Face model folder, read without a weight. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from megatron_rlvr.hf.families import ModelError

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
    if not path.is_file():
        raise ModelError(f"{folder} holds no config.json; give the folder of a Hugging Face model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); correct it") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, numbers or nesting beyond all limits
        raise ModelError(f"{path} cannot be read ({type(error).__name__}: {error}); copy the model's own") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object; copy the model's own")
    return config


def weight_files(folder: str | Path) -> list[Path]:
    """Return the safetensors files of a model folder.

    Raises:
        ModelError: If there are none, if one that the index names does not exist, or if there are a whole file and an
            index of others: transformers would load the one, SGLang the others.
    """
    folder = Path(folder)
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        raise ModelError(_no_weights(folder))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
        missing = [name for name in names if not (folder / name).is_file()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{index} does not name the files of tensors; download it again") from None
    if outside:
        raise ModelError(f"{index} names {outside[0]}, which is not in its folder; download it again")
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names; complete the download")
    if SINGLE not in names and (folder / SINGLE).is_file():
        raise ModelError(f"{folder} holds {SINGLE} and {INDEX}, which names other files; remove one of the two")
    return [folder / name for name in names]


def _no_weights(folder: Path) -> str:
    """Return why a folder without safetensors cannot be used, and what to do."""
    problem, remedy = "", "give a folder with safetensors"
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        problem, remedy = " but an adapter", "merge it into its base model and give the merged folder"
    elif parts := [name for name in names if name.endswith(".safetensors")]:
        problem, remedy = f" but {parts[0]}", "complete the download"
    elif others := [name for name in names if name.endswith(OTHER_FORMATS)]:
        problem = f" but {others[0]}, which is not read"
        remedy = "load it with transformers' from_pretrained and give the folder that its save_pretrained writes"
    return f"{folder} holds no weights ({SINGLE} or {INDEX}){problem}; {remedy}"
