"""Environment variables of a training process, set where they are missing, before the libraries that read them.

They are for ranks and not for servers: a server cannot release memory that is in expandable segments. The trainer
starts no servers, so the variables may be set in its own process. Imports no torch.
"""

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

from megatron_rlvr.config import SettingsError

_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
_ALLOCATOR_TODAY = "PYTORCH_ALLOC_CONF"
"""Two names of one variable; newer releases of torch read either."""

_DEFAULTS = {
    # Megatron's tensor parallelism overlaps communication with matrix products only if the GPU has one queue for both.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Micro-batches have all lengths: segments of fixed size would leave holes that fit none of them.
    _ALLOCATOR: "expandable_segments:True",
    # A collective that fails or exceeds run.timeout_minutes ends its process; with 0 it would keep waiting.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # When a collective times out, each rank writes a trace of its last collectives, which shows the missing rank.
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}
_NONDETERMINISTIC = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"


def set_defaults(megatron: Mapping[str, Any]) -> None:
    """Set what is missing; to be called before torch is imported.

    Args:
        megatron: The section `megatron` of the settings. With ``deterministic_mode`` Transformer Engine must not choose
            attention kernels whose results vary, which Megatron refuses unless the environment says so.

    Raises:
        SettingsError: If a variable contradicts the settings.
    """
    for name, value in _DEFAULTS.items():
        if name != _ALLOCATOR or _ALLOCATOR_TODAY not in os.environ:
            os.environ.setdefault(name, value)
    if os.environ.get("WORLD_SIZE", "1") != "1":  # spinning threads of several ranks would slow each other down
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if megatron.get("deterministic_mode") and os.environ.setdefault(_NONDETERMINISTIC, "0") != "0":
        raise SettingsError(
            f"{_NONDETERMINISTIC}={os.environ[_NONDETERMINISTIC]}: contradicts megatron.deterministic_mode=true; unset "
            "one of the two"
        )


def quiet_libraries() -> None:
    """Have libraries that this process and its children import from now on warn of nothing and show no progress."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
