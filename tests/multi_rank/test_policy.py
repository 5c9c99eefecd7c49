"""The Megatron policy in every layout against transformers and plain autograd: scores, weights, training."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launcher import Ranks
from policy_runs import (
    GROUPS,
    SHAPE,
    Layout,
    Run,
    analysed,
    assert_same_training,
    entropies_by_analysis,
    gradients_by_analysis,
    kept_over,
    largest_tensors,
    likeliest,
    memory_of_a_weight_sync,
    refused,
    saved,
    scored_and_exported,
    trained,
)
from reference_training import Recipe, Trace, load, make_groups, token_scores, train
from safetensors.torch import load_file, save_file

ONE_RANK = Layout()
SEVERAL_MICRO_BATCHES = Layout(budget=90)
TENSOR = Layout(tensor=2, budget=200)
SEQUENCE = Layout(tensor=2, sequence=True, budget=150)
PIPELINE = Layout(pipeline=2, budget=90)
DATA = Layout(data=2, budget=90)
TENSOR_PIPELINE = Layout(tensor=2, pipeline=2, budget=150)
SEQUENCE_PIPELINE = Layout(tensor=2, sequence=True, pipeline=2, budget=200)
SEQUENCE_DATA = Layout(tensor=2, sequence=True, data=2, budget=150)
CONTEXT = Layout(context=2, budget=150)
VIRTUAL_PIPELINE = Layout(pipeline=2, virtual_pipeline=2, budget=90)
EVERY_LAYOUT = (
    ONE_RANK,
    SEVERAL_MICRO_BATCHES,
    TENSOR,
    SEQUENCE,
    PIPELINE,
    DATA,
    TENSOR_PIPELINE,
    SEQUENCE_PIPELINE,
    SEQUENCE_DATA,
    CONTEXT,
    Layout(tensor=2, sequence=True, context=2, budget=150),
    Layout(data=2, context=2, budget=150),
    Layout(pipeline=2, context=2, budget=150),
    VIRTUAL_PIPELINE,
    Layout(data=2, budget=90, megatron=(("use_distributed_optimizer", True),)),
    Layout(data=2, budget=90, megatron=(("use_distributed_optimizer", True), ("overlap_grad_reduce", True))),
    Layout(budget=90, megatron=(("recompute_granularity", "selective"),)),
    Layout(
        tensor=2,
        sequence=True,
        budget=150,
        megatron=(("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 1)),
    ),
)
# Layouts of `make test`: each dimension once, alone or with others; `make soak` has the rest.
SOME_LAYOUTS = (ONE_RANK, SEQUENCE_PIPELINE, SEQUENCE_DATA, CONTEXT, VIRTUAL_PIPELINE, EVERY_LAYOUT[15])
OTHER_LAYOUTS = tuple(layout for layout in EVERY_LAYOUT if layout not in SOME_LAYOUTS)
# Where the embedding is also the output layer, its gradient comes from both ends of the pipeline.
TIED_LAYOUTS = (ONE_RANK, SEQUENCE, PIPELINE, SEQUENCE_PIPELINE, VIRTUAL_PIPELINE)
IN_LAYOUTS = pytest.mark.parametrize(
    ("name", "layouts"),
    [
        pytest.param("untied", SOME_LAYOUTS, id="untied"),
        pytest.param("tied", (SEQUENCE_PIPELINE,), id="tied"),
        pytest.param("untied", OTHER_LAYOUTS, id="untied, all others", marks=pytest.mark.soak),
        pytest.param("tied", TIED_LAYOUTS, id="tied, all", marks=pytest.mark.soak),
    ],
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Random models, norms included, with tied and untied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    made = {}
    for name in ("untied", "tied"):
        torch.manual_seed(len(name))
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=name == "tied"))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        made[name] = str(tmp_path_factory.mktemp("models") / name)
        model.save_pretrained(made[name])
    return made


def on_disk(folder: str) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/model.safetensors")


@IN_LAYOUTS
def test_scores_are_those_of_transformers_and_the_export_is_the_input_bit_by_bit(ranks: Ranks, folders, name, layouts):
    temperature = 0.8
    sequences = [(prompt, response) for prompt, responses, _ in GROUPS for response in responses]
    with torch.no_grad():
        by_sequence = token_scores(load(folders[name]), sequences, temperature)
    expected = {(n << 20) + t: pair.tolist() for n, pairs in enumerate(by_sequence) for t, pair in enumerate(pairs)}
    weights = on_disk(folders[name])
    for layout in layouts:
        found = ranks.run(scored_and_exported, layout.size, folders[name], GROUPS, layout, temperature)
        scores = {token: pair for by_token, _ in found for token, pair in by_token.items()}
        assert scores.keys() == expected.keys()
        difference = torch.tensor([scores[t] for t in expected]) - torch.tensor(list(expected.values()))
        assert difference.abs().max() < 1e-4, layout
        if layout.data == 1:
            assert all(by_token == found[0][0] for by_token, _ in found), "ranks of a replica have the same bits"
        for _, exported in found:
            assert exported.keys() == weights.keys()
            for tensor_name, tensor in exported.items():
                assert torch.equal(tensor, weights[tensor_name]), (layout, tensor_name)


def test_the_likeliest_tokens_of_the_wanted_rows_are_those_of_transformers_on_every_rank(ranks: Ranks, folders):
    sequences = [(prompt, response) for prompt, responses, _ in GROUPS for response in responses]
    model = load(folders["untied"]).double()
    expected = {}
    for n, (prompt, response) in enumerate(sequences):
        with torch.no_grad():
            z = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        for t, top in enumerate(torch.log_softmax(z, dim=-1)):
            if ((n << 20) + t) % 3 == 0:
                expected[(n << 20) + t] = top.topk(5)
    for layout in (ONE_RANK, SEQUENCE_PIPELINE, VIRTUAL_PIPELINE, Layout(data=2, context=2, budget=150)):
        found = ranks.run(likeliest, layout.size, folders["untied"], GROUPS, layout)
        together = {token: top for by_token in found for token, top in by_token.items()}
        assert together.keys() == expected.keys()
        for token, (ids, logp) in together.items():
            assert ids == expected[token].indices.tolist(), (layout, token)
            torch.testing.assert_close(torch.tensor(logp).double(), expected[token].values, rtol=0, atol=1e-4)
        if layout.data == 1:
            assert all(by_token == found[0] for by_token in found), "ranks of a replica have the same bits"


def test_entropies_of_the_analyses_are_those_of_transformers_on_every_rank(ranks: Ranks, folders):
    sequences = [(prompt, response) for prompt, responses, _ in GROUPS for response in responses]
    with torch.no_grad():
        scores = token_scores(load(folders["untied"]).double(), sequences, 1.0)
    for layout in (SEVERAL_MICRO_BATCHES, SEQUENCE_PIPELINE, Layout(data=2, context=2, budget=150)):
        for found in ranks.run(entropies_by_analysis, layout.size, folders["untied"], GROUPS, layout):
            assert len(found) == len(scores)
            for entropy, expected in zip(found, scores, strict=True):
                torch.testing.assert_close(torch.tensor(entropy).double(), expected[:, 1], rtol=0, atol=1e-4)


def test_gradients_of_the_analyses_are_those_of_autograd_in_float64(ranks: Ranks, folders):
    bins = 3
    given = analysed(GROUPS)
    model = load(folders["tied"]).double()
    scores = token_scores(model, [(r.prompt_ids.tolist(), r.token_ids.tolist()) for r in given], 1.0)
    losses = torch.cat([-(r.advantage or 0.0) * pair[:, 0] for r, pair in zip(given, scores, strict=True)])
    bin_of = torch.arange(len(losses)) % bins
    parts = []
    for number in range(bins):
        grads = torch.autograd.grad(
            losses[bin_of == number].sum() / len(losses), list(model.parameters()), retain_graph=True
        )
        parts.append(torch.cat([grad.flatten() for grad in grads]))
    whole = torch.stack(parts).sum(0)
    for layout in (SEVERAL_MICRO_BATCHES, SEQUENCE_PIPELINE, Layout(data=2, context=2, budget=150)):
        for found in ranks.run(gradients_by_analysis, layout.size, folders["tied"], GROUPS, layout, bins):
            assert found.norm == pytest.approx(float(whole.norm()), rel=1e-4), layout
            assert found.norms.tolist() == pytest.approx([float(part.norm()) for part in parts], rel=1e-4)
            expected = [float(part @ whole / (whole @ whole)) for part in parts]
            assert found.shares.tolist() == pytest.approx(expected, abs=1e-4)
            assert found.shares.sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("layout", [ONE_RANK, SEQUENCE_PIPELINE])
def test_layers_with_norms_inside_their_linears_take_and_give_the_same_weights(ranks: Ranks, folders, layout):
    plain, built_in = (
        ranks.run(scored_and_exported, layout.size, folders["untied"], GROUPS, layout, 1.0, "float32", inside)
        for inside in (False, True)
    )
    for (scores, exported), (wanted_scores, wanted) in zip(built_in, plain, strict=True):
        assert scores == wanted_scores
        assert exported.keys() == wanted.keys()
        assert all(torch.equal(exported[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("layout", [ONE_RANK, SEQUENCE_PIPELINE])
def test_bfloat16_scores_are_near_those_of_fp32_and_the_export_is_the_input_rounded(ranks: Ranks, folders, layout):
    sequences = [(prompt, response) for prompt, responses, _ in GROUPS for response in responses]
    with torch.no_grad():
        expected = torch.cat(token_scores(load(folders["untied"]), sequences, 1.0))
    found = ranks.run(scored_and_exported, layout.size, folders["untied"], GROUPS, layout, 1.0, "bfloat16")
    difference = (torch.tensor([found[0][0][token] for token in sorted(found[0][0])]) - expected).abs()
    assert difference.mean() < 0.03
    assert difference.max() < 0.5
    for name, tensor in on_disk(folders["untied"]).items():
        assert torch.equal(found[0][1][name], tensor.bfloat16()), name


@pytest.mark.parametrize("layout", [TENSOR_PIPELINE, SEQUENCE_DATA])
def test_a_saved_folder_is_the_one_it_came_from(ranks: Ranks, folders, layout, tmp_path):
    ranks.run(saved, layout.size, folders["tied"], layout, str(tmp_path / "saved"))
    assert {path.name for path in tmp_path.iterdir()} == {"saved"}
    assert (tmp_path / "saved/config.json").read_text() == Path(folders["tied"], "config.json").read_text()
    weights, exported = on_disk(folders["tied"]), on_disk(str(tmp_path / "saved"))
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)


@pytest.mark.parametrize("layout", [ONE_RANK, SEQUENCE_PIPELINE])
def test_a_tied_tensor_may_have_either_name_and_buffers_of_older_programs_are_skipped(
    ranks: Ranks, folders, layout, tmp_path
):
    folder, weights = tmp_path / "old", on_disk(folders["tied"])
    shutil.copytree(folders["tied"], folder)
    renamed = {{"model.embed_tokens.weight": "lm_head.weight"}.get(name, name): t for name, t in weights.items()}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(renamed | buffer, folder / "model.safetensors", metadata={"format": "pt"})
    ranks.run(saved, layout.size, str(folder), layout, str(tmp_path / "saved"))
    exported = on_disk(str(tmp_path / "saved"))
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)


def test_weights_that_do_not_fit_their_configuration_are_refused_by_name(ranks: Ranks, folders, tmp_path):
    weights = on_disk(folders["untied"])
    norm, key, head = "model.norm.weight", "model.layers.2.self_attn.k_proj.weight", "lm_head.weight"
    broken = {
        f"lacks {norm}": {n: t for n, t in weights.items() if n != norm},
        "holds model.layers.4.bias, which": weights | {"model.layers.4.bias": torch.zeros(3)},
        f"{key} [48, 32]": weights | {key: torch.zeros(48, 32)},
        f"{head} [151, 32] does not fit": weights | {head: torch.zeros(151, 32)},
        f"{norm} [31] does not fit": weights | {norm: torch.zeros(31)},
    }
    for message, tensors in broken.items():
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folders["untied"], folder)
        save_file(tensors, folder / "model.safetensors")
        (error,) = ranks.run(refused, 1, str(folder))
        assert message in error
        assert str(folder) in error


# Training -----------------------------------------------------------------------------------------------------------


def run_on(ranks: Ranks, folder: str, layout: Layout, recipe: Recipe, groups=GROUPS, dtype="float32"):
    return ranks.run(trained, layout.size, Run(folder, groups, recipe, layout, dtype))


def largest_change(folder: str, trace: Trace) -> float:
    before = on_disk(folder)
    return max(float((weight - before[name]).abs().max()) for name, weight in trace.weights.items())


@IN_LAYOUTS
def test_five_training_steps_are_those_of_plain_autograd_in_every_layout(ranks: Ranks, folders, name, layouts):
    """The top 20 % of each mini-batch, two mini-batches per step."""
    recipe = Recipe()
    wanted = train(folders[name], GROUPS, recipe)
    assert largest_change(folders[name], wanted) > 5e-3, "there was training"
    assert max(wanted.clip_fraction) > 0.1
    assert min(wanted.grad_norm) < recipe.clip_grad < max(wanted.grad_norm)
    for layout in layouts:
        traces = run_on(ranks, folders[name], layout, recipe)
        assert_same_training(traces, wanted, layout)
        means = [sum(wanted.threshold[i : i + 2]) / 2 for i in range(0, len(wanted.threshold), 2)]
        for trace in traces:
            assert trace.threshold == pytest.approx(means, abs=1e-4)
            assert trace.learning_rate == pytest.approx([0.0015, 0.003, 0.003, 0.003, 0.003])


def test_regularizers_and_means_are_those_of_plain_autograd(ranks: Ranks, folders):
    """An entropy term and a KL to another model, also for tokens without advantage, by sequence and by prompt."""
    groups = [(prompt, responses, [1.0, -1.0, 0.0, 0.0]) for prompt, responses, _ in GROUPS]
    for layout, normalizer in ((SEQUENCE_PIPELINE, "prompt_mean"), (SEVERAL_MICRO_BATCHES, "sequence_mean")):
        recipe = Recipe(
            steps=2,
            normalizer=normalizer,
            fraction=0.5,
            entropy_coefficient=0.3,
            kl_coefficient=0.2,
            reference=folders["tied"],
        )
        wanted = train(folders["untied"], groups, recipe)
        assert_same_training(run_on(ranks, folders["untied"], layout, recipe, groups), wanted, layout)


@pytest.mark.parametrize(
    ("name", "layouts"), [("untied", (SEVERAL_MICRO_BATCHES, SEQUENCE_PIPELINE)), ("tied", TIED_LAYOUTS)]
)
def test_adding_the_output_layers_gradient_to_main_grad_changes_nothing(ranks: Ranks, folders, name, layouts):
    """Tied on one stage, the gradients of embedding and output layer meet in one parameter."""
    recipe = Recipe(steps=2)
    wanted = train(folders[name], GROUPS, recipe)
    for layout in layouts:
        traces = ranks.run(trained, layout.size, Run(folders[name], GROUPS, recipe, layout, fuse_output_gradient=True))
        assert all(trace.fused for trace in traces if trace.last_stage)
        assert_same_training(traces, wanted, layout)


def test_the_logits_never_exist_in_any_pass(ranks: Ranks, tmp_path):
    """No operation makes a tensor of as many elements as the logits of this rank's columns; a tile is the largest."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    vocab = 12_000
    config = Qwen3Config(**SHAPE | {"vocab_size": vocab, "max_position_embeddings": 1024}, tie_word_embeddings=True)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    groups = make_groups(4, vocab, seed=1, longest=400)
    rows = sum(len(response) for _, responses, _ in groups for response in responses)
    for layout in (ONE_RANK, replace(SEQUENCE, budget=ONE_RANK.budget)):
        logits = rows * vocab // layout.tensor
        for found in ranks.run(largest_tensors, layout.size, str(tmp_path), groups, layout):
            assert found.keys() == {"score", "old", "current"}
            assert max(found.values()) <= 1024 * 2048 < logits / 3, (layout, found, logits)


