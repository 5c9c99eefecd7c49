"""Version of NCCL, by which process groups send tensors of GPUs, in this process and in other environments.

NCCL connects only processes that have the same version.

As a program, which the Python of another environment runs, it prints the version there.
"""

import ctypes
import subprocess
import sys
from pathlib import Path

NAME, PACKAGE = "NCCL", "nvidia-nccl-cu13"
LABEL = "nccl"
"""Name of the label under which a server reports its version, beside its options."""

_SECONDS = 300.0


def version() -> str:
    """Return the version of the library that torch, a build for GPUs, has loaded.

    It may be newer than the one that torch was compiled with, which is all that torch reports.
    """
    import torch  # loads the library

    number = ctypes.c_int()
    try:
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))
    except OSError:  # it is a part of torch itself
        return ".".join(map(str, torch.cuda.nccl.version()[:3]))
    return f"{number.value // 10000}.{number.value // 100 % 100}.{number.value % 100}"


def versions(*pythons: Path) -> list[str | None]:
    """Return NCCL's version in the environment of each of these Pythons; None if its torch has none.

    Takes the seconds of importing torch; it is imported in all of them at once.
    """
    program = Path(__file__).read_text(encoding="utf-8")  # not as a file, whose folder would hide modules of others
    processes = [
        subprocess.Popen(
            [python, "-c", program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for python in pythons
    ]
    return [_answer(process) for process in processes]


def _answer(process: subprocess.Popen[bytes]) -> str | None:
    try:
        output, _ = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None
    lines = output.decode(errors="replace").split()
    return lines[-1] if lines and not process.returncode else None


if __name__ == "__main__":
    sys.stdout.write(version())
