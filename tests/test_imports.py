"""Imports point one way, and each outside thing has its rooms: the rules as tables, checked on the syntax trees.

Imports inside functions count as well; imports for a type checker alone have a table of their own.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import megatron_rlvr

PACKAGE = Path(megatron_rlvr.__file__).parent

EVERYTHING = {"*"}
MAY_IMPORT: dict[str, set[str]] = {
    # room: what of ours it may import, packages as a whole or single modules of them
    "types": set(),
    "config": set(),
    "signals": set(),
    "pulse": set(),
    "durable": set(),
    "checkpoints": {"config", "durable"},
    "platform": set(),
    "progress": set(),
    "protocols": {"types"},
    "algo": {"types", "config"},
    "data": {"types"},
    "reward": {"types", "protocols"},
    "hf": {"algo", "durable"},
    "batch": {"types", "algo"},
    "mini_batches": {"types", "algo", "batch"},
    "trimming": {"types", "algo", "batch"},
    "policy": {"config", "durable", "platform", "algo", "batch", "hf", "protocols"},
    "rollout": {"types", "config", "platform", "protocols", "data", "reward", "policy.ranks"},
    "sync": {
        *("types", "config", "platform", "protocols", "policy", "hf"),
        *("rollout.agreement", "rollout.server", "rollout.servers"),
    },
    "learner": {"config", "protocols", "algo", "batch", "mini_batches", "trimming", "policy"},
    "evaluate": {"types", "config", "rollout", "policy.ranks"},
    "metrics": {"types", "config"},
    "command_line": {"config"},
    "resolve": {"config", "data", "hf", "checkpoints"},
    "planning": {"config", "hf", "resolve"},
    "trainer": {
        *("types", "config", "platform", "protocols", "algo", "batch", "mini_batches", "policy", "rollout", "sync"),
        *("learner", "evaluate", "metrics", "progress", "checkpoints", "signals"),
    },
    "assembly": EVERYTHING,
    "train": EVERYTHING,
    "preflight": {
        *("types", "config", "platform", "algo", "batch", "checkpoints", "command_line", "hf", "policy", "resolve"),
        *("reward", "rollout", "signals", "assembly", "train"),
    },
}
MAY_IMPORT_FOR_TYPES: dict[str, set[str]] = {"protocols": {"algo"}}

ONLY_IN: dict[str, set[str]] = {
    # library: rooms that may import it
    "megatron": {"policy", "hf", "platform"},
    "aiohttp": {"rollout.server", "rollout.servers"},
    "torch.distributed": {
        "algo",
        "mini_batches",
        "learner",
        "policy",
        "platform",
        "pulse",
        "rollout",
        "evaluate",
        "sync",
        "train",
        "preflight",
    },
}

# These answer a user's mistake in a moment: importing them, and what they import, does not import torch.
WITHOUT_TORCH = (
    *("types", "config", "protocols", "command_line", "resolve", "metrics", "progress", "train"),
    *("checkpoints", "durable", "signals", "preflight.command"),
)
WITHOUT_TORCH_PACKAGES = ("data", "reward", "hf.families", "hf.files", "planning")
HEAVY = {"torch", "transformers", "megatron", "safetensors"}

DEVICE_WORDS = re.compile(r"cuda|nccl|gloo", re.IGNORECASE)
# Megatron's names for things that work on any device.
MEGATRON_NAMES = {"model_parallel_cuda_manual_seed", "get_data_parallel_group_gloo"}

MOST_LINES = 500
NAMES_FOR_EVERYTHING = {"utils", "util", "helpers", "common", "misc", "tools", "lib"}


@dataclass(frozen=True)
class Import:
    """One imported module; of ours without the package's name, such as ``policy.ranks``."""

    name: str
    ours: bool
    line: int
    for_types: bool
    at_once: bool  # when the module is imported, not when a function is called


