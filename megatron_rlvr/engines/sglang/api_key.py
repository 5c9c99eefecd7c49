"""The key that servers demand: in a file, so that it is on no command line and in no settings. Imports no torch.

SGLang's option is ``--api-key KEY``; requests then need ``Authorization: Bearer KEY``, except those to /health, /ready
and /metrics. A process's command line can be read by every user of its machine, so the option is passed in a YAML file
(``--config``).
"""

import json
import os
import re
from pathlib import Path

from megatron_rlvr.config import RolloutSettings
from megatron_rlvr.errors import InputError
from megatron_rlvr.input_files import BadFileError, read_text

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~+/=-]{7,511}")
_MAX_BYTES = 4096


def read_api_key(path: str | Path, key: str) -> str:
    """Return the key in a file of one line.

    Args:
        key: Setting or flag that names the file, for messages, which never show the content.

    Raises:
        InputError: If there is no such file, or no key in it.
    """
    try:
        text = read_text(path, _MAX_BYTES).strip()
    except FileNotFoundError:
        raise InputError(f"{key}={path}: does not exist; give a file with the servers' key") from None
    except BadFileError as error:
        raise InputError(f"{key}={path}: cannot be read ({error}); give a file with the servers' key") from None
    if not _KEY.fullmatch(text):
        raise InputError(
            f"{key}={path}: holds no key; write one line of 8 to 512 letters, digits and . _ ~ + / = -, which begins "
            "with a letter or digit"
        )
    return text


def key_of(settings: RolloutSettings) -> str | None:
    """Return the key that the servers demand, from `rollout.api_key_file`; None if they demand none.

    Raises:
        InputError: If the file holds no key.
    """
    return None if settings.api_key_file is None else read_api_key(settings.api_key_file, "rollout.api_key_file")


def write_server_config(path: Path, api_key: str) -> None:
    """Write the YAML file with SGLang's option, readable by this user only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(f"api-key: {json.dumps(api_key)}\n")
