"""The specification of an ablation: one recipe, arms that differ from it in named settings, and seeds.

    base: ../quickstart/config.yaml   # settings file that all runs extend; relative to the specification
    dir: runs/ablations/masks         # folder of all runs and results
    settings: {run: {steps: 20}}      # settings of all arms, over the base
    seeds: [0, 1, 2, 3, 4]
    baseline: all_tokens              # arm that the others are compared with
    arms:                             # {name: settings of this arm, over the others}
      all_tokens: {selection: {keep: all}}
      forks_20: {selection: {fraction: 0.2}}
    target: 0.8                       # accuracy for which seconds and tokens are compared; may be left out

A *cell* is one arm with one seed: one run. Imports no torch.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from megatron_rlvr import atomic
from megatron_rlvr.config import Settings, SettingsError, names_of
from megatron_rlvr.config.layers import EXTENDS
from megatron_rlvr.config.loading import load_settings, read_yaml
from megatron_rlvr.config.section import FreeForm, PathText, Section
from megatron_rlvr.config.yaml_format import Dumper, shown
from megatron_rlvr.errors import InputError
from megatron_rlvr.input_files import is_file
from megatron_rlvr.write_errors import explained

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
# Set for each cell; `overwrite` and `resume` so that the same command resumes.
_OWN = ("dir", "seed", "overwrite", "resume")


class SpecError(InputError):
    """A specification that cannot be used. The message is one sentence: `key=value: problem; remedy`."""


class Spec(Section):
    """Content of a specification; see the module docstring."""

    base: PathText = Field(min_length=1)
    dir: PathText = Field(min_length=1)
    settings: FreeForm = Field(default_factory=dict)
    seeds: list[int] = Field(min_length=1, max_length=1000)
    baseline: str
    arms: FreeForm
    evaluation: str | None = None
    target: float | None = Field(default=None, gt=0, le=1)

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        for seed in seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"seeds={shown(seed)}: out of range; give ints from 0 to 2**32 - 1")
            if seeds.count(seed) > 1:
                raise ValueError(f"seeds={seed}: given twice; give each once")
        return seeds

    @model_validator(mode="after")
    def _combination(self) -> "Spec":
        for name, changes in self.arms.items():
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"arms.{shown(name)}: no name of an arm, which is that of a folder; use at most 64 letters, digits "
                    "and _ . + -"
                )
            if not isinstance(changes, dict):
                raise ValueError(f"arms.{name}={shown(changes)}: not a mapping of sections; write {{}} for the base")
        if len(self.arms) < 2:
            raise ValueError(f"arms: {len(self.arms)} given, and one alone compares nothing; give two or more")
        if self.baseline not in self.arms:
            raise ValueError(f"baseline={shown(self.baseline)}: none of the arms; choose from {', '.join(self.arms)}")
        for key in _OWN:
            if key in _section(self.settings, "run"):
                raise ValueError(f"settings.run.{key}: is set for each run by rlvr ablate; remove it")
        for name, changes in self.arms.items():
            for section in ("run", "evaluate"):
                if section in changes:
                    raise ValueError(
                        f"arms.{name}.{section}: all arms run and are evaluated alike; move it to settings.{section}"
                    )
        return self


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Cell:
    """One run: an arm with a seed.

    Attributes:
        index: Place among all cells, from 0; all arms of the first seed come first.
        file: Settings file of the run.
        folder: Its run folder (`run.dir`).
        log: Output of the run.
        settings: Its settings.
    """

    index: int
    arm: str
    seed: int
    file: Path
    folder: Path
    log: Path
    settings: Settings

    @property
    def name(self) -> str:
        """Name in messages."""
        return f"{self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class Ablation:
    """A specification whose settings files are written and checked.

    Attributes:
        evaluation: Problem set whose accuracy the conclusion is about.
    """

    path: Path
    spec: Spec
    cells: tuple[Cell, ...]
    evaluation: str

    @property
    def folder(self) -> Path:
        """Folder of all runs and results."""
        return Path(self.spec.dir)


def read_spec(path: Path) -> Spec:
    """Read a specification. Raises: SpecError for the first error found."""
    values = read_yaml(path, "the specification of an ablation", SpecError)
    if not isinstance(values, dict):
        raise SpecError(f"{path} holds no mapping; give the keys {', '.join(Spec.model_fields)}")
    try:
        return Spec.model_validate(values)
    except ValidationError as error:
        raise SpecError(f"{path}: {_explain(error.errors()[0])}") from None


def _explain(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}; the keys are {', '.join(Spec.model_fields)}"
    if error["type"] == "missing":
        return f"{key} is missing; set it"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{key}={shown(error['input'])}: {error['msg'].lower()}; correct it"


def prepare(path: Path) -> Ablation:
    """Read a specification, write the settings files of all cells, and check them.

    A settings file extends that of its arm, which extends the common one, which extends the base; so that an arm may
    switch off what the others have settings for, as in any settings file.

    Raises:
        SpecError: If the specification or the settings of an arm cannot be used; WriteError.
    """
    spec = read_spec(path)
    folder = Path(spec.dir)
    base = path.parent / spec.base
    if not is_file(base):
        raise SpecError(f"{path}: base={spec.base} does not exist; correct the path, which starts at {path.parent}")
    with explained("the settings files of the ablation", folder):
        common = _write(folder / "settings.yaml", base, spec.settings)
        cells: list[Cell] = []
        for seed in spec.seeds:
            for arm, changes in spec.arms.items():
                own = folder / arm
                file = own / f"seed_{seed}.yaml"
                place = own / f"seed_{seed}"
                run = {"dir": str(place), "seed": seed, "overwrite": False, "resume": "auto"}
                _write(file, _write(own / "arm.yaml", common, changes), {"run": run})
                try:
                    settings = load_settings(file)
                except SettingsError as error:
                    raise SpecError(f"{path}, arm {arm}: {error}") from None
                log = own / f"seed_{seed}.log"
                cells.append(Cell(len(cells), arm, seed, file, place, log, settings))
    return Ablation(path, spec, tuple(cells), _evaluation(path, spec, cells[0].settings))


def _evaluation(path: Path, spec: Spec, settings: Settings) -> str:
    names = names_of(settings.evaluate.sets)
    if not names:
        raise SpecError(f"{path}: evaluate.sets is empty, so that nothing can be compared; set settings.evaluate.sets")
    if spec.evaluation not in (None, *names):
        raise SpecError(f"{path}: evaluation={shown(spec.evaluation)}: no set; choose from {', '.join(names)}")
    return spec.evaluation or names[0]


def _write(file: Path, extended: Path, values: dict[str, Any]) -> Path:
    """Write a settings file that extends another, unless it is there; return its path."""
    content = {EXTENDS: os.path.relpath(extended, file.parent)} | values
    text = yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    if not is_file(file) or file.read_text(encoding="utf-8", errors="replace") != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(file, text)
    return file
