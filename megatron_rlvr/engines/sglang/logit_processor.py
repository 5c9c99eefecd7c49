"""Custom logit processors in requests: as the text of their module, since servers do not have the project installed.

SGLang unpickles what a request has as processor and calls it for an instance. Functions pickled by value would bind the
server to this Python's byte code; text does not. Servers run it only with --enable-custom-logit-processor.
"""

import inspect
import json
import pickle
from dataclasses import asdict
from typing import Any

from megatron_rlvr.engines import two_temperatures
from megatron_rlvr.engines.two_temperatures import ServerProcessor, TwoTemperatures


class _Evaluated:
    """An object that is unpickled as the value of an expression."""

    def __init__(self, expression: str) -> None:
        self._expression = expression

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, (self._expression,)


def processor_fields(temperatures: TwoTemperatures) -> tuple[str, dict[str, float]]:
    """Return the fields ``custom_logit_processor`` and ``sampling_params.custom_params`` of a request."""
    source = inspect.getsource(two_temperatures)
    # Dataclasses look for the module of their class by its name.
    expression = (
        "(lambda module: (__import__('sys').modules.__setitem__(module.__name__, module), "
        f"exec({source!r}, module.__dict__), module.{ServerProcessor.__name__})[-1])"
        f"(__import__('types').ModuleType({two_temperatures.__name__.replace('.', '_')!r}))"
    )
    return json.dumps({"callable": pickle.dumps(_Evaluated(expression)).hex()}), asdict(temperatures)
