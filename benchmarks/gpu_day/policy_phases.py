"""The phases of a step of a policy of random parameters, measured one after the other."""

import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gpu import percent, share_of_peak, start_of_peak, wait
from rows import Rows

from megatron_rlvr.algo.loss import policy_loss
from megatron_rlvr.algo.quantile import global_top_fraction_mask
from megatron_rlvr.batching.batch import MicroBatch, TrainingSequence
from megatron_rlvr.config import LossSettings, ModelSettings, OptimizerSettings, ParallelSettings
from megatron_rlvr.distributed import accelerator, process_group
from megatron_rlvr.distributed.megatron_on_cpu import import_megatron
from megatron_rlvr.distributed.ranks import initialize_ranks
from megatron_rlvr.hf.families import rows_of, tensor_shapes
from megatron_rlvr.planner.layouts import RESERVE
from megatron_rlvr.planner.memory import ROTARY_LENGTHS, Memory, MicroBatches, stage_memory
from megatron_rlvr.planner.options import TrainingOptions
from megatron_rlvr.planner.roofline import stage_flops
from megatron_rlvr.planner.shapes import ModelShape

COMMON = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}
MODELS = {
    "4B": COMMON | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "1.7B": COMMON
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
}
TINY = COMMON | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 256}
MEGATRON = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FRACTION = 0.2
MICRO_BATCHES = 2
GIB = 2**30


class RandomReader:
    """Reads random tensors of the model's shapes; a replacement for `hf.weights.TensorReader`."""

    def __init__(self, folder: str | Path, config: Mapping[str, Any]) -> None:
        self._shapes = {
            name: shape
            for (row,) in rows_of(config)
            for name, shape in zip(row.hugging_face, tensor_shapes(row, config), strict=True)
        }

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """Return ones for a norm, and otherwise normal numbers of standard deviation 0.02."""
        shape = self._shapes[name]
        shape = shape if rows is None else (len(rows), *shape[1:])
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=accelerator.device())
        return tensor.fill_(1.0) if len(shape) == 1 else tensor.normal_(std=0.02)


class Phases:
    """Measures phases and writes a row for each.

    Args:
        rows: Destination.
        device: cuda or cpu.

    Attributes:
        rows: Destination.
        peak: Most bytes allocated in the last phase; 0 on a CPU.
    """

    def __init__(self, rows: Rows, device: str) -> None:
        self.rows = rows
        self._device = device
        self.peak = 0

    @contextmanager
    def measured(self, name: str, operations: float = 0.0, beside: Callable[[], str] = lambda: "") -> Iterator[None]:
        """Measure a block; an error ends the program, after a row.

        Args:
            operations: Floating-point operations of the block by the planner; 0 if it counts none.
            beside: Returns what the planner says, afterwards.
        """
        start_of_peak(self._device)
        start = time.perf_counter()
        yield
        wait(self._device)
        seconds = time.perf_counter() - start
        share = share_of_peak(operations, seconds) if operations else None
        peak = reserved = None
        memory = ""
        if self._device == "cuda":
            peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            memory = f", {peak / GIB:.2f} GiB ({reserved / GIB:.2f} reserved)"
            self.peak = peak
        result = f"{seconds:.2f} s{percent(share)}{memory}"
        self.rows.add(name, result, beside(), seconds=seconds, share=share, peak=peak, reserved=reserved)


def run(rows: Rows, device: str, small: bool) -> None:
    """Take a policy through a step and write a row for each phase; an error is a row, too."""
    with rows.guarded("step"), tempfile.TemporaryDirectory() as folder:
        tokens, response = (96, 64) if small else (24_576, 20_480)
        name, config = ("tiny", TINY) if small else chosen_model(tokens)
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        problem = accelerator.transformer_engine_problem()
        layers = (
            f"this project's layers, without Transformer Engine ({problem})"
            if problem
            else "Transformer Engine's layers"
        )
        rows.add("model", f"{name}, {ModelShape.of(config).parameters / 1e9:.2f} billion parameters", note=layers)
        step(Phases(rows, device), config, folder, tokens, response)
    process_group.shut_down()


def chosen_model(tokens: int) -> tuple[str, dict[str, Any]]:
    """Return the name and the config.json of the largest model that fits."""
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    for name, config in MODELS.items():
        longest = MicroBatches(tokens, tokens, tokens, MICRO_BATCHES)
        if planned(config, longest).peak <= memory * (1 - RESERVE):
            return name, config
    return name, config


def planned(config: Mapping[str, Any], batches: MicroBatches) -> Memory:
    """Return the planner's memory of one rank."""
    options = training_options()
    return stage_memory(ModelShape.of(config), ParallelSettings(), 1, options, batches, 0)


def training_options() -> TrainingOptions:
    """Return the planner's options for this machine."""
    fused = {"gradient_accumulation_fusion": accelerator.has_fused_weight_gradients()}
    return TrainingOptions.of("bfloat16", MEGATRON | fused, accelerator.has_transformer_engine())


