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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from megatron_rlvr import atomic
from megatron_rlvr.config import Settings, SettingsError, names_of
from megatron_rlvr.config.layers import EXTENDS, read_layers
from megatron_rlvr.config.loading import merge, read_sections, read_yaml
from megatron_rlvr.config.section import FreeForm, PathText, Section
from megatron_rlvr.config.yaml_format import Dumper, shown
from megatron_rlvr.errors import InputError
from megatron_rlvr.input_files import is_file, same_place
from megatron_rlvr.write_errors import explained

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
# Set for each cell; `overwrite` and `resume` so that the same command resumes.
_OWN = ("dir", "seed", "overwrite", "resume")
_SETTINGS = "settings.yaml"
PAGE = "ablation.html"
RESULT_FILES = (PAGE, *(f"{table}.{kind}" for table in ("arms", "differences", "runs") for kind in ("json", "csv")))
"""Names of the results in the folder of the ablation."""
_TAKEN = re.compile("|".join([*map(re.escape, (_SETTINGS, *RESULT_FILES)), r"slurm_.*\.log", r".*\.incomplete"]))


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
        folders: dict[str, str] = {}
        for name, changes in self.arms.items():
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"arms.{shown(name)}: no name of an arm, which is that of a folder; use at most 64 letters, digits "
                    "and _ . + -"
                )
            if _TAKEN.fullmatch(name.lower()):
                raise ValueError(f"arms.{name}: rlvr ablate has a file of this name; choose another name")
            if (other := folders.setdefault(name.lower(), name)) != name:
                raise ValueError(
                    f"arms.{name}: differs from arms.{other} in upper and lower case only, which some file systems "
                    "take for the same folder; choose another name"
                )
            if not isinstance(changes, dict):
                raise ValueError(f"arms.{name}={shown(changes)}: not a mapping of sections; write {{}} for the base")
        if len(self.arms) < 2:
            raise ValueError(f"arms: {len(self.arms)} given, and one alone compares nothing; give two or more")
        if self.baseline not in self.arms:
            raise ValueError(f"baseline={shown(self.baseline)}: none of the arms; choose from {', '.join(self.arms)}")
        for name, values in {"settings": self.settings, **{f"arms.{n}": v for n, v in self.arms.items()}}.items():
            if EXTENDS in values:
                raise ValueError(f"{name}.{EXTENDS}: all arms extend the base; remove it, or set base")
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
        file: Settings file of the run, which `write_files` writes.
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
    """A specification whose settings are checked.

    Attributes:
        base: The settings file that all runs extend.
        evaluation: Problem set whose accuracy the conclusion is about.
    """

    path: Path
    spec: Spec
    base: Path
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
    """Read a specification, and make the settings of all cells; nothing is written.

    The settings of a cell are those of the base, under those of all arms, under those of its arm; so that an arm may
    switch off what the others have settings for, as in any settings file.

    Raises:
        SpecError: If the specification or the settings of an arm cannot be used.
    """
    spec = read_spec(path)
    folder = Path(spec.dir)
    base = path.parent / spec.base
    if not is_file(base):
        raise SpecError(f"{path}: base={spec.base} does not exist; correct the path, which starts at {path.parent}")
    files = [base]

    def read(file: Path) -> dict[str, Any]:
        files.append(file)
        return read_sections(file)

    try:
        layers = read_layers(base, read)
    except SettingsError as error:
        raise SpecError(f"{path}: base={spec.base}: {error}") from None
    cells: list[Cell] = []
    for seed in spec.seeds:
        for arm, changes in spec.arms.items():
            own = folder / arm
            place = own / f"seed_{seed}"
            try:
                settings = merge([*layers, spec.settings, changes, {"run": _run(place, seed)}])
            except SettingsError as error:
                raise SpecError(f"{path}, arm {arm}: {error}") from None
            cells.append(
                Cell(len(cells), arm, seed, own / f"seed_{seed}.yaml", place, own / f"seed_{seed}.log", settings)
            )
    _check_arms(path, cells[: len(spec.arms)])
    ablation = Ablation(path, spec, base, tuple(cells), _evaluation(path, spec, cells[0].settings))
    read_files = {same_place(file): file for file in (path, *files)}
    for file in (*(file for file, _, _ in _files(ablation)), *(folder / name for name in RESULT_FILES)):
        if same_place(file) in read_files:
            raise SpecError(
                f"{path}: dir={spec.dir}: {read_files[same_place(file)]} would be replaced, which is read; choose "
                "another dir"
            )
    return ablation


def write_files(ablation: Ablation) -> None:
    """Write the settings files of all cells: each extends that of its arm, that the common one, that the base.

    Raises: WriteError.
    """
    with explained("the settings files of the ablation", ablation.folder):
        for file, extended, values in _files(ablation):
            _write(file, extended, values)


def _files(ablation: Ablation) -> Iterable[tuple[Path, Path, dict[str, Any]]]:
    """(settings file, the one that it extends, its content) of all files of an ablation."""
    common = ablation.folder / _SETTINGS
    yield common, ablation.base, ablation.spec.settings
    for arm, changes in ablation.spec.arms.items():
        yield ablation.folder / arm / "arm.yaml", common, changes
    for cell in ablation.cells:
        yield cell.file, cell.file.parent / "arm.yaml", {"run": _run(cell.folder, cell.seed)}


def _run(folder: Path, seed: int) -> dict[str, Any]:
    return {"dir": str(folder), "seed": seed, "overwrite": False, "resume": "auto"}


def _check_arms(path: Path, cells: Sequence[Cell]) -> None:
    """Check that the arms differ, in what they may differ in; ``cells`` are those of one seed."""
    run, evaluate = ({**cells[0].settings.run.model_dump(), "dir": ""}, cells[0].settings.evaluate)
    different: list[tuple[str, dict[str, Any]]] = []
    for cell in cells:
        values = cell.settings.model_dump()
        values["run"]["dir"] = ""
        assert (values["run"], cell.settings.evaluate) == (run, evaluate), "all arms run and are evaluated alike"
        for other, theirs in different:
            if values == theirs:
                raise SpecError(f"{path}: arms.{cell.arm}: the same settings as arms.{other}; remove one")
        different.append((cell.arm, values))


def _evaluation(path: Path, spec: Spec, settings: Settings) -> str:
    names = names_of(settings.evaluate.sets)
    if not names:
        raise SpecError(f"{path}: evaluate.sets is empty, so that nothing can be compared; set settings.evaluate.sets")
    if spec.evaluation not in (None, *names):
        raise SpecError(f"{path}: evaluation={shown(spec.evaluation)}: no set; choose from {', '.join(names)}")
    return spec.evaluation or names[0]


def _write(file: Path, extended: Path, values: dict[str, Any]) -> None:
    """Write a settings file that extends another, unless it is there."""
    content = {EXTENDS: os.path.relpath(extended, file.parent)} | values
    text = yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    if not is_file(file) or file.read_text(encoding="utf-8", errors="replace") != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(file, text)
