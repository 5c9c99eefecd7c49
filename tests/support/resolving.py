"""Settings that are resolved or refused, for the tests of startup; its fixtures are in tests/startup/conftest.py."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_rlvr.errors import InputError
from megatron_rlvr.startup.resolve import Resolved

Resolve = Callable[..., Resolved]


def refusal(call: Callable[..., Any], *arguments: Any, **sections: Any) -> str:
    """The message of the input error that a call raises, which must be one sentence with a remedy."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **sections)
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message
    return message