def test_a_weight_sync_needs_the_memory_of_a_bucket_and_of_the_parameter_being_gathered(ranks: Ranks, tmp_path: Path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**SHAPE | {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8})
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    bucket_bytes = 2**20
    for peak, largest, total in ranks.run(memory_of_a_weight_sync, 4, str(tmp_path), TENSOR_PIPELINE, bucket_bytes):
        print(f"peak {peak}, bucket {bucket_bytes}, largest {largest}, total {total}")
        # Gloo holds the tensors of a few broadcasts until the slowest rank has them.
        assert bucket_bytes < peak < bucket_bytes + 8 * largest < total / 2


OTHER_RECIPES = {
    "all tokens": (Recipe(steps=2, keep="all", fraction=1.0), (SEVERAL_MICRO_BATCHES, SEQUENCE)),
    "divided by the selected tokens": (
        Recipe(steps=2, normalizer="selected_tokens", temperature=0.7),
        (SEVERAL_MICRO_BATCHES, DATA, SEQUENCE_PIPELINE),
    ),
    "one threshold a step": (Recipe(steps=2, scope="rollout_batch"), (SEVERAL_MICRO_BATCHES, DATA)),
}


@pytest.mark.parametrize("name", OTHER_RECIPES)
def test_other_selections_and_normalizers_are_those_of_plain_autograd(ranks: Ranks, folders, name):
    recipe, layouts = OTHER_RECIPES[name]
    wanted = train(folders["untied"], GROUPS, recipe)
    assert largest_change(folders["untied"], wanted) > 1e-3
    for layout in layouts:
        assert_same_training(run_on(ranks, folders["untied"], layout, recipe), wanted, layout)


