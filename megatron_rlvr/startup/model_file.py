"""A GGUF file as `model.path`: all later modules read the Hugging Face folder that it is unpacked to."""

from pathlib import Path

from megatron_rlvr.config import Settings
from megatron_rlvr.hf.gguf import model_folder


def with_model_folder(settings: Settings) -> Settings:
    """Return the settings with a folder as `model.path`. Raises ModelError if a GGUF file there cannot be unpacked."""
    folder = model_folder(settings.model.path)
    if folder == Path(settings.model.path):
        return settings
    return settings.model_copy(update={"model": settings.model.model_copy(update={"path": str(folder)})})
