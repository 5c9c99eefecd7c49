"""Loading a model folder into every kind of layout: the values, the bytes read in all, and failures while reading."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import Ranks
from policy_runs import DIMENSIONS, Layout, policy_of
from safetensors.torch import load_file, save_file

from megatron_rlvr.hf.families import ModelError, padded_vocab_size, rows_of, tensor_shapes, tied
from megatron_rlvr.hf.files import INDEX, SINGLE, read_config
from megatron_rlvr.hf.layout import Geometry, merge, shard

MODELS: dict[str, dict[str, Any]] = {
    "biases": {"model_type": "qwen2", "num_key_value_heads": 4},
    "tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    # 30 rows over 4 ranks are 7 or 8 each.
    "uneven": {"model_type": "qwen3", "hidden_size": 30, "num_key_value_heads": 4},
    "experts": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 20,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
}
CASES: list[tuple[str, Layout]] = [
    ("biases", Layout()),
    ("biases", Layout(tensor=4)),
    ("uneven", Layout(tensor=4)),
    ("biases", Layout(data=2)),
    ("biases", Layout(tensor=2, context=2)),
    ("tied", Layout(tensor=2, data=2)),
    ("tied", Layout(pipeline=2)),
    ("tied", Layout(pipeline=4)),
    ("tied", Layout(tensor=2, pipeline=2, virtual_pipeline=2)),
    ("experts", Layout(pipeline=2, virtual_pipeline=2)),
    ("experts", Layout(data=2, expert=2)),
    ("experts", Layout(tensor=2, sequence=True)),
    ("experts", Layout(tensor=2, sequence=True, expert=2)),
    ("experts", Layout(tensor=2, sequence=True, data=2, expert=2)),
]
GIVEN = {"float32": "float32", "bfloat16": "bfloat16", "rounded": "bfloat16"}
"""{folder: dtype of the model}; the third folder is of float32, in three files."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[tuple[str, str], Path]:
    made = {}
    for name, changes in MODELS.items():
        random = torch.Generator().manual_seed(len(name))
        config = DIMENSIONS | {"rms_norm_eps": 1e-6, "rope_theta": 500.0, "hidden_act": "silu"} | changes
        tensors = {
            tensor: torch.randn(shape, generator=random)
            for (row,) in rows_of(config)
            for tensor, shape in zip(row.hugging_face, tensor_shapes(row, config), strict=True)
        }
        place = tmp_path_factory.mktemp("models")
        for dtype in ("float32", "bfloat16"):
            folder = made[name, dtype] = place / dtype
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config))
            save_file({n: value.to(getattr(torch, dtype)) for n, value in tensors.items()}, folder / SINGLE)
        made[name, "rounded"] = in_three_files(place / "float32", place / "rounded")
    return made


def in_three_files(source: Path, target: Path) -> Path:
    """A copy of a folder, its tensors dealt to three files."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(SINGLE))
    tensors = load_file(source / SINGLE)
    files = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, target / file)
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return target


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def loaded(folder: str, dtype: str, layout: Layout) -> tuple[int, dict[str, Any], int]:
    """This tensor-parallel rank, its parameters, and the bytes that it has read."""
    from megatron_rlvr.policy.weights import global_parameters

    counts, read = [0], os.preadv

    def counting(*arguments: Any) -> int:
        counts[0] += (count := read(*arguments))
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", counting)
        with policy_of(folder, layout, None, dtype) as policy:
            parameters = {n: p.detach().clone() for n, p in global_parameters(policy.chunks).items()}
            return policy.ranks.tensor_rank, parameters, counts[0]


@pytest.mark.parametrize(("name", "layout"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_rank_holds_its_shard_and_the_folder_is_read_once(ranks: Ranks, folders, name: str, layout: Layout):
    for kind, dtype in GIVEN.items():
        folder = folders[name, kind]
        parts = ranks.run(loaded, layout.size, str(folder), dtype, layout)
        tensors, config = weights_of(folder), read_config(folder)
        rows = {row.megatron: row for (row,) in rows_of(config)}
        if tied(config):
            rows["output_layer.weight"] = rows["embedding.word_embeddings.weight"]
        geometry = Geometry.of(config, padded_vocab_size(config["vocab_size"], layout.tensor))
        held: set[str] = set()
        replicated: set[str] = set()
        for tensor_rank, parameters, _ in parts:
            for parameter, value in parameters.items():
                row = rows[parameter]
                whole = merge(row.layout, [tensors[each] for each in row.hugging_face], geometry)
                size = 1 if row.of_expert else layout.tensor
                expected = shard(row.layout, whole, tensor_rank % size, size).to(getattr(torch, dtype))
                assert value.dtype == expected.dtype
                assert torch.equal(value, expected), (parameter, folder.name)
                held.add(parameter)
                replicated |= set(row.hugging_face) if row.layout == "replicated" else set()
        assert held | {"output_layer.weight"} == rows.keys() | {"output_layer.weight"}
        stored = sum(tensor.nbytes for tensor in tensors.values())
        again = (layout.tensor - 1) * sum(tensors[each].nbytes for each in replicated)
        assert sum(count for *_, count in parts) == stored + again
        assert again <= stored / 10


def failing(folder: str, layout: Layout, rank: int, kind: str) -> str:
    """The error of a load in which all reads of one rank fail."""
    read = os.preadv

    def fails(*arguments: Any) -> int:
        if int(os.environ["RANK"]) != rank:
            return read(*arguments)
        if kind == "ends":
            return 0
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", fails)
        try:
            with policy_of(folder, layout):
                return ""
        except ModelError as error:
            return str(error)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("ends", "model.safetensors ends within model.embed_tokens.weight; download it again"),
        ("fails", "model.safetensors cannot be read (Input/output error); download it again"),
    ],
)
def test_a_read_that_fails_on_one_rank_is_the_error_of_all(ranks: Ranks, folders, kind: str, message: str):
    folder = folders["biases", "float32"]
    for rank, layout in ((0, Layout(tensor=2, data=2)), (1, Layout(tensor=2, pipeline=2))):
        assert ranks.run(failing, 4, str(folder), layout, rank, kind) == [f"{folder}/{message}"] * 4
    # Ranks of the second replica read nothing.
    assert ranks.run(failing, 4, str(folder), Layout(tensor=2, data=2), 3, kind) == [""] * 4


def test_ranks_without_a_share_of_the_vocabulary_hold_zeros(ranks: Ranks, folders):
    parts = ranks.run(loaded, 4, str(folders["biases", "float32"]), "float32", Layout(tensor=4))
    filled = [part["embedding.word_embeddings.weight"].any(dim=1).tolist() for _, part, _ in parts]
    assert filled == [[True] * 128, [True] * 22 + [False] * 106, [False] * 128, [False] * 128]
