"""The process of one rehearsed rank: ``python -m megatron_rlvr.rehearsal.rank JOB.json RESULT.json``.

The command starts it once for each pipeline stage, with `command.Job` in JOB.json, and reads `report.Outcome` from
RESULT.json. A process of its own, because functions of torch are replaced and Megatron keeps its groups in global
variables.
"""

import importlib
import json
import sys
from dataclasses import asdict
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_rlvr.rehearsal.command import Job

# Their kernels take no fake tensors: Megatron is to find that they are missing, as on most machines without GPUs.
_HIDDEN = ("apex", "amp_C", "flash_attn")
_WEIGHT_GRADIENTS = "fused_weight_gradient_mlp_cuda"


def main(arguments: list[str]) -> None:
    """Rehearse the rank of JOB.json and write RESULT.json."""
    job = Job(**json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    _prepare_packages(job)
    rehearsal = importlib.import_module("megatron_rlvr.rehearsal.phases").RankRehearsal(job)
    rehearsal.run()
    Path(arguments[1]).write_text(json.dumps(asdict(rehearsal.outcome)), encoding="utf-8")


def _prepare_packages(job: Job) -> None:
    """Hide or replace the packages with kernels and the compiler, before Megatron is imported."""
    torch: Any = importlib.import_module("torch")
    torch.compile = importlib.import_module("megatron_rlvr.rehearsal.recorder").compiled
    for name in (*_HIDDEN, *(() if job.transformer_engine else ("transformer_engine",))):
        sys.modules[name] = None  # type: ignore[assignment]
    if job.transformer_engine:
        importlib.import_module("megatron_rlvr.rehearsal.te_extension").install()
    if job.settings["megatron"].get("gradient_accumulation_fusion"):
        kernels: Any = ModuleType(_WEIGHT_GRADIENTS)
        kernels.__spec__ = ModuleSpec(_WEIGHT_GRADIENTS, None)
        kernels.wgrad_gemm_accum_fp32 = kernels.wgrad_gemm_accum_fp16 = lambda *args: None
        sys.modules[_WEIGHT_GRADIENTS] = kernels


if __name__ == "__main__":
    main(sys.argv[1:])
