"""Weight files against config.json: what is read is what transformers loads, and what does not fit is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from megatron_rlvr.hf.families import ModelError, rope_theta, transformer_fields
from megatron_rlvr.hf.files import INDEX, SINGLE, read_config
from megatron_rlvr.hf.headers import model_tensors
from megatron_rlvr.hf.weights import TensorReader

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True)


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def change(folder: Path, edit: Callable[[Tensors], Tensors], **config: Any) -> None:
    """Change the tensors of a folder, and entries of its config.json."""
    save_file(edit(load_file(folder / SINGLE)), folder / SINGLE, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def head_only(tensors: Tensors) -> Tensors:
    return {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}


def head_twice(tensors: Tensors) -> Tensors:
    return tensors | {HEAD: tensors[EMBEDDING].clone()}


def with_buffers(tensors: Tensors) -> Tensors:
    """Tensors that programs have saved beside weights, in the types that they had."""
    attention = "model.layers.{}.self_attn."
    buffers: Tensors = {}
    for layer in (0, 1):
        rope = attention.format(layer) + "rotary_emb."
        buffers |= {rope + "inv_freq": torch.ones(4), rope + "cos_cached": torch.ones(1, 1, 8, 4).half()}
        buffers[attention.format(layer) + "bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        buffers[attention.format(layer) + "masked_bias"] = torch.tensor(-1e4)
    buffers |= {"model.rotary_emb.inv_freq": torch.ones(4), "model.rotary_emb.original_inv_freq": torch.ones(4)}
    buffers |= {"model.position_ids": torch.arange(8)[None]}
    return tensors | buffers | {"mtp.layers.0.weight": torch.ones(3, 3)}


def mixed(tensors: Tensors) -> Tensors:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return {name: tensor.to(dtypes[i % 4]) for i, (name, tensor) in enumerate(tensors.items())}


@pytest.mark.parametrize("edit", [head_only, head_twice, with_buffers, mixed], ids=lambda edit: edit.__name__)
def test_the_tensors_that_are_read_are_those_that_transformers_loads(
    edit: Callable[[Tensors], Tensors], folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    change(folder, edit)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    reader = TensorReader(folder, read_config(folder))
    assert reader.names() | {HEAD} == set(loaded)
    for name in reader.names():
        assert torch.equal(reader.read(name).float(), loaded[name]), name


def test_skipped_tensors_are_named_and_others_are_not_skipped(folder: Path) -> None:
    before = set(load_file(folder / SINGLE))
    change(folder, with_buffers)
    skipped = set(model_tensors(folder, read_config(folder)).skipped)
    assert skipped == set(load_file(folder / SINGLE)) - before
    for name, shape in (("model.layers.0.self_attn.bias", 8), ("model.layers.0.self_attn.q_proj.inv_freq", 4)):

        def with_another(tensors: dict[str, Any], name: str = name, shape: int = shape) -> dict[str, Any]:
            return tensors | {name: torch.ones(shape)}

        change(folder, with_another)
        with pytest.raises(ModelError, match=r"which its config\.json has no place for"):
            model_tensors(folder, read_config(folder))


@pytest.mark.parametrize(
    ("message", "edit", "config"),
    [
        (f"{HEAD} is not {EMBEDDING}", lambda t: t | {HEAD: t[EMBEDDING] + 1}, {}),
        (f"{HEAD} is not {EMBEDDING}", lambda t: t | {HEAD: t[EMBEDDING].half()}, {}),
        (f"lacks {EMBEDDING};", lambda t: {n: v for n, v in t.items() if n != EMBEDDING}, {}),
        (f"lacks {EMBEDDING};", head_only, {"tie_word_embeddings": False}),
        (f"lacks {HEAD};", lambda t: t, {"tie_word_embeddings": False}),
        (f"{EMBEDDING} [330, 32] does not fit [320, 32]", lambda t: t | {EMBEDDING: torch.ones(330, 32)}, {}),
        ("holds model.layers.2.mlp.weight, which", lambda t: t | {"model.layers.2.mlp.weight": torch.ones(2)}, {}),
        (
            f"{NORM} is of type F8_E4M3; supported are F64, F32, F16, BF16: give a folder that is not quantised",
            lambda t: t | {NORM: t[NORM].to(torch.float8_e4m3fn), NORM + "_scale_inv": torch.ones(1)},
            {},
        ),
        ("holds model.layers.0-1.self_attn.q_proj.weight_scale, which",
         lambda t: t | {f"model.layers.{i}.self_attn.q_proj.weight_scale": torch.ones(1) for i in (0, 1)}, {}),
    ],
)  # fmt: skip
def test_weights_that_are_not_the_models_are_refused_by_name(
    message: str, edit: Callable[[Tensors], Tensors], config: dict[str, Any], folder: Path
) -> None:
    change(folder, edit, **config)
    with pytest.raises(ModelError, match=re.escape(message)) as raised:
        model_tensors(folder, read_config(folder))
    assert "\n" not in str(raised.value)


FIRST, SECOND = (f"model-{i:05d}-of-00002.safetensors" for i in (1, 2))


def split(folder: Path, **also_second: torch.Tensor) -> dict[str, str]:
    """Split the weights over two files; return their weight map."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    parts = {FIRST: names[:5], SECOND: names[5:]}
    for file, held in parts.items():
        more = also_second if file == SECOND else {}
        save_file({n: tensors[n] for n in held} | more, folder / file, metadata={"format": "pt"})
    (folder / SINGLE).unlink()
    return {name: file for file, held in parts.items() for name in held}


