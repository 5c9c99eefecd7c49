"""A Slurm array with a task for each cell. `rlvr ablate SPEC.yaml --results` writes the results when it has ended."""

import re
import shlex
import sys
from pathlib import Path

from megatron_rlvr.ablation.spec import Ablation, SpecError

# Slurm ends an option at a blank, and gives quotes, backslashes, # and % meanings of their own.
_SPECIAL = re.compile(r"""[\s"'\\#%]""")


def slurm_script(ablation: Ablation, *, jobs: int, ranks: int | None) -> str:
    """Return the script of the array, to be piped into sbatch.

    Args:
        jobs: Number of tasks that Slurm runs at once.
        ranks: Ranks of each run; None for the default of `rlvr train`.

    Raises:
        SpecError: The options of a Slurm script cannot hold the path of the folder.
    """
    if _SPECIAL.search(str(ablation.folder)):
        raise SpecError(
            f"{ablation.path}: dir={ablation.spec.dir}: the options of a Slurm script cannot hold blanks, quotes and "
            "\\ # %; choose another dir"
        )
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
