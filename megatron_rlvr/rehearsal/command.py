"""Command line of the rehearsal without GPUs: its options, the processes of the rehearsed ranks, and the output."""

import argparse
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.child_process import ends_with_parent
from megatron_rlvr.command_line import Parser, path, positive_int
from megatron_rlvr.config import Settings, SettingsError
from megatron_rlvr.config.loading import load_settings
from megatron_rlvr.errors import InputError
from megatron_rlvr.hf.families import transformer_fields
from megatron_rlvr.hf.files import read_config
from megatron_rlvr.hf.gguf import model_folder
from megatron_rlvr.planner.devices import DEVICES, Device
from megatron_rlvr.rehearsal.driver import build
from megatron_rlvr.rehearsal.report import Outcome, Summary, as_json, as_text
from megatron_rlvr.startup.layout_checks import check_experts, check_layout, check_lengths

DESCRIPTION = """\
Runs one rank of every pipeline stage through build, weight load, score, two training steps, export, and the
optimizer's save and load, at the run's real shapes, on a machine without GPUs: tensors have shapes and no values, and
the other ranks exist in name only.

    rlvr rehearse CONFIG.yaml --world 32                       # every layer: minutes
    rlvr rehearse CONFIG.yaml --world 32 --layers 2            # two layers of the model: under a minute
    rlvr rehearse CONFIG.yaml --world 32 --layers 2 --transformer-engine --parallel.context 2

Prints for every phase the memory of tensors on GPU and host, the peak beside that of `rlvr plan`, where the CPU would
wait for the GPU, the collectives with their bytes, and the number of operators. The model folder needs a config.json
and no weights. Needs a CUDA build of torch, and no GPU and no driver.

It does not show results of kernels, what NCCL does, fragmentation of memory, or speed.

Exit status: 0; 1 if a phase fails or the peak does not fit the GPU; 2 and one line on stderr if the input is wrong.
"""
# Several threads have nothing to gain on tensors without values.
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Job:
    """One rank to rehearse.

    Attributes:
        rank, stage: Number of the rank, and of its pipeline stage.
        world: Number of ranks.
        settings: The run's settings, with the model folder to read config.json from.
        memory: Bytes of the GPU.
        transformer_engine: Use Transformer Engine's layers instead of the project's own.
    """

    rank: int
    stage: int
    world: int
    settings: Mapping[str, Any]
    memory: int
    transformer_engine: bool


def main(arguments: Sequence[str], program: str) -> int:
    """Rehearse a run and return the exit status: 0, or 1 if a phase fails or the peak does not fit.

    Exits with status 2 and one line on stderr if the input is wrong.

    Args:
        program: Name of the command in messages.
    """
    parser = _parser(program)
    options, flags = parser.parse_known_args(list(arguments))
    try:
        settings = load_settings(options.config, flags)
        config = _model_config(options, settings)
        check_lengths(settings, config)
        fields = transformer_fields(config)
        check_layout(settings, fields, options.world)
        check_experts(settings, fields, options.world)
        check_torch()
        if options.transformer_engine and importlib.util.find_spec("transformer_engine") is None:
            raise SettingsError(
                "--transformer-engine: the package transformer_engine is missing; pip install --no-deps "
                "transformer_engine onnxscript onnx onnx_ir ml_dtypes einops, or leave the option out"
            )
        device = DEVICES[options.gpu]
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
            outcomes = _rehearse(Path(folder), settings, config, options, device)
    except InputError as error:
        parser.error(str(error))
    summary = Summary(settings, config, options.world, device, options.transformer_engine, tuple(outcomes))
    sys.stdout.write((json.dumps(as_json(summary), indent=1) if options.json else as_text(summary)) + "\n")
    return 0 if summary.passed else 1


def _parser(program: str) -> Parser:
    parser = Parser(
        program,
        description=DESCRIPTION,
        usage="%(prog)s CONFIG.yaml --world N [OPTIONS] [--section.key VALUE ...]",
    )
    add = parser.add_argument
    add("config", metavar="CONFIG.yaml", help="settings of the run; flags of the run (--section.key VALUE) may follow")
    add("--world", type=positive_int, required=True, metavar="N", help="number of ranks that train")
    add("--layers", type=positive_int, metavar="N", help="number of layers, instead of the model's")
    add("--model", type=path, metavar="DIR", help="model folder or config.json (default: model.path of CONFIG.yaml)")
    add("--gpu", choices=sorted(DEVICES), default="h100", help="type of the GPUs (default %(default)s)")
    add("--transformer-engine", action="store_true",
        help="use Transformer Engine's layers: its Python, with a stub of its extension")  # fmt: skip
    add("--json", action="store_true", help="print JSON in bytes instead of tables")
    return parser


def _model_config(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Return the contents of config.json, with the requested number of layers."""
    path = model_folder(options.model or settings.model.path)
    config = read_config(path.parent if path.name == "config.json" else path)
    return config | ({"num_hidden_layers": options.layers} if options.layers else {})


def check_torch() -> None:
    """Raise SettingsError if the installed torch is not a CUDA build. Does not import it."""
    spec = importlib.util.find_spec("torch")
    version = runpy.run_path(str(Path(spec.origin).with_name("version.py"))) if spec and spec.origin else {}
    if version.get("cuda") is None:
        raise SettingsError(
            f"torch {version.get('__version__', '(missing)')}: a rehearsal needs a CUDA build of torch, though no GPU; "
            "tools/install_rehearsal.sh FOLDER makes an environment with one (about 6 GB)"
        )


def _rehearse(
    folder: Path, settings: Settings, config: Mapping[str, Any], options: argparse.Namespace, device: Device
) -> list[Outcome]:
    """Rehearse the first rank of each pipeline stage, one after the other, each in a process of its own."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    values = settings.model_dump(mode="json")
    values["model"]["path"] = str(folder)
    library = build(folder)
    outcomes = []
    for stage in range(settings.parallel.pipeline):
        rank = stage * (options.world // settings.parallel.pipeline)
        job = Job(rank, stage, options.world, values, int(device.memory), options.transformer_engine)
        outcomes.append(_run(job, folder, library))
    return outcomes


def _run(job: Job, folder: Path, library: Path) -> Outcome:
    """Run the process of one rank with the stand-in for the driver; what it prints goes to stderr if it fails."""
    given, result, log = folder / "job.json", folder / f"result{job.stage}.json", folder / "log"
    given.write_text(json.dumps(asdict(job)), encoding="utf-8")
    command = [sys.executable, "-m", "megatron_rlvr.rehearsal.rank", str(given), str(result)]
    with log.open("wb") as output:
        status = subprocess.run(
            command,
            env=os.environ | _ENVIRONMENT | {"LD_PRELOAD": str(library)},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=ends_with_parent(signal.SIGKILL),
            check=False,
        ).returncode
    outcome = Outcome.of(json.loads(result.read_text(encoding="utf-8"))) if result.is_file() else None
    if outcome is not None and outcome.invalid:
        raise SettingsError(outcome.invalid)
    if outcome is None:
        outcome = Outcome(job.rank, job.stage, failed="start", error=f"its process ended with status {status}")
    if outcome.failed:
        sys.stderr.write(log.read_text(encoding="utf-8", errors="replace"))
    return outcome
