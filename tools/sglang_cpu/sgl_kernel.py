"""Stands for SGLang's kernel package, which has no build for a plain CPU: any name can be imported, none can be called.

A dense model on the torch_native attention back end imports its names and never calls one.
"""

from typing import Any, NoReturn


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} does not exist on a CPU")

    return absent