def step(phases: Phases, config: Mapping[str, Any], folder: str, tokens: int, response: int) -> None:
    """Take the policy through all phases."""
    import_megatron()
    from megatron_rlvr.policy import weights
    from megatron_rlvr.policy.policy import Policy

    weights.TensorReader = RandomReader  # type: ignore[assignment,misc]
    shape, options = ModelShape.of(config), training_options()
    with phases.measured("build"):
        parallel = ParallelSettings()
        policy = Policy(
            ModelSettings(path=folder, dtype="bfloat16"),
            parallel,
            initialize_ranks(parallel, timeout_minutes=5),
            optimizer=OptimizerSettings(),
            megatron=MEGATRON,
        )
    batch = micro_batch(policy, tokens, response, config["vocab_size"])
    batches, rows = [batch] * MICRO_BATCHES, len(batch.rows)
    squares = float(sum(length**2 for length in batch.lengths))
    layers = range(shape.layers)
    forward = stage_flops(shape, layers, len(batch.tokens), squares, options, backward=False)
    both = stage_flops(shape, layers, len(batch.tokens), squares, options, backward=True)

    with phases.measured("score", MICRO_BATCHES * (forward + shape.head_flops(rows))):
        scores = policy.score(batches)
    with phases.measured("select"):
        entropy = torch.cat(scores.entropy)
        token_ids = torch.arange(len(entropy), device=entropy.device)
        mask, info = global_top_fraction_mask(entropy, FRACTION, token_ids=token_ids)
    masks = list(mask.split(rows))
    selected = max(int(each.sum()) for each in masks)
    memory = planned(config, MicroBatches(len(batch.tokens), batch.max_length, selected, MICRO_BATCHES))
    peak = memory.peak - memory.rotary * (1 - 1 / ROTARY_LENGTHS)  # batches of one length

    def beside() -> str:
        difference = f" ({peak / phases.peak - 1:+.1%})" if phases.peak else ""
        return f"planner: {peak / GIB:.2f} GiB{difference}"

    loss = LossSettings()
    loss_function = partial(
        policy_loss,
        objective=loss.objective,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        dual_clip=loss.dual_clip,
    )
    inputs = scores.plain_inputs(batches)
    operations = MICRO_BATCHES * both + 4 * shape.head_flops(info.kept)
    for number in (1, 2):
        policy.start_step()
        with phases.measured(f"train {number}", operations, beside):
            metrics = policy.train_step(batches, masks, inputs, loss_function, len(entropy))
        if metrics["skipped"] or not math.isfinite(metrics["loss"]) or not metrics["grad_norm"] > 0:
            raise ValueError(f"the training step failed: {metrics}")
    with phases.measured("export"):
        exported = sum(tensor.numel() for _, tensor in policy.export_weights())
    if exported != shape.parameters:
        raise ValueError(f"{exported} parameters were exported of {shape.parameters}")
    if importlib.util.find_spec("transformers") is None:
        phases.rows.add("rollout", "left out: it needs transformers")
    else:
        rollout(phases, policy, folder, response)


def micro_batch(policy: Any, tokens: int, response: int, vocabulary: int) -> MicroBatch:
    """Pack random tokens: a sequence with a response of this length, and one that fills the micro-batch."""
    random = np.random.default_rng(0)
    longest = response + response // 10 - 1
    sequences = [
        TrainingSequence(
            number=number,
            prompt_ids=random.integers(vocabulary, size=length + 1 - answer).astype(np.int32),
            response_ids=random.integers(vocabulary, size=answer).astype(np.int32),
            rollout_logp=np.full(answer, -math.log(vocabulary), np.float32),
            advantage=1.0 - 2.0 * number,
            weight_versions=np.zeros(answer, np.int32),
        )
        for number, length in enumerate((longest, tokens - longest))
        for answer in (min(response, length),)
    ]
    return policy.packing(tokens).pack(sequences)


def rollout(phases: Phases, policy: Any, folder: str, response: int) -> None:
    """Copy the weights to the embedded engine and sample from it, with transformers' model of the same config.json."""
    from megatron_rlvr.engines.embedded.engine import EmbeddedEngine
    from megatron_rlvr.types import CompletionRequest, Prompt

    engine = EmbeddedEngine(
        folder, dtype=torch.bfloat16, device=accelerator.device(), stop_token_ids=[0], pad_token_id=0
    )
    with phases.measured("sync"):
        engine.update_weights(policy.export_weights(), version=1)
    prompt = Prompt("random", np.arange(1, 33, dtype=np.int32), "", "")
    requests = [CompletionRequest(prompt, index, seed=index) for index in range(16)]
    sampling = SimpleNamespace(temperature=1.0, top_p=1.0, max_response_tokens=min(128, response))
    with phases.measured("rollout"):
        completions = list(engine.generate(requests, sampling))
    if len(completions) != len(requests):
        raise ValueError(f"{len(completions)} of {len(requests)} completions")
