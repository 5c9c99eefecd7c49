"""GGUF files as Hugging Face folders, compared with the folders that they were written from and with transformers."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

gguf = pytest.importorskip("gguf")

from megatron_rlvr.config.loading import validate  # noqa: E402
from megatron_rlvr.evaluation.command.target import find_target  # noqa: E402
from megatron_rlvr.hf.families import ModelError  # noqa: E402
from megatron_rlvr.hf.files import read_config, weight_files  # noqa: E402
from megatron_rlvr.hf.gguf import unpack, unpacked  # noqa: E402
from megatron_rlvr.startup.model_file import with_model_folder  # noqa: E402

CONTROL, NORMAL = 3, 1
TEXTS = [
    "Natalia sold 48/2 = 24 clips in May.\n\nIt's 1,234.50 dollars!",
    "na\u00efve caf\u00e9 \u2014 she's   fine!\tI'LL go\r\n  now",
    "<|start|>user\nWhat is 7 + 8 + 905?<|end|>\n",
    "\u00e9t\u00e9 \u4f60\u597d 3.14e-5",
]
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_moe": ("qwen3moe", {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}),
}


def write_model(folder: Path, family: str, **changes: Any) -> Path:
    """Write a random model of two layers, whose sizes are multiples of the 32 numbers of a block, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = family.split()[0]
    values = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    config = AutoConfig.for_model(kind, **{**values, **FAMILIES[family][1], **changes})
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder, chat_template=tiny.TEMPLATE)
    return folder


