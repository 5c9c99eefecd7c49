"""GGUF files, the format of llama.cpp, as Hugging Face folders: one file has configuration, weights and tokenizer.

    llama.cpp's metadata   -- `_config`     -->  config.json
    tensors, quantised     -- `_tensors`    -->  model.safetensors, one tensor in memory at a time
    tokenizer.ggml.*       -- `_tokenizer`  -->  tokenizer.json, with the chat template

A quantised tensor becomes the float32 numbers that its blocks stand for; floats keep their type. The package ``gguf``
reads the file, knows the formats of blocks, and translates names. Two things are not as in Hugging Face models: Llama's
rows of queries and keys are in another order (rotary pairs are neighbours), and the experts of a layer are one tensor.
"""

import fcntl
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from megatron_rlvr.atomic import write_text
from megatron_rlvr.hf.families import FAMILIES, ModelError, attention_sizes, rows_of, tensor_shapes, transformer_fields
from megatron_rlvr.hf.headers import check_tensors, list_names
from megatron_rlvr.input_files import is_file, read_json_object

if TYPE_CHECKING:
    from torch import Tensor

ENDING = ".gguf"
SOURCE = "gguf.json"
"""File of an unpacked folder that names the file which it was made of."""

_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_FLOATS = ("F32", "F16", "BF16")
_REMEDY = "give the model's own Hugging Face folder"

# How text is split before merges, by `tokenizer.ggml.pre` of byte-level BPE. None: digits apart, the rest as in GPT-2.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS: dict[str, str | None] = {
    "smollm": None,
    "llama-bpe": rf"{_LETTERS}|\p{{N}}{{1,3}}|{_OTHERS}",
    "qwen2": rf"{_LETTERS}|\p{{N}}|{_OTHERS}",
}
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens


def model_folder(path: str | Path) -> Path:
    """Return the folder of a model: the path itself, or of a GGUF file the folder that it is unpacked to."""
    path = Path(path)
    return unpacked(path) if path.suffix == ENDING else path


