"""Responses that an analysis samples first, by `rlvr evaluate` in a process of its own."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rlvr.child_process import ends_with_parent


def sample(model: Path, step: int | None, out: Path, words: Sequence[str]) -> int:
    """Evaluate a model, or resume its evaluation; return the exit status. What the command prints goes to stderr.

    Args:
        model: Model, checkpoint or run.
        step: Step of the run; None for its last.
        out: Folder of the evaluation.
        words: Further words of `rlvr evaluate`.
    """
    which = [] if step is None else ["--step", str(step)]
    # Behind a `--` of their own there may be flags of servers, so the options of this command come first.
    command = [sys.executable, "-m", "megatron_rlvr.cli", "evaluate", str(model), *which, "--out", str(out), *words]
    done = subprocess.run(command, stdout=sys.stderr, check=False, preexec_fn=ends_with_parent(signal.SIGTERM))
    return done.returncode if done.returncode >= 0 else 128 - done.returncode