def write_gguf(path: Path, folder: Path, family: str, kind: str = "F32", pre: str = "smollm", **more: Any) -> Path:
    """Write a folder as a GGUF file as llama.cpp's converter does; matrices are quantised to ``kind``."""
    architecture, config = FAMILIES[family][0], read_config(folder)
    writer = gguf.GGUFWriter(path, architecture)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    numbers = {
        "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "context_length": config["max_position_embeddings"],
        "attention.head_count": heads,
        "attention.head_count_kv": groups,
        "rope.dimension_count": config.get("head_dim") or config["hidden_size"] // heads,
    }
    if config.get("head_dim"):
        numbers["attention.key_length"] = config["head_dim"]
    if architecture == "qwen3moe":
        numbers |= {
            "expert_count": config.get("num_experts", config.get("num_local_experts")),
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
        }
    for key, value in numbers.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32(f"{architecture}.rope.freq_base", 50000.0)
    for key, text in more.items():
        writer.add_string(key.replace("__", "."), text)

    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([CONTROL if token in tiny.SPECIAL_TOKENS else NORMAL for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tiny.TEMPLATE)

    experts: dict[str, list[np.ndarray]] = {}
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        values = tensor.numpy()
        if architecture == "llama" and "q_proj" in name:
            values = interleaved(values, heads)
        if architecture == "llama" and "k_proj" in name:
            values = interleaved(values, groups)
        if name in WHOLE:
            add(writer, WHOLE[name], values, kind)
            continue
        _, _, layer, rest = name.split(".", 3)
        if ".experts." in name:
            part = rest.split(".")[3].removesuffix("_proj")
            experts.setdefault(f"blk.{layer}.ffn_{part}_exps.weight", []).append(values)
            continue
        stem, _, ending = rest.rpartition(".")
        add(writer, f"blk.{layer}.{NAMES[stem]}.{ending}", values, kind)
    for name, parts in experts.items():
        add(writer, name, np.stack(parts), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return [heads x D, H] with the rows of each rotary pair, i and i + D / 2, next to each other."""
    size = len(rows) // heads
    order = [h * size + pair + half * (size // 2) for h in range(heads) for pair in range(size // 2) for half in (0, 1)]
    return np.ascontiguousarray(rows[order])


def add(writer: Any, name: str, values: np.ndarray, kind: str) -> None:
    if values.ndim == 1 or kind == "F32":
        writer.add_tensor(name, values)
        return
    if kind == "F16":
        writer.add_tensor(name, values.astype(np.float16))
        return
    block = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(values, block), raw_dtype=block)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def read_by_transformers(path: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file as transformers reads them, for a model of the ``config.json`` in ``folder``."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    read: dict[str, torch.Tensor] = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    return read


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_folder_written_as_gguf_and_unpacked_is_the_same_model(family: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", family)
    unpack(write_gguf(tmp_path / "model.gguf", source, family), tmp_path / "target")
    before, after = tensors(source), tensors(tmp_path / "target")
    if family == "llama tied":
        before.pop("lm_head.weight", None)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    from transformers import AutoConfig

    wanted, found = (AutoConfig.from_pretrained(folder).to_dict() for folder in (source, tmp_path / "target"))
    not_compared = {"bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "transformers_version"}
    not_compared |= {"head_dim", "_name_or_path", "max_window_layers", "sliding_window", "norm_topk_prob"}
    assert {k: v for k, v in found.items() if k not in not_compared} == {
        k: v for k, v in wanted.items() if k not in not_compared
    }


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16", "BF16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tensors_are_those_of_the_reader_of_transformers_bit_for_bit(family: str, kind: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", family)
    write_gguf(tmp_path / "model.gguf", source, family, kind)
    unpack(tmp_path / "model.gguf", tmp_path / "target")
    wanted, found = read_by_transformers(tmp_path / "model.gguf", tmp_path / "target"), tensors(tmp_path / "target")
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), wanted[name]), name
    floats = {"F16": torch.float16, "BF16": torch.bfloat16}
    assert found["model.layers.0.mlp.up_proj.weight"].dtype == floats.get(kind, torch.float32)
    assert found["model.norm.weight"].dtype == torch.float32
    if kind == "Q4_1":  # it is a coarse one: the test would see weights that are not quantised
        assert not torch.equal(tensors(source)["lm_head.weight"], found["lm_head.weight"])


@pytest.mark.parametrize(("pre", "family"), [("smollm", "llama"), ("llama-bpe", "llama"), ("qwen2", "qwen2")])
def test_token_ids_are_those_of_the_reader_of_transformers(pre: str, family: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = write_model(tmp_path / "source", family)
    write_gguf(tmp_path / "model.gguf", source, family, pre=pre)
    unpack(tmp_path / "model.gguf", tmp_path / "target")
    ours = AutoTokenizer.from_pretrained(tmp_path / "target")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        if pre == "smollm":  # transformers does not know that its digits stand apart: numbers have merges here
            text = re.sub(r"[0-9]", "", text)
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids, clean_up_tokenization_spaces=False) == text
    if pre == "smollm":
        as_written = AutoTokenizer.from_pretrained(source)
        for tokenizer, apart in ((ours, True), (as_written, False)):  # which has merges of a space and a digit
            tokens = tokenizer.tokenize("has 12 more")
            assert ({"1", "2"} <= set(tokens)) == apart, tokens
    assert ours("a")["input_ids"][:-1] == ([1] if pre == "llama-bpe" else [])
    composed, decomposed = (ours(text, add_special_tokens=False)["input_ids"] for text in ("\u00e9", "e\u0301"))
    assert (composed == decomposed) == (pre == "qwen2")  # as the tokenizer.json of Qwen's models has it
    chat = ours.apply_chat_template([{"role": "user", "content": "2 + 2"}], add_generation_prompt=True, tokenize=False)
    assert chat == "<|start|>user\n2 + 2<|end|>\n<|start|>assistant\n"
    assert (ours.eos_token, ours.pad_token) == ("<|end|>", "<|pad|>")
    assert json.loads((tmp_path / "target" / "generation_config.json").read_text())["eos_token_id"] == [2]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a GGUF file of a small Llama."""
    place = tmp_path_factory.mktemp("gguf")
    return write_gguf(place / "model.gguf", write_model(place / "source", "llama"), "llama")


def test_a_file_is_unpacked_once_and_again_when_it_has_changed(file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(file, tmp_path / "model.Q4.gguf"))
    folder = unpacked(path)
    assert folder == tmp_path / "model.Q4"
    made = (folder / "config.json").stat().st_mtime_ns
    assert unpacked(path) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made
    os.utime(path, ns=(1, 1))
    assert unpacked(path) == folder
    assert (folder / "config.json").stat().st_mtime_ns > made
    (folder / "gguf.json").unlink()
    with pytest.raises(ModelError, match=r"model.Q4 exists and is not model.Q4.gguf unpacked; move one of the two"):
        unpacked(path)
    assert (folder / "config.json").exists()


def test_a_file_that_cannot_be_used_is_one_line(file: Path, tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(ModelError) as error:
            unpack(path, tmp_path / "target")
        assert not (tmp_path / "target").exists()
        assert "\n" not in str(error.value)
        return str(error.value)

    content = file.read_bytes()
    for size in (0, 3, 40, 2000, len(content) - 10_000):
        (tmp_path / "short.gguf").write_bytes(content[:size])
        assert "short.gguf cannot be read as a GGUF file" in refusal(tmp_path / "short.gguf")
    (tmp_path / "other.gguf").write_bytes(
        content.replace(b"\x14\x00\x00\x00\x00\x00\x00\x00general.architecture", b"x" * 28)
    )
    assert "other.gguf" in refusal(tmp_path / "other.gguf")
    source = file.parent / "source"
    stretched = write_gguf(tmp_path / "yarn.gguf", source, "llama", llama__rope__scaling__type="yarn")
    assert "rope scaling 'yarn' is not supported" in refusal(stretched)
    unknown = refusal(write_gguf(tmp_path / "pre.gguf", source, "llama", pre="tekken"))
    assert "a tokenizer 'gpt2' of 'tekken'; known is gpt2 of smollm, llama-bpe, qwen2" in unknown
    (tmp_path / "tokens.gguf").write_bytes(content.replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.marges", 1))
    assert "has a tokenizer that cannot be read (KeyError 'tokenizer.ggml.merges')" in refusal(tmp_path / "tokens.gguf")
    missing = tmp_path / "missing"
    shutil.copytree(source, missing)
    from safetensors.torch import save_file

    left = {name: tensor for name, tensor in tensors(source).items() if "layers.1.mlp.up" not in name}
    save_file(left, missing / "model.safetensors")
    assert "lacks model.layers.1.mlp.up_proj.weight" in refusal(write_gguf(tmp_path / "missing.gguf", missing, "llama"))
    extra = left | {name: tensor for name, tensor in tensors(source).items() if "layers.1.mlp.up" in name}
    save_file(extra | {"model.layers.1.self_attn.q_norm.weight": torch.ones(16)}, missing / "model.safetensors")
    assert "holds blk.1.attn_q_norm.weight, which llama models have no place for" in refusal(
        write_gguf(tmp_path / "extra.gguf", missing, "llama")
    )
    with pytest.raises(ModelError, match=r"none.gguf is not a file on this machine"):
        unpacked(tmp_path / "none.gguf")


def test_commands_take_the_file_as_a_model(file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(file, tmp_path / "model.gguf"))
    values = {"run": {"dir": "run", "steps": 1}, "model": {"path": str(path)}, "data": {"train": "a.jsonl"}}
    settings = validate(values)
    assert with_model_folder(settings).model.path == str(tmp_path / "model")
    assert with_model_folder(settings).run == settings.run
    assert find_target(path, None).folder == tmp_path / "model"
    assert with_model_folder(with_model_folder(settings)) == with_model_folder(settings)
    with pytest.raises(ModelError, match=r"holds no weights .* but model.gguf; give the path of that"):
        weight_files(tmp_path)