@cache
def modules() -> dict[str, tuple[Path, ast.Module]]:
    """{module without the package's name: (file, syntax tree)}."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = (path, ast.parse(path.read_text(encoding="utf-8")))
    return found


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    return tuple(_imports(modules()[module][1], for_types=False, at_once=True))


def _imports(node: ast.AST, for_types: bool, at_once: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        names: list[str] = []
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import; write the whole name"
            names = [f"{child.module}.{alias.name}" for alias in child.names]
        elif isinstance(child, ast.Call) and ast.unparse(child.func) in ("importlib.import_module", "__import__"):
            names = [str(a.value) for a in child.args[:1] if isinstance(a, ast.Constant)]
        elif isinstance(child, ast.Attribute) and ast.unparse(child) == "torch.distributed":
            names = ["torch.distributed"]
        for name in names:
            ours = name.split(".")[0] == "megatron_rlvr"
            line = getattr(child, "lineno", 0)
            yield Import(_module(name) if ours else name, ours, line, for_types, at_once)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports(ast.Module(child.body, []), True, at_once)
            yield from _imports(ast.Module(child.orelse, []), for_types, at_once)
        else:
            in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, for_types, at_once and not in_function)


def _module(name: str) -> str:
    """``megatron_rlvr.distributed.ranks.Ranks`` is the module ``policy.ranks``."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in modules():
        parts.pop()
    return ".".join(parts)


def room_of(module: str) -> str:
    return module.split(".")[0]


def within(module: str, rooms: set[str]) -> bool:
    parts = module.split(".")
    return "*" in rooms or any(".".join(parts[: i + 1]) in rooms for i in range(len(parts)))


def test_every_module_has_a_room_in_the_table():
    assert {room_of(name) for name in modules()} - {""} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_of_ours_point_one_way(room):
    wrong = []
    for module in (name for name in modules() if room_of(name) == room):
        for found in imports_of(module):
            allowed = MAY_IMPORT[room] | {room} | (MAY_IMPORT_FOR_TYPES.get(room, set()) if found.for_types else set())
            if found.ours and not within(found.name, allowed):
                wrong.append(f"{module}, line {found.line}: {found.name}")
    assert wrong == []


def test_the_table_has_no_circles():
    """Beyond the room that wires everything together."""
    left = {room: {room_of(m) for m in allowed} for room, allowed in MAY_IMPORT.items() if allowed != EVERYTHING}
    while free := [room for room, needs in left.items() if not needs & left.keys()]:
        for room in free:
            del left[room]
    assert left == {}


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_are_imported_in_their_rooms_only(library):
    def uses(found: Import) -> bool:
        return not found.ours and (found.name + ".").startswith(library + ".")

    wrong = [
        f"{module}, line {found.line}"
        for module in modules()
        for found in imports_of(module)
        if uses(found) and not within(module, ONLY_IN[library])
    ]
    assert wrong == []
    assert any(uses(found) for module in modules() for found in imports_of(module)), "the rule is about something"


def test_what_answers_a_mistake_does_not_import_torch_first():
    starts = [m for m in modules() if m in WITHOUT_TORCH or within(m, set(WITHOUT_TORCH_PACKAGES))]
    assert len(starts) > len(WITHOUT_TORCH)
    wrong = []
    for start in starts:
        seen, to_do = {start}, [start]
        while to_do:
            module = to_do.pop()
            for found in imports_of(module):
                if not found.at_once or found.for_types:
                    continue
                if found.ours and found.name not in seen:
                    seen.add(found.name)
                    to_do.append(found.name)
                elif not found.ours and found.name.split(".")[0] in HEAVY:
                    wrong.append(f"{start} by way of {module}, line {found.line}: {found.name}")
    assert wrong == []


def device_words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, word) of identifiers and strings that name a device library; comments and docstrings do not count."""
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        words: list[object] = [
            getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname", "module")
        ]
        if isinstance(node, ast.Constant) and id(node) not in texts:
            words.append(node.value)
        for word in words:
            if isinstance(word, str) and DEVICE_WORDS.search(word) and word not in MEGATRON_NAMES:
                yield getattr(node, "lineno", 0), word


def test_only_the_platform_names_cuda_nccl_or_gloo():
    found = {module: sorted(set(device_words(tree))) for module, (_, tree) in modules().items()}
    assert found.pop("platform")
    assert {module: words for module, words in found.items() if words} == {}


def test_no_file_is_too_long_and_none_is_a_place_for_everything():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, (path, _) in modules().items()}
    assert {module: length for module, length in lengths.items() if length > MOST_LINES} == {}
    assert [module for module in modules() if NAMES_FOR_EVERYTHING & set(module.split("."))] == []
