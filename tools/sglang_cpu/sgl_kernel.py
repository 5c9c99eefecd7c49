"""Stand-in for SGLang's kernel package, which has no CPU build: any name can be imported, and none can be called.

A dense model with the torch_native attention backend imports names of the package and never calls one.
"""

from typing import Any, NoReturn


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} does not exist on a CPU")

    return absent