def test_an_index_names_files_and_the_headers_say_what_is_in_them(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    weight_map = split(folder)
    swapped = {name: SECOND if file == FIRST else FIRST for name, file in weight_map.items()} | {"gone": FIRST}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": swapped}))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    reader = TensorReader(folder, read_config(folder))
    assert all(torch.equal(reader.read(name), loaded[name]) for name in weight_map)


def test_two_sets_of_weights_in_one_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    whole = (folder / SINGLE).read_bytes()
    weight_map = split(folder, **{EMBEDDING: torch.ones(320, 32)})
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=f"holds {EMBEDDING} twice, in {FIRST} and {SECOND}; download it again"):
        model_tensors(folder, read_config(folder))
    (folder / SINGLE).write_bytes(whole)
    with pytest.raises(ModelError, match=f"holds {SINGLE} and {INDEX}, which names other files; remove one of the two"):
        model_tensors(folder, read_config(folder))
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: "../model.safetensors"}}))
    with pytest.raises(ModelError, match="which is not in its folder; download it again"):
        model_tensors(folder, read_config(folder))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin", "training_args.bin"], "but pytorch_model.bin, which is not read; load it with trans"),
        (["adapter_config.json", "adapter_model.safetensors"], "but an adapter; merge it into its base model"),
        ([FIRST], f"but {FIRST}; complete the download"),
        (["notes.txt"], rf"\({SINGLE} or {INDEX}\); give a folder with safetensors"),
    ],
)
def test_a_folder_with_weights_of_another_format_is_refused_with_the_way_out(
    files: list[str], message: str, folder: Path
) -> None:
    (folder / SINGLE).unlink()
    for name in files:
        (folder / name).write_bytes(b"")
    with pytest.raises(ModelError, match=message):
        model_tensors(folder, read_config(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights (fp8)"),
        ({"architectures": ["LlamaForCausalLM"]}, "architecture 'LlamaForCausalLM' is not supported; of model_type"),
        ({"architectures": "Qwen3ForCausalLM"}, "architecture 'Qwen3ForCausalLM' is not supported"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings of config.json is 'false'; set true or false"),
        ({"rope_scaling": ["linear"]}, "rope parameters ['linear'] are not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "one set for all layers"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn"}}, "differ; remove"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    ],
)
def test_a_config_that_cannot_be_expressed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        transformer_fields(tiny.model_config(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_theta": 1e4, "rope_scaling": {"rope_type": "default", "rope_theta": 1e6}},
    ],
)
def test_the_base_of_the_rotary_embedding_is_that_of_transformers(changes: dict[str, Any]) -> None:
    from transformers import Qwen3Config

    config = tiny.model_config(**changes)
    transformer_fields(config)
    parameters: Any = Qwen3Config(**json.loads(json.dumps(config))).rope_parameters
    assert rope_theta(config) == parameters["rope_theta"]