def unpacked(path: Path) -> Path:
    """Return the Hugging Face folder of a GGUF file: beside it, without its ending. It is made if it does not exist.

    Processes that ask for it at the same time make it once.

    Raises:
        ModelError: If the file cannot be read as a model of a supported family, the folder cannot be written, or it
            exists and was not made of this file.
    """
    target = path.with_suffix("")
    if not is_file(path):
        raise ModelError(f"{path} is not a file on this machine; give the path of a GGUF file or of a model's folder")
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            status = path.stat()
            source = {"file": path.name, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
            if target.exists():
                made_of = read_json_object(target / SOURCE, ModelError, "") if is_file(target / SOURCE) else None
                if made_of == source:
                    return target
                if made_of is None or made_of.get("file") != path.name:
                    raise ModelError(f"{target} exists and is not {path.name} unpacked; move one of the two elsewhere")
            unpack(path, target, source)
    except OSError as error:
        raise ModelError(
            f"{path} cannot be unpacked to {target} ({error.strerror or error}); run rlvr convert from-gguf {path} "
            "FOLDER and give that folder"
        ) from None
    return target


def unpack(path: Path, target: Path, source: Mapping[str, Any] | None = None) -> None:
    """Write the model of a GGUF file as a Hugging Face folder, replacing an existing one.

    Args:
        path: The file.
        target: Folder to write.
        source: Content of `SOURCE`; None for no such file.

    Raises:
        ModelError: If the file cannot be read as a model of a supported family; nothing is written.
        OSError: If writing fails; nothing is left at ``target``.
    """
    from megatron_rlvr.hf.weights import write_folder

    fields, tensors = _read(path)
    config = _config(path, fields, tensors)
    sources = _sources(path, config, tensors)
    with TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "generation_config.json").write_text(json.dumps(_stop_tokens(fields)) + "\n", encoding="utf-8")
        _tokenizer(path, fields, config).save_pretrained(folder)
        if source is not None:
            write_text(folder / SOURCE, json.dumps(source) + "\n")
        write_folder(target, folder, _tensors(config, tensors, sources))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata of a file, and {name: tensor}. Raises ModelError."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            f"{path}: the package gguf, which reads it, cannot be imported ({error}); pip install gguf"
        ) from None
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return fields, {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # of a damaged file: ValueError, IndexError, KeyError, OverflowError, ...
        raise ModelError(f"{path} cannot be read as a GGUF file ({str(error)[:120]}); download it again") from None


def _config(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json. Raises ModelError if the model is of no supported family."""
    kind = fields.get("general.architecture")
    if kind not in _MODEL_TYPES:
        raise ModelError(f"{path} holds a model of {kind!r:.60}; supported are {', '.join(_MODEL_TYPES)}: {_REMEDY}")

    def value(key: str, default: Any = None) -> Any:
        found = fields.get(f"{kind}.{key}", default)
        return _shortest(found) if isinstance(found, float) else found

    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{path} holds no token_embd.weight; {_REMEDY}")
    if value("rope.scaling.type", "none") != "none":
        raise ModelError(f"{path}: rope scaling {value('rope.scaling.type')!r:.60} is not supported; {_REMEDY}")
    heads, hidden = value("attention.head_count"), value("embedding_length")
    model_type = _MODEL_TYPES[kind]
    config = {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "vocab_size": int(embedding.shape[1]),
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("attention.key_length"),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    if FAMILIES[model_type].moe:  # llama.cpp normalizes the weights of the top k experts of this family
        config |= {
            "num_experts": value("expert_count"),
            "num_experts_per_tok": value("expert_used_count"),
            "moe_intermediate_size": value("expert_feed_forward_length"),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    try:
        transformer_fields(config)
        config["head_dim"] = attention_sizes(config)[2]
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    rotated = value("rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"]:
        raise ModelError(f"{path} rotates {rotated} of the {config['head_dim']} dimensions of a head; {_REMEDY}")
    return config


def _shortest(value: float) -> float:
    """Return the shortest decimal that is this float32: 1e-05 and not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _sources(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, tuple[str, int | None]]:
    """Return {Hugging Face tensor: (tensor of the file, index of the expert in it)}. Raises ModelError."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (kind,) = (name for name, model_type in _MODEL_TYPES.items() if model_type == config["model_type"])
    (architecture,) = (each for each, name in MODEL_ARCH_NAMES.items() if name == kind)
    translated = get_tensor_name_map(architecture, config["num_hidden_layers"])
    sources, found, expected = dict[str, tuple[str, int | None]](), {}, {}
    for (row,) in rows_of(config):
        for name, shape in zip(row.hugging_face, tensor_shapes(row, config), strict=True):
            expected[name] = shape
            expert = _EXPERT.search(name)
            own = translated.get_name(_EXPERT.sub(".experts.", name), try_suffixes=(".weight", ".bias"))
            if own is not None and own in tensors:
                sources[name] = own, int(expert[1]) if expert else None
                whole = tuple(int(size) for size in tensors[own].shape[::-1])
                found[name] = whole[1:] if expert and int(expert[1]) < whole[0] else whole
    check_tensors(found, expected, path)
    if others := tensors.keys() - {own for own, _ in sources.values()}:
        raise ModelError(f"{path} holds {list_names(others)}, which {kind} models have no place for; {_REMEDY}")
    return sources


def _tensors(
    config: Mapping[str, Any], tensors: Mapping[str, Any], sources: Mapping[str, tuple[str, int | None]]
) -> Iterator[tuple[str, "Tensor"]]:
    """Yield (Hugging Face name, tensor) of every weight."""
    import torch
    from gguf.quants import dequantize

    heads, groups, _ = attention_sizes(config)
    types = {"F16": torch.float16, "BF16": torch.bfloat16}
    for name, (own, expert) in sources.items():
        stored = tensors[own]
        shape = tuple(int(size) for size in stored.shape[::-1])
        data = stored.data if expert is None else stored.data[expert]
        try:
            values = torch.from_numpy(dequantize(data, stored.tensor_type).copy())
        except NotImplementedError:
            raise ModelError(
                f"{own} is quantised as {stored.tensor_type.name}, which the package gguf cannot decode; {_REMEDY}"
            ) from None
        values = values.reshape(shape if expert is None else shape[1:])
        if config["model_type"] == "llama" and ".self_attn.q_proj." in name:
            values = _in_halves(values, heads)
        if config["model_type"] == "llama" and ".self_attn.k_proj." in name:
            values = _in_halves(values, groups)
        yield name, values.to(types.get(stored.tensor_type.name, torch.float32))


def _in_halves(rows: "Tensor", heads: int) -> "Tensor":
    """Return the rows [heads x D, H] of a projection with the two rows of a rotary pair half a head apart."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _stop_tokens(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation_config.json: the tokens that begin and end a text, and the one that ends a turn."""
    names = ("eos_token_id", "eot_token_id")
    ends = {fields[key]: None for key in (f"tokenizer.ggml.{name}" for name in names) if key in fields}
    return {"bos_token_id": fields.get("tokenizer.ggml.bos_token_id"), "eos_token_id": list(ends)}


def _tokenizer(path: Path, fields: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """Return the tokenizer as transformers has it. Raises ModelError if it is none that is known."""
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in _SPLITS:
        known = ", ".join(_SPLITS)
        raise ModelError(f"{path} has a tokenizer {kind!r:.60} of {split!r:.60}; known is gpt2 of {known}: {_REMEDY}")
    try:
        return _byte_level_bpe(fields, split, config["max_position_embeddings"])
    except Exception as error:  # of a damaged file: KeyError, IndexError, ..., and tokenizers' own bare Exception
        reason = f"{type(error).__name__} {error}"[:120]
        raise ModelError(f"{path} has a tokenizer that cannot be read ({reason}); {_REMEDY}") from None


def _byte_level_bpe(fields: Mapping[str, Any], split: str, max_length: int) -> Any:
    """Return a tokenizer of byte-level BPE, given how it splits text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    whole = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == "llama-bpe"))
    pattern = _SPLITS[split]
    whole.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if pattern is None
        else [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if split == "qwen2":
        whole.normalizer = normalizers.NFC()
    whole.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    added = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    whole.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    whole.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    named = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    if fields.get("tokenizer.ggml.add_bos_token", split == "llama-bpe"):
        start = named["bos_token"]
        whole.post_processor = processors.TemplateProcessing(
            single=[start, "$A"], special_tokens=[(start, vocabulary[start])]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=whole,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        **named,
    )
    fast.chat_template = fields.get("tokenizer.chat_template")
    return fast
