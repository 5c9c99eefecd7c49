"""A Slurm array with a task for each cell, and a job after it that writes the results."""

import shlex
import sys
from pathlib import Path

from megatron_rlvr.ablation.spec import Ablation


def slurm_script(ablation: Ablation, *, jobs: int, ranks: int | None) -> str:
    """Return the script of the array, to be piped into sbatch.

    Args:
        jobs: Number of tasks that Slurm runs at once.
        ranks: Ranks of each run; None for the default of `rlvr train`.
    """
    command = shlex.join([sys.executable, "-m", "megatron_rlvr.cli", "ablate", str(ablation.path)])
    flag = f" --ranks {ranks}" if ranks is not None else ""
    return f"""#!/bin/bash
#SBATCH --job-name={ablation.folder.name}
#SBATCH --array=0-{len(ablation.cells) - 1}%{jobs}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --signal=B:TERM@120
#SBATCH --output={ablation.folder}/slurm_%a.log
cd {shlex.quote(str(Path.cwd()))}
exec {command} --index "$SLURM_ARRAY_TASK_ID"{flag}
"""