def test_current_entropies_select_in_each_micro_batch_alike_in_every_layout(ranks: Ranks, folders):
    recipe = Recipe(steps=2, scope="micro_batch", entropy="current", fraction=0.3)
    layouts = [replace(layout, budget=150) for layout in (ONE_RANK, TENSOR, PIPELINE)]
    wanted = None
    for layout in layouts:
        traces = run_on(ranks, folders["untied"], layout, recipe)
        if wanted is None:
            micro_batches = traces[0].micro_batches
            assert min(map(len, micro_batches)) > 1
            wanted = train(folders["untied"], GROUPS, recipe, micro_batches)
        assert all(trace.micro_batches == micro_batches for trace in traces)
        assert_same_training(traces, wanted, layout)


def test_a_gradient_that_is_not_finite_changes_nothing_on_any_rank(ranks: Ranks, folders):
    """The first mini-batch holds a NaN advantage on one replica; the second is trained on as if it had been alone."""
    prompt, responses, rewards = GROUPS[1]
    groups = [GROUPS[0], (prompt, responses, [math.nan, *rewards[1:]]), *GROUPS[2:]]
    only_bad = Recipe(steps=1, mini_batch_groups=8)
    recipe = Recipe(steps=2)
    wanted = train(folders["untied"], groups, recipe)
    assert wanted.skipped == [1, 0, 1, 0]
    weights = on_disk(folders["untied"])
    for trace in run_on(ranks, folders["untied"], DATA, only_bad, groups):
        assert trace.skipped == [1]
        assert all(torch.equal(trace.weights[name], weights[name]) for name in weights)
    for layout in (SEVERAL_MICRO_BATCHES, PIPELINE, DATA):
        assert_same_training(run_on(ranks, folders["untied"], layout, recipe, groups), wanted, layout)


@pytest.mark.parametrize("layout", [SEVERAL_MICRO_BATCHES, SEQUENCE_PIPELINE])
def test_bfloat16_training_stays_near_that_of_plain_autograd(ranks: Ranks, folders, layout):
    recipe = Recipe(steps=2)
    wanted = train(folders["untied"], GROUPS, recipe)
    traces = run_on(ranks, folders["untied"], layout, recipe, dtype="bfloat16")
    shared = [len(set(a) & set(b)) / len(b) for a, b in zip(kept_over(traces), wanted.kept, strict=True)]
    assert min(shared) > 0.8
    for trace in traces:
        assert trace.loss == pytest.approx(wanted.loss, abs=0.02)
        # Later, tokens on either side of the clipping bounds make their own difference.
        assert trace.grad_norm[0] == pytest.approx(wanted.grad_norm[0], rel=0.05)
        assert trace.skipped == [0] * 4
        for name, weight in wanted.weights.items():
            assert trace.weights[name].dtype == torch.bfloat16
            assert (trace.weights[name] - weight).abs().max() < 0.02, name
