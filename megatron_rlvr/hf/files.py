"""Configuration and file names of a Hugging Face model folder, read without a weight. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from megatron_rlvr.hf.families import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object; copy the model's own")
    return config


def weight_files(folder: str | Path) -> list[Path]:
    """Return the safetensors files of a model folder.

    Raises:
        ModelError: If there are none, or one that the index names does not exist.
    """
    folder = Path(folder)
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ModelError(f"{index} does not name the files of tensors; download it again") from None
        if missing:
            raise ModelError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names; complete the download")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ModelError(f"{folder} holds no weights ({SINGLE} or {INDEX}); give a folder with safetensors")
