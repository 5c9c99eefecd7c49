"""A stand-in for the GPU driver: the two questions that torch's autograd engine asks one before a backward pass.

The engine asks, for every device, whether the driver has a context there. It does so in compiled code, so the answers
are a small library, built by the C compiler that Triton needs too, and loaded before torch: no device until
`show_devices`, so that importing libraries finds none; then eight, none of them with a context.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

from megatron_rlvr.config import SettingsError

_LIBRARY = "libcuda.so.1"
# The first name is c10::cuda::device_count() of torch's compiled code.
_SOURCE = """
static signed char devices = 0;
void show_devices(void) { devices = 8; }
signed char _ZN3c104cuda12device_countEv(void) { return devices; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
"""


def build(folder: Path) -> Path:
    """Compile the library into a folder and return its path, for LD_PRELOAD.

    Raises:
        SettingsError: If there is no C compiler, or it fails.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SettingsError("a rehearsal needs a C compiler; install gcc")
    path = folder / _LIBRARY
    command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{_LIBRARY}", "-x", "c", "-", "-o", str(path)]
    done = subprocess.run(command, input=_SOURCE, text=True, capture_output=True, check=False)
    if done.returncode:
        raise SettingsError(f"{compiler} cannot build a shared library: {' '.join(done.stderr.split())}; install gcc")
    return path


def show_devices() -> None:
    """Let torch's compiled code find eight devices from now on, in a process that has loaded the library."""
    ctypes.CDLL(_LIBRARY).show_devices()
