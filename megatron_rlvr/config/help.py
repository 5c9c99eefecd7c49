"""The text of ``--help``: usage, and every key with its type, default and meaning. Imports no torch."""

import json
import re
import textwrap
from typing import Any

from megatron_rlvr.config import Settings
from megatron_rlvr.config.loading import fields

USAGE = """\
usage: rlvr train CONFIG.yaml [--ranks N] [--check] [--section.key VALUE ...]
       torchrun ... -m megatron_rlvr.train CONFIG.yaml [--section.key VALUE ...]

Trains a Hugging Face model by reinforcement learning with verifiable rewards on megatron-core: the policy gradient
touches only the forking tokens, the response tokens of highest entropy in the batch (arXiv 2506.01939).

  CONFIG.yaml            settings of the run. `extends: OTHER.yaml` in it takes all that it does not say from another
                         file, whose path starts at the folder of CONFIG.yaml
  --section.key VALUE    every key below is also a flag, and a flag wins over the file
  --ranks N              ranks that rlvr starts on this machine (default: one per GPU; without a GPU, as many as one
                         copy of the model needs)
  --check                check the settings and all files they name, print all settings as YAML and the plan in words,
                         and exit; needs no GPU. With --ranks 64 it checks the layout for 64 ranks
  --help                 print this text
"""

_INDENT = " " * 8


def help_text() -> str:
    """Return usage and every key with its type, default and meaning."""
    lines, current = [USAGE], ""
    for section, key, field in fields():
        if section != current:
            current = section
            lines.append(f"{section}: {Settings.model_fields[section].annotation.__doc__}")
        default = "required" if field.is_required() else f"default {_shown_default(field)}"
        lines.append(f"  --{section}.{key}  ({_shown_type(field.annotation)}, {default})")
        lines.append(textwrap.indent(field.description, _INDENT))
    lines.append("megatron: Megatron's own fields, passed through.")
    lines.append("  --megatron.FIELD VALUE")
    lines.append(f"{_INDENT}{Settings.model_fields['megatron'].description}")
    return "\n".join(lines) + "\n"


def _shown_default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if value == [] or value == "":
        return "empty"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown_type(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"typing\.Literal\[(.*?)\]", lambda m: m.group(1).replace("'", "").replace(", ", " | "), text)
    text = re.sub(r"(list)\[[\w.]*?\.?(\w+)Settings\]", "paths", text)
    text = re.sub(r"dict\[.*\]|[\w.]*Settings\b", "mapping", text)
    return re.sub(r"\bbool\b", "true | false", text).replace("None", "null")
