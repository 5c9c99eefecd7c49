"""Settings files that extend another, and settings that a later layer switches off.

Settings are read in layers: the file that ``extends:`` names (which may extend another), the file itself, the flags. A
later layer wins, key by key; a list is replaced as a whole.

A later layer may switch a feature off for which an earlier one has settings, such as ``--evaluate.sets '[]'`` for a
recipe with ``evaluate.group_size``. These settings are then left out and reported as not used. Within one layer, a
setting without effect is an error (`no_effect.py`): its author expects it to do something.

Example::

    # forking_29k.yaml
    extends: forking_20k.yaml         # relative to this file
    run: {dir: runs/forking_29k}
    rollout: {max_response_tokens: 29696}
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlvr.config.no_effect import NoEffect
from megatron_rlvr.config.section import SettingsError, Unused
from megatron_rlvr.input_files import same_place

EXTENDS = "extends"

# Meant for the objective beside which they are written: bounds of a token's ratio make no sense for a sequence's.
_OF_THE_OBJECTIVE = ("loss.clip_low", "loss.clip_high", "loss.dual_clip")
_DEFAULT_OBJECTIVE = "dapo"


def read_layers(path: Path, read: Callable[[Path], dict[str, Any]]) -> list[dict[str, Any]]:
    """Read a settings file and the files that it extends.

    Args:
        path: The settings file.
        read: Reads one file. Raises: SettingsError.

    Returns: the content of each file without ``extends``, the one that extends no other first.
    Raises: SettingsError, also if files extend each other in a circle.
    """
    layers: list[dict[str, Any]] = []
    seen = [same_place(path)]
    while True:
        values = read(path)
        base = values.pop(EXTENDS, None)
        layers.insert(0, values)
        if base is None:
            return layers
        if not isinstance(base, str) or not base:
            raise SettingsError(f"{path}: extends={base!r} is not a path; give the path of one settings file")
        extended = path.parent / base
        if same_place(extended) in seen:
            raise SettingsError(f"{path}: extends={base} leads back to {extended}; remove one of the extends")
        if not os.path.lexists(extended):
            raise SettingsError(
                f"{path}: extends={base} does not exist; correct the path, which starts at {path.parent}"
            )
        path = extended
        seen.append(same_place(path))


@dataclass
class Layers:
    """Merged settings that know in which layer each key was set.

    Attributes:
        values: {section: {key: value}}, merged.
        unused: Settings that were left out.
    """

    values: dict[str, Any] = field(default_factory=dict)
    unused: list[Unused] = field(default_factory=list)
    _layer_of: dict[str, int] = field(default_factory=dict)
    _objectives: list[str] = field(default_factory=list)

    def add(self, layer: Mapping[str, Any]) -> None:
        """Merge a layer over the present ones."""
        for section, keys in layer.items():
            mine = self.values.get(section)
            if isinstance(keys, dict) and isinstance(mine, dict):
                mine.update(keys)
            elif section not in self.values or isinstance(mine, dict):
                self.values[section] = dict(keys) if isinstance(keys, dict) else keys
            # else no section, and an error whatever a later layer says
        self.close(_dotted(layer))

    def close(self, keys: Sequence[str]) -> None:
        """End a layer that has set ``keys`` of `values`."""
        self._layer_of |= dict.fromkeys(keys, len(self._objectives))
        self._objectives.append(str(self._value("loss.objective") or _DEFAULT_OBJECTIVE))

    def drop_settings_of_other_objectives(self) -> None:
        """Leave out clip bounds that an earlier layer has set for another objective than the last layer's."""
        for key in _OF_THE_OBJECTIVE:
            layer = self._layer_of.get(key) if isinstance(self.values.get("loss"), dict) else None
            if layer is not None and self._objectives[layer] != self._objectives[-1]:
                self._drop(key, "loss.objective")

    def drop(self, row: NoEffect) -> bool:
        """Leave out ``row.key`` if a later layer has set ``row.other``; return whether it was left out."""
        if row.key not in self._layer_of or self._layer_of[row.key] >= self._layer_of.get(row.other, -1):
            return False
        self._drop(row.key, row.other)
        return True

    def _drop(self, dotted: str, other: str) -> None:
        section, key = dotted.split(".")
        del self._layer_of[dotted]
        self.unused.append(Unused(dotted, self.values[section].pop(key), other, self._value(other)))

    def _value(self, dotted: str) -> Any:
        section, key = dotted.split(".")
        keys = self.values.get(section)
        return keys.get(key) if isinstance(keys, dict) else None


def _dotted(layer: Mapping[str, Any]) -> list[str]:
    return [f"{section}.{key}" for section, keys in layer.items() if isinstance(keys, dict) for key in keys]
