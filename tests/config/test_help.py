"""The text of --help."""

import re
import textwrap

import yaml

from megatron_rlvr.config import Settings
from megatron_rlvr.config.help import help_text
from megatron_rlvr.config.loading import fields


def test_help_shows_every_key_with_its_meaning_and_default() -> None:
    text = help_text()
    for section, key, field in fields():
        assert textwrap.indent(field.description, " " * 8) in text
        shown = re.search(rf"^  --{section}\.{key}  \((.+), (required|default (.+))\)$", text, re.MULTILINE)
        assert shown is not None, f"{section}.{key}"
        default = field.get_default(call_default_factory=True)
        if field.is_required():
            assert shown[2] == "required"
        elif default in ([], ""):
            assert shown[3] == "empty"
        else:
            read_back = yaml.safe_load(shown[3])
            assert read_back == default or (default is not None and float(read_back) == default)
            assert isinstance(read_back, bool) == isinstance(default, bool)  # 0 is not `false`, though equal to it


def test_help_shows_types_as_python_names_them_and_choices() -> None:
    text = help_text()
    assert "(top | bottom | band | random | all, default top)" in text
    assert "(float32 | bfloat16, default bfloat16)" in text
    assert "(true | false, default false)" in text
    assert "--run.steps  (int, required)" in text
    assert "--optimizer.learning_rate  (float, default 1e-06)" in text
    assert "--model.tokenizer  (str | null, default null)" in text
    assert not re.search(r"\b(Literal|typing|None|NoneType|Optional|bool)\b", text)
    assert [line for line in text.splitlines() if len(line) > 120] == []


def test_help_introduces_every_section() -> None:
    text = help_text()
    for section, field in Settings.model_fields.items():
        assert re.search(rf"^{section}: [A-Z].*\.$", text, re.MULTILINE), section
        assert section == "megatron" or str(field.annotation.__doc__) in text
