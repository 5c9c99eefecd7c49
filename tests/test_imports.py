"""Imports point one way: the table on docs/architecture.md is the rule, checked on the syntax trees.

Imports inside functions count as well; those that only a type checker sees are marked with ``*`` in the table.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import megatron_rlvr

PACKAGE = Path(megatron_rlvr.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"

ONLY_IN: dict[str, set[str]] = {
    # library: rooms and modules that may import it
    "megatron": {"policy", "checkpoint", "convert", "distributed", "rehearsal"},
    "aiohttp": {"engines.sglang"},
    "torch.distributed": {
        *("algo", "batching", "distributed", "policy", "checkpoint", "learner", "evaluation"),
        *("rollout", "recording", "engines.sglang", "startup", "preflight", "rehearsal", "launch"),
    },
}

# They answer a mistake in a second: importing them, and all that they import, does not import torch.
WITHOUT_TORCH = {
    *(
        "types",
        "errors",
        "protocols",
        "atomic",
        "child_process",
        "process_table",
        "process_guard",
        "config",
        "metrics",
        "progress",
        "signals",
        "train",
    ),
    *("data", "reward", "hf.families", "hf.files", "checkpoint.store", "planner"),
    *("startup.resolve", "startup.describe", "startup.run_folder", "startup.lease", "preflight.command"),
    "rehearsal.command",
    *("recording.files", "analysis.report", "analysis.report_command", "ablation"),
    *("startup.evaluation", "evaluation.records", "evaluation.folder", "evaluation.compare", "evaluation.command.main"),
}
HEAVY = {"torch", "transformers", "megatron", "safetensors"}

DEVICE_WORDS = re.compile(r"cuda|nccl|gloo", re.IGNORECASE)
# Names of Megatron and torch for things that work on any device, and keys of a table by device type.
DEVICE_NAMES = {"model_parallel_cuda_manual_seed", "use_gloo_process_groups"}
# The last two set CUDA_VISIBLE_DEVICES of other processes.
NAMES_DEVICES = {
    "distributed",
    "algo.tile_shape",
    "planner.memory",
    "rehearsal",
    "convert.command",
    "engines.sglang.launcher.command",
}

MOST_LINES = 450
NAMES_FOR_EVERYTHING = {"utils", "util", "helpers", "common", "misc", "tools", "lib"}


@dataclass(frozen=True)
class Import:
    """One imported module; of this package without its name, such as ``policy.weights``."""

    name: str
    internal: bool
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
            internal = name.split(".")[0] == "megatron_rlvr"
            line = getattr(child, "lineno", 0)
            yield Import(_module(name) if internal else name, internal, line, for_types, at_once)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports(ast.Module(child.body, []), True, at_once)
            yield from _imports(ast.Module(child.orelse, []), for_types, at_once)
        else:
            in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, for_types, at_once and not in_function)


def _module(name: str) -> str:
    """``megatron_rlvr.policy.weights.WeightMap`` is in the module ``policy.weights``."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in modules():
        parts.pop()
    return ".".join(parts)


# The table ----------------------------------------------------------------------------------------------------------


def table_in(page: str) -> dict[str, set[str]]:
    """{room: rooms that it may import}, from the page's block of lines ``room <- room, room*``."""
    block = re.search(r"^```\n((?:[\w.]+ +<-.*\n(?: .*\n)*)+)```$", page, flags=re.MULTILINE)
    assert block, "the table of imports is not on the page"
    lines = [line.split("<-") for line in re.sub(r"\n +", " ", block[1]).splitlines()]
    table = {room.strip(): set(re.findall(r"[\w.]+\*?", allowed)) for room, allowed in lines}
    assert len(table) == len(lines), "a room has two lines"
    return table


@cache
def table() -> Mapping[str, set[str]]:
    return table_in(PAGE.read_text(encoding="utf-8"))


def room_of(module: str, rooms: Iterable[str]) -> str | None:
    """The longest entry of the table that is the module or contains it."""
    return max((room for room in rooms if within(module, {room})), key=len, default=None)


