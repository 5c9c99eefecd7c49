"""Checkpoints across layouts: any layout reads what the converter or another layout wrote, bit by bit."""

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from launcher import Ranks
from policy_runs import Layout, norms_built_into_linears, policy_of
from safetensors.torch import load_file, save_file

from megatron_rlvr.checkpoint.files import CheckpointReader
from megatron_rlvr.convert.conversion import to_hugging_face, to_megatron
from megatron_rlvr.convert.verification import verify
from megatron_rlvr.errors import InputError
from megatron_rlvr.hf.families import ModelError, rows_of, transformer_fields
from megatron_rlvr.hf.files import read_config

SHAPE: dict[str, Any] = {
    "vocab_size": 150,  # Megatron pads it to 256, 512 or 1024, by the number of tensor-parallel ranks
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
}
EXPERTS = {"moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1]}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TIED = {"tie_word_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", TIED),
    "llama": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama tied": ("Llama", {"rope_parameters": LLAMA3_ROPE, **TIED}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3 tied": ("Qwen3", {"head_dim": 12, **TIED}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 12, **EXPERTS}),
    "qwen3_moe tied": ("Qwen3Moe", {"head_dim": 12, "norm_topk_prob": True, **EXPERTS, **TIED}),
}
DENSE = (
    Layout(),
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2),
    Layout(tensor=4),
    Layout(pipeline=2, virtual_pipeline=2),
    Layout(tensor=2, sequence=True, pipeline=2),
    Layout(data=2),
)
MOE = (
    Layout(),
    Layout(data=2, expert=2),
    Layout(tensor=2, sequence=True, expert=2),
    Layout(pipeline=2, virtual_pipeline=2),
    Layout(tensor=4, sequence=True, expert=2),
    Layout(pipeline=2, data=2, expert=2),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Random models, biases and norms included, by name and dtype."""
    import transformers

    made = {}
    for name, (kind, changes) in MODELS.items():
        torch.manual_seed(len(name))
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SHAPE | changes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.5 * torch.randn_like(parameter))
        for dtype in ("float32", "bfloat16"):
            made[name, dtype] = tmp_path_factory.mktemp("models") / f"{name} {dtype}"
            model.to(getattr(torch, dtype)).save_pretrained(made[name, dtype])
    return made


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], where: object) -> None:
    assert found.keys() == wanted.keys(), where
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, (where, name)
        assert torch.equal(found[name], tensor), (where, name)


def passed_on(
    folder: Path, sources: Sequence[Path], target: Path, layout: Layout, dtype: str, built_in: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Load a policy from each source, save it as ``target``; return the weights that it had after each load."""
    from megatron_rlvr.checkpoint.megatron.sharded_state import load_weights

    # Files are written in child processes, which the ranks of tests, being daemons, may not start.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    layers = norms_built_into_linears() if built_in else contextlib.nullcontext()
    exported = []
    with layers, policy_of(str(folder), layout, dtype=dtype) as policy:
        for source in sources:
            for chunk in policy.chunks:
                for parameter in chunk.parameters():
                    parameter.data.zero_()
            load_weights(policy.chunks, source, policy.hf_config)
            exported.append({name: tensor.clone() for name, tensor in policy.export_weights()})
        save_weights(policy, target, folder)
    assert multiprocessing.active_children() == [], "a process would outlive a rank that is killed"
    return exported


def save_weights(policy: Any, target: Path, folder: Path, *, background: bool = False) -> None:
    from megatron_rlvr.checkpoint.megatron.pending import PendingCheckpoint
    from megatron_rlvr.checkpoint.megatron.sharded_state import ShardedWeights

    pending = PendingCheckpoint(target, folder)
    pending.prepare(ShardedWeights(policy.chunks).written(), {}, background=background)
    pending.wait()
    pending.publish()


def error_of_loading(folder: Path, checkpoint: Path, changes: dict[str, Any]) -> str:
    from megatron_rlvr.checkpoint.megatron.sharded_state import load_weights

    with policy_of(str(folder), Layout(data=2)) as policy:
        try:
            load_weights(policy.chunks, checkpoint, {**policy.hf_config, **changes})
        except InputError as error:
            return str(error)
        return "loaded"


def error_of_saving(
    folder: Path, target: Path, spoil: Callable[[Path], Any] = str, rank: int = 0, background: bool = False
) -> str:
    """Return this rank's error. ``spoil`` is called on one rank with the temporary folder, before Megatron's save."""
    from megatron_rlvr.distributed import megatron_versions

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    plan = megatron_versions.plan_files

    def spoiled(strategy: Any, sharded: Any, building: Path) -> Any:
        if os.environ["RANK"] == str(rank):
            spoil(building)
        return plan(strategy, sharded, building)

    patch = mock.patch.object(megatron_versions, "plan_files", spoiled)
    with policy_of(str(folder), Layout(tensor=2)) as policy, patch:
        try:
            save_weights(policy, target, folder, background=background)
        except OSError as error:
            return str(error)
        finally:
            mock.patch.stopall()
        return "saved"


def no_common(building: Path) -> None:
    (building / "common.pt").mkdir()


def no_metadata(building: Path) -> None:
    (building / ".metadata.tmp").mkdir()


def no_name_of_the_format(building: Path) -> None:
    (building / "metadata.json").mkdir()


def no_weights(building: Path) -> None:
    (building / "__1_1.distcp").mkdir()


def no_processes(building: Path) -> None:
    multiprocessing.current_process()._config["daemon"] = True  # type: ignore[attr-defined]


def killed_writers(building: Path) -> None:
    """Kill writers: they are forked, so a function patched here is patched in them."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def killed(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    mock.patch.object(FileSystemWriterAsync, "write_preloaded_data", killed).start()


def flushed_by_a_save(folder: Path, target: Path) -> list[str]:
    """Return the paths that a save flushes to the disk, in order, and "named" for the rename of a folder."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    synced: list[str] = []
    sync, rename = os.fsync, Path.rename

    def noting(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def named(path: Path, name: Path) -> Path:
        synced.append("named" if path.is_dir() else "Megatron renames a file")
        return rename(path, name)

    with (
        policy_of(str(folder), Layout()) as policy,
        mock.patch.object(os, "fsync", noting),
        mock.patch.object(Path, "rename", named),
    ):
        save_weights(policy, target, folder)
    return synced


def names_by_megatron(folder: Path) -> list[str]:
    """Return the names that Megatron's own layers without Transformer Engine write for such a model."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_rlvr.checkpoint.files import CONTENT_METADATA
    from megatron_rlvr.config import ParallelSettings
    from megatron_rlvr.distributed import process_group
    from megatron_rlvr.distributed.ranks import initialize_ranks

    initialize_ranks(ParallelSettings(), timeout_minutes=4)
    config, common = read_config(folder), {"normalization": "RMSNorm", "gated_linear_unit": True}
    model = GPTModel(
        TransformerConfig(**transformer_fields(config), **common, add_bias_linear=False, use_cpu_initialization=True),
        get_gpt_layer_local_spec(qk_layernorm=transformer_fields(config)["qk_layernorm"], normalization="RMSNorm"),
        vocab_size=config["vocab_size"],
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=config["tie_word_embeddings"],
    )
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    found = [part.key for part in model.sharded_state_dict(metadata=CONTENT_METADATA | {"dp_cp_group": group}).values()]
    parallel_state.destroy_model_parallel()
    process_group.shut_down()
    return sorted(name for name in found if "_extra_state" not in name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_through_the_converter_is_exact(folders, name, dtype, tmp_path):
    folder = folders[name, dtype]
    to_megatron(folder, tmp_path / "checkpoint")
    to_hugging_face(tmp_path / "checkpoint", tmp_path / "back")
    assert_same_bits(weights_of(tmp_path / "back"), weights_of(folder), name)
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("qwen3 tied", "float32"),
        ("qwen3_moe", "bfloat16"),
        pytest.param("qwen3 tied", "bfloat16", marks=pytest.mark.soak),
        pytest.param("qwen3_moe", "float32", marks=pytest.mark.soak),
        pytest.param("qwen2", "float32", marks=pytest.mark.soak),
        pytest.param("qwen2", "bfloat16", marks=pytest.mark.soak),
        pytest.param("llama tied", "float32", marks=pytest.mark.soak),
        pytest.param("llama tied", "bfloat16", marks=pytest.mark.soak),
    ],
)
def test_every_layout_reads_what_the_converter_and_another_layout_wrote(ranks: Ranks, folders, name, dtype, tmp_path):
    folder = folders[name, dtype]
    wanted = weights_of(folder)
    to_megatron(folder, tmp_path / "converted")
    sources = [tmp_path / "converted"]
    for number, layout in enumerate(MOE if name == "qwen3_moe" else DENSE):
        written, back = tmp_path / f"{number}", tmp_path / f"{number} back"
        for exported in ranks.run(passed_on, layout.size, folder, sources, written, layout, dtype):
            for source, weights in zip(sources, exported, strict=True):
                assert_same_bits(weights, wanted, (layout, source))
        to_hugging_face(written, back)
        assert_same_bits(weights_of(back), wanted, layout)
        sources = [tmp_path / "converted", written]


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_converted_model_are_those_of_transformers_and_of_a_changed_one_are_not(folders, name, tmp_path):
    folder = folders[name, "float32"]
    to_megatron(folder, tmp_path / "checkpoint")
    message = verify(folder, tmp_path / "checkpoint")
    assert float(message.split("differ by ")[1].split()[0]) < 1e-4
    weights, up = weights_of(folder), "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {up: weights[up].roll(1, 0)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="they are not the same model"):
        verify(folder, tmp_path / "checkpoint")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_layers_with_norms_inside_their_linear_layers_write_the_same_checkpoint(ranks: Ranks, folders, name, tmp_path):
    folder, config = folders[name, "float32"], read_config(folders[name, "float32"])
    to_megatron(folder, tmp_path / "0")
    ((exported,),) = ranks.run(passed_on, 1, folder, [tmp_path / "0"], tmp_path / "1", Layout(), "float32", True)
    assert_same_bits(exported, weights_of(folder), name)
    plain, other = CheckpointReader(tmp_path / "0"), CheckpointReader(tmp_path / "1")
    other.check(config)
    assert all(torch.equal(plain.read(row), other.read(row)[: len(plain.read(row))]) for (row,) in rows_of(config))


@pytest.mark.parametrize("name", ["qwen2", "llama tied", "qwen3"])
def test_names_in_a_checkpoint_are_those_of_megatron(ranks: Ranks, folders, name):
    (names,) = ranks.run(names_by_megatron, 1, folders[name, "float32"])
    assert sorted(row.key for (row,) in rows_of(read_config(folders[name, "float32"]))) == names


def test_a_checkpoint_of_another_model_is_refused_on_every_rank(ranks: Ranks, folders, tmp_path):
    folder = folders["qwen2", "float32"]
    to_megatron(folder, tmp_path / "checkpoint")
    for error in ranks.run(error_of_loading, 2, folder, tmp_path / "checkpoint", {"num_hidden_layers": 3}):
        assert "holds decoder.layers.3." in error
    for error in ranks.run(error_of_loading, 2, folder, tmp_path / "checkpoint", {"intermediate_size": 64}):
        assert "decoder.layers.0-3.mlp.linear_fc1.weight [112, 48] does not fit [128, 48]" in error


def test_a_folder_that_cannot_be_created_is_an_error_on_every_rank(ranks: Ranks, folders, tmp_path):
    (tmp_path / "file").write_text("mine")
    for error in ranks.run(error_of_saving, 2, folders["qwen2", "float32"], tmp_path / "file" / "checkpoint"):
        assert "Not a directory" in error


@pytest.mark.parametrize(
    ("spoil", "rank", "background", "message"),
    [
        (no_common, 0, True, "Is a directory"),
        (no_metadata, 0, False, "Is a directory"),
        (no_name_of_the_format, 0, True, "Is a directory"),
        (no_weights, 1, True, "Is a directory"),
        (no_processes, 1, False, "daemonic processes are not allowed to have children"),
        (no_processes, 0, True, "daemonic processes are not allowed to have children"),
        (killed_writers, 1, True, "a process that wrote ended with status -9"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_an_error_on_every_rank_and_leaves_nothing(
    ranks: Ranks, folders, spoil, rank, background, message, tmp_path
):
    folder = folders["qwen2", "float32"]
    for error in ranks.run(error_of_saving, 2, folder, tmp_path / "checkpoint", spoil, rank, background):
        assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_flushed_to_the_disk_before_it_is_renamed(ranks: Ranks, folders, tmp_path):
    folder, target = folders["qwen2", "float32"], tmp_path / "checkpoint"
    (synced,) = ranks.run(flushed_by_a_save, 1, folder, target)
    naming = synced.index("named")
    building = tmp_path / "checkpoint.incomplete"
    assert {str(building / path.relative_to(target)) for path in target.rglob("*")} < set(synced[:naming])
    assert str(building) in synced[:naming]
    assert synced[naming + 1 :] == [str(tmp_path)]


class Attack:
    """Object whose pickle creates a file when it is loaded without restriction."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def error_of_megatron(folder: Path, checkpoint: Path) -> str:
    """Load weights as `load_weights` does after its own checks."""
    from megatron_rlvr.checkpoint.megatron.loading import load_sharded
    from megatron_rlvr.checkpoint.megatron.sharded_state import ShardedWeights

    with policy_of(str(folder), Layout(data=2)) as policy:
        try:
            load_sharded(list(ShardedWeights(policy.chunks).written()), checkpoint)
        except InputError as error:
            return str(error)
        return "loaded"


def test_megatron_runs_no_code_of_a_checkpoint(ranks: Ranks, folders, tmp_path):
    folder, mark = folders["qwen2", "float32"], tmp_path / "mark"

    def spoil_metadata(checkpoint: Path) -> None:
        (checkpoint / ".metadata").write_bytes(pickle.dumps(Attack(mark)))

    def spoil_common(checkpoint: Path) -> None:
        torch.save({"content_metadata": Attack(mark)}, checkpoint / "common.pt")

    for number, spoil in enumerate((spoil_metadata, spoil_common)):
        checkpoint = tmp_path / str(number)
        to_megatron(folder, checkpoint)
        spoil(checkpoint)
        for error in ranks.run(error_of_megatron, 2, folder, checkpoint):
            assert error.startswith(f"{checkpoint}: cannot be loaded (")
            assert "\n" not in error
        assert not mark.exists(), spoil


def digests_of_a_save(folder: Path, target: Path, background: bool) -> dict[str, Any]:
    """Save a policy; return what the main rank was told of the files in the folder before it got its name."""
    from megatron_rlvr.checkpoint.megatron.pending import PendingCheckpoint
    from megatron_rlvr.checkpoint.megatron.sharded_state import ShardedWeights

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    known: dict[str, Any] = {}
    with policy_of(str(folder), Layout(tensor=2)) as policy:
        pending = PendingCheckpoint(target, folder, lambda building, digests: known.update(digests))
        pending.prepare(ShardedWeights(policy.chunks).written(), {}, background=background)
        pending.wait()
        pending.publish()
    return known


def test_each_rank_digests_the_files_that_it_has_written(ranks: Ranks, folders, tmp_path):
    for background in (False, True):
        target = tmp_path / str(background)
        main, other = ranks.run(digests_of_a_save, 2, folders["qwen2", "float32"], target, background)
        assert other == {}
        assert main == {
            path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in target.glob("*.distcp")
        }
        assert len(main) == 4


def test_only_torchs_adam_gets_a_step_count_per_parameter():
    """Fused optimizers count per parameter group, and Transformer Engine's reject a count of a single parameter."""
    from megatron_rlvr.checkpoint.megatron.sharded_state import set_common_state

    def loaded_state(optimizer: Any) -> dict[str, Any]:
        loaded: dict[str, Any] = {"optimizer": {"state": {}}}
        set_common_state(mock.Mock(spec=["optimizer", "load_state_dict"], optimizer=optimizer), loaded)
        return loaded["optimizer"]["state"]

    assert loaded_state(mock.Mock(state={})) == {}
    assert loaded_state(torch.optim.Adam([torch.zeros(1)])) == {"common_step": 0}
