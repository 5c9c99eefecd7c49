"""Fixtures of settings that are resolved before a process group starts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from resolving import Resolve

from megatron_rlvr.config.loading import validate
from megatron_rlvr.startup.resolve import Resolved, resolve


@pytest.fixture
def resolve_with(model: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Resolves settings that are valid but for ``sections``, for ``ranks`` ranks (None: no launcher)."""

    def call(ranks: int | str | None = None, **sections: dict[str, Any]) -> Resolved:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if ranks is not None:
            monkeypatch.setenv("WORLD_SIZE", str(ranks))
        return resolve(validate(tiny.settings_for(model, problems, tmp_path / "run", **sections)))

    return call


@pytest.fixture
def broken_model(model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The section `model:` with a copy of the model whose config.json has ``changes``; None removes an entry."""

    def copy(text: str | None = None, **changes: Any) -> dict[str, Any]:
        folder = tmp_path / "broken"
        shutil.copytree(model, folder)
        config = json.loads((folder / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config) if text is None else text)
        return {"path": str(folder), "dtype": "float32"}

    return copy