def within(module: str, rooms: Iterable[str]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def room_imports() -> dict[str, dict[str, str]]:
    """{room: {room that it imports, with ``*`` if only for types: an example}}."""
    found: dict[str, dict[str, str]] = {room: {} for room in table()}
    for module in modules():
        room = room_of(module, table())
        for each in imports_of(module):
            other = room_of(each.name, table())
            if room and each.internal and other and other != room:
                found[room].setdefault(other + "*" * each.for_types, f"{module}, line {each.line}: {each.name}")
    return {
        r: {o: e for o, e in others.items() if o.removesuffix("*") not in others or o[-1] != "*"}
        for r, others in found.items()
    }


def circles(edges: Mapping[str, Iterable[str]]) -> set[str]:
    """Nodes that are on a circle, or between two circles."""
    left = {node: set(targets) for node, targets in edges.items()}
    for direction in (left, None):
        edges_now = direction or {n: {m for m, targets in left.items() if n in targets} for n in left}
        while free := [node for node in left if not edges_now[node] & left.keys()]:
            for node in free:
                del left[node]
    return set(left)


def test_every_module_is_in_a_room_of_the_table():
    outside = [name for name in modules() if room_of(name, table()) is None]
    assert [name for name in outside if name and modules()[name][1].body] == [], "only empty packages are in no room"
    assert [room for room in table() if not any(within(name, {room}) for name in modules())] == []


def test_rooms_import_what_the_table_says_and_use_all_of_it():
    found = room_imports()
    extra = {
        f"{room} <- {other} ({where})"
        for room in found
        for other, where in found[room].items()
        if other not in table()[room]
    }
    unused = {f"{room} <- {other}" for room, allowed in table().items() for other in allowed - found[room].keys()}
    assert extra == set(), "not in the table"
    assert unused == set(), "nothing uses this permission"


def test_the_table_is_in_order():
    """Each room imports only rooms above its own line, so there is no circle."""
    seen: set[str] = set()
    for room, allowed in table().items():
        above = {other for other in allowed if other.removesuffix("*") in seen or other[-1] == "*"}
        assert allowed - above == set(), f"{room} imports rooms below its line"
        seen.add(room)


def test_no_files_import_each_other_in_a_circle():
    edges = {m: {e.name for e in imports_of(m) if e.internal and e.name != m} for m in modules()}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}) == {"b", "c"}
    assert circles(edges) == set()


# Libraries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_are_imported_in_their_rooms_only(library):
    users = {
        module: found.line
        for module in modules()
        for found in imports_of(module)
        if not found.internal and within(found.name, {library})
    }
    assert {f"{m}, line {line}" for m, line in users.items() if not within(m, ONLY_IN[library])} == set()
    unused = {room for room in ONLY_IN[library] if not any(within(module, {room}) for module in users)}
    assert unused == set(), "nothing uses this permission"


def test_modules_that_answer_a_mistake_do_not_import_torch():
    starts = [module for module in modules() if within(module, WITHOUT_TORCH)]
    assert len(starts) > len(WITHOUT_TORCH)
    wrong = []
    for start in starts:
        seen, to_do = {start}, [start]
        while to_do:
            module = to_do.pop()
            for found in imports_of(module):
                if not found.at_once or found.for_types:
                    continue
                if not found.internal:
                    if found.name.split(".")[0] in HEAVY:
                        wrong.append(f"{start} through {module}, line {found.line}: {found.name}")
                    continue
                parts = found.name.split(".")
                for name in (".".join(parts[: n + 1]) for n in range(len(parts))):  # packages run first
                    if name not in seen:
                        seen.add(name)
                        to_do.append(name)
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
            if isinstance(word, str) and DEVICE_WORDS.search(word) and word not in DEVICE_NAMES:
                yield getattr(node, "lineno", 0), word


def test_only_the_room_of_devices_names_cuda_nccl_or_gloo():
    found = {module: sorted(set(device_words(tree))) for module, (_, tree) in modules().items()}
    assert {module: words for module, words in found.items() if words and not within(module, NAMES_DEVICES)} == {}
    assert [room for room in NAMES_DEVICES if not any(found[m] for m in found if within(m, {room}))] == []


def test_no_file_is_too_long_and_none_is_a_place_for_everything():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, (path, _) in modules().items()}
    assert {module: length for module, length in lengths.items() if length > MOST_LINES} == {}
    assert [module for module in modules() if NAMES_FOR_EVERYTHING & set(module.split("."))] == []


def test_no_test_imports_another():
    tests = Path(__file__).parent
    found = [
        (str(path.relative_to(tests)), name)
        for path in sorted(tests.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
        if name.split(".")[-1].startswith("test_")
    ]
    assert found == []
