"""NCCL's version in an environment. NCCL connects only processes that have the same one."""

import subprocess
from pathlib import Path

# The library that is loaded: it may be newer than the one that torch was compiled with.
_PROGRAM = """
import ctypes, torch
number = ctypes.c_int()
try:
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))
    print(f"{number.value // 10000}.{number.value // 100 % 100}.{number.value % 100}")
except OSError:  # it is a part of torch itself
    print(".".join(map(str, torch.cuda.nccl.version())))
"""
_SECONDS = 300.0


def versions(*pythons: Path) -> list[str | None]:
    """Return NCCL's version in the environment of each of these Pythons; None if its torch has none.

    Takes the seconds of importing torch; it is imported in all of them at once.
    """
    processes = [
        subprocess.Popen(
            [python, "-c", _PROGRAM], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
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
