"""Tokens without gradient are not run, and only the work changes; an entropy that is not finite stops every rank.

With an epsilon far above any gradient, Adam's first update is proportional to the gradient, so the difference of the
exported weights measures it.
"""

import contextlib
import math
import shutil
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from launcher import Ranks
from policy_runs import Layout, Run, mini_batches_of, policy_of, settings_of
from reference_training import GROUP_SIZE, Group, Recipe, make_groups
from safetensors.torch import load_file, save_file

VOCAB = 150
RARE = VOCAB - 1  # in no sequence, unless a test puts it there
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
GRADIENT = Recipe(
    steps=1, mini_batch_groups=8, learning_rate=1000.0, eps=100.0, warmup_steps=0, weight_decay=0.0, clip_grad=1e9
)
LAYOUTS = (Layout(budget=90), Layout(data=2, budget=90), Layout(tensor=2, sequence=True, budget=90))


def groups_with(*rewards: list[float]) -> list[Group]:
    """Groups of random sequences with these rewards; a response whose reward is the group's mean has no advantage."""
    made = make_groups(len(rewards), RARE, seed=3)
    return [(prompt, responses, given) for (prompt, responses, _), given in zip(made, rewards, strict=True)]


# Responses with and without an advantage, and a group in which no response has one.
GROUPS = groups_with(
    [1.0, -1.0, 1.0, -1.0],
    [1.0, 0.0, -1.0, 0.0],
    [1.0, 1.0, 1.0, 1.0],
    [0.0, 0.0, -1.0, 1.0],
    [1.0, -1.0, -1.0, -1.0],
    [0.0, 0.0, 0.0, 0.0],
    [1.0, 1.0, -1.0, 1.0],
    [-1.0, 1.0, 0.0, 0.0],
)


def advantage_of(groups: list[Group], number: int) -> float:
    rewards = groups[number // GROUP_SIZE][2]
    return rewards[number % GROUP_SIZE] - sum(rewards) / GROUP_SIZE


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "model"
    Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(path)
    return str(path)


@dataclass
class Seen:
    """Observations of one rank in a step."""

    data_rank: int
    scored: list[int]
    """Tokens of each scored stream, padding included."""
    trained: list[int]
    """Tokens of each trained stream, padding included."""
    selected: list[tuple[int, int]]
    """(sequence, position) of every token selected before the trim."""
    metrics: dict[str, float]
    weights: dict[str, torch.Tensor]


def one_step(run: Run, trimmed: bool, multiples: dict[str, int]) -> Seen:
    """Take a step with the learner on one mini-batch; trimmed streams are packed with other ``multiples``."""
    from megatron_rlvr import learner
    from megatron_rlvr.batching.batch import sequence_and_position
    from megatron_rlvr.startup.assembly import make_loss

    settings = settings_of(run.recipe)
    with contextlib.ExitStack() as stack:
        policy = stack.enter_context(policy_of(run.folder, run.layout, run.recipe))
        (mini,) = mini_batches_of(policy, run.groups, run.layout.budget, run.recipe.mini_batch_groups)
        mini = replace(mini, packing=replace(mini.packing, **multiples))
        trained: list[int] = []
        selected: list[tuple[int, int]] = []

        def trim(whole: Any, *arguments: Any, **options: Any) -> Any:
            for batch, mask in zip(whole.batches, whole.masks, strict=True):
                selected.extend(sequence_and_position(token) for token in batch.token_ids[mask].tolist())
            return real_trim(whole, *arguments, **options) if trimmed else whole

        def train_step(batches: Any, *arguments: Any, **options: Any) -> dict[str, float]:
            trained.extend(len(batch.tokens) for batch in batches)
            return real_train_step(batches, *arguments, **options)

        real_trim, real_train_step = learner.trim, policy.train_step
        stack.enter_context(mock.patch.object(learner, "trim", trim))
        policy.train_step = train_step
        policy.start_step()
        metrics = learner.Learner(settings, policy, make_loss(settings.loss)).learn(
            1, [mini], lambda phase: contextlib.nullcontext()
        )
        return Seen(
            data_rank=policy.ranks.data_rank,
            scored=[len(batch.tokens) for batch in mini.micro_batches],
            trained=trained,
            selected=selected,
            metrics=metrics,
            weights={name: tensor.clone() for name, tensor in policy.export_weights()},
        )


def step_on(
    ranks: Ranks, folder: str, layout: Layout, recipe: Recipe, groups=GROUPS, trimmed=True, **multiples: int
) -> list[Seen]:
    """Observations of one rank of each data-parallel replica."""
    seen = ranks.run(one_step, layout.size, Run(folder, groups, recipe, layout), trimmed, multiples)
    return list({one.data_rank: one for one in seen}.values())


def needed_positions(groups: list[Group], seen: list[Seen]) -> int:
    """Number of input positions up to the last selected token of every response with an advantage."""
    last: dict[int, int] = {}
    for sequence, position in (pair for one in seen for pair in one.selected):
        if advantage_of(groups, sequence):
            last[sequence] = max(last.get(sequence, 0), position)
    return sum(len(groups[sequence // GROUP_SIZE][0]) + position for sequence, position in last.items())


def assert_metrics_report_the_work(groups: list[Group], seen: list[Seen]) -> None:
    whole = sum(len(prompt) + len(ids) - 1 for prompt, responses, _ in groups for ids in responses)
    for one in seen:
        assert one.metrics["train/tokens"] == needed_positions(groups, seen)
        assert one.metrics["train/tokens_dropped_fraction"] == pytest.approx(1 - needed_positions(groups, seen) / whole)


def gradient(before: dict[str, torch.Tensor], seen: Seen) -> torch.Tensor:
    return torch.cat([(seen.weights[name] - weight).flatten() for name, weight in before.items()])


RECIPES = {
    "top": GRADIENT,
    "random": replace(GRADIENT, keep="random"),
    "few": replace(GRADIENT, fraction=0.03, scope="rollout_batch"),
    "top of each micro-batch": replace(GRADIENT, scope="micro_batch"),
    "divided by the selected tokens": replace(GRADIENT, normalizer="selected_tokens"),
    "all": replace(GRADIENT, keep="all", fraction=1.0),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_gradient_is_that_of_the_whole_mini_batch_and_the_work_is_what_it_needs(ranks: Ranks, folder, name):
    before = load_file(f"{folder}/model.safetensors")
    for layout in LAYOUTS:
        whole, trimmed = (step_on(ranks, folder, layout, RECIPES[name], trimmed=yes) for yes in (False, True))
        expected, found = gradient(before, whole[0]), gradient(before, trimmed[0])
        assert expected.norm() > 0.5
        assert (found - expected).norm() < 1e-5 * expected.norm(), layout
        for one, other in zip(whole, trimmed, strict=True):
            assert other.metrics["train/grad_norm"] == pytest.approx(one.metrics["train/grad_norm"], rel=1e-5)
            assert other.metrics["train/loss"] == pytest.approx(one.metrics["train/loss"], rel=1e-4, abs=1e-6)
            assert one.selected == other.selected
            assert (one.scored, one.trained) == (other.scored, one.scored)
            assert one.metrics["train/tokens_dropped_fraction"] == 0
            for metric in ("selection/tokens", "selection/fraction", "entropy/selected_mean", "entropy/mean"):
                assert one.metrics[metric] == other.metrics[metric]
        assert_metrics_report_the_work(GROUPS, trimmed)
        assert len({len(one.trained) for one in trimmed}) == 1, "as many micro-batches on every rank"
        assert max(max(one.trained) for one in trimmed) <= layout.budget
        needed = needed_positions(GROUPS, trimmed)
        streams = sum(len(one.trained) for one in trimmed)
        assert needed <= sum(sum(one.trained) for one in trimmed) <= needed + streams * (layout.tensor - 1)
        assert needed < 0.8 * sum(sum(one.scored) for one in trimmed)
        assert streams < sum(len(one.scored) for one in trimmed)


def test_padding_of_sequences_and_additional_micro_batches_change_no_gradient(ranks: Ranks, folder):
    """Context parallelism and interleaved pipelines require them."""
    before = load_file(f"{folder}/model.safetensors")
    expected = gradient(before, step_on(ranks, folder, Layout(), GRADIENT, trimmed=False)[0])
    for layout in LAYOUTS:
        seen = step_on(ranks, folder, layout, GRADIENT, sequence_multiple=6, micro_batch_multiple=4)
        assert (gradient(before, seen[0]) - expected).norm() < 1e-5 * expected.norm(), layout
        assert all(length % 6 == 0 for one in seen for length in one.trained)
        assert all(len(one.trained) % 4 == 0 for one in seen)


def test_a_rank_without_remaining_sequences_takes_part_with_padding(ranks: Ranks, folder):
    """First a single selected token on one of two ranks, then no advantage on any rank."""
    before = load_file(f"{folder}/model.safetensors")
    layout, one_token = Layout(data=2, budget=90), replace(GRADIENT, fraction=1e-9)
    groups = [(prompt, responses, [1.0, 1.0, -1.0, -1.0]) for prompt, responses, _ in GROUPS]
    whole, trimmed = (step_on(ranks, folder, layout, one_token, groups, yes) for yes in (False, True))
    expected = gradient(before, whole[0])
    assert (gradient(before, trimmed[0]) - expected).norm() < 1e-5 * expected.norm()
    assert sorted(one.trained for one in trimmed) == sorted([[1], [needed_positions(groups, trimmed)]])
    assert_metrics_report_the_work(groups, trimmed)

    nothing = groups_with(*[[1.0, 1.0, 1.0, 1.0]] * 4)
    for layout in LAYOUTS:
        seen = step_on(ranks, folder, layout, GRADIENT, nothing)
        for one in seen:
            assert one.trained == [layout.tensor], "padding only, one token for each rank that shares it"
            metrics = {name: one.metrics[f"train/{name}"] for name in ("loss", "grad_norm", "skipped", "clip_fraction")}
            assert metrics == dict.fromkeys(metrics, 0.0)
            assert one.metrics["selection/tokens"] > 0, "trimmed tokens count for the threshold"
            assert all(torch.equal(one.weights[name], weight) for name, weight in before.items())
        assert_metrics_report_the_work(nothing, seen)


def test_nothing_is_trimmed_if_current_entropies_select(ranks: Ranks, folder):
    recipe = replace(GRADIENT, scope="micro_batch", entropy="current")
    for layout in LAYOUTS:
        for one in step_on(ranks, folder, layout, recipe):
            assert one.trained == one.scored
            assert one.metrics["train/tokens_dropped_fraction"] == 0


# Entropies that are not finite --------------------------------------------------------------------------------------


def stopped(run: Run) -> tuple[str, list[int]]:
    """Why the learner stopped, and this rank's token ids whose entropy was not finite before."""
    from megatron_rlvr.learner import Learner, PolicyEntropyError
    from megatron_rlvr.startup.assembly import make_loss

    settings = settings_of(run.recipe)
    with policy_of(run.folder, run.layout, run.recipe) as policy:
        minis = mini_batches_of(policy, run.groups, run.layout.budget, run.recipe.mini_batch_groups)
        micros = [micro for mini in minis for micro in mini.micro_batches]
        ids = torch.cat([micro.token_ids for micro in micros])
        bad = ids[~torch.cat(policy.score(micros).entropy).isfinite()].tolist()
        try:
            policy.start_step()
            Learner(settings, policy, make_loss(settings.loss)).learn(7, minis, lambda phase: contextlib.nullcontext())
        except PolicyEntropyError as error:
            return str(error), bad
        return "nothing", bad


def test_an_entropy_that_is_not_finite_stops_every_rank_and_names_response_and_token(ranks: Ranks, folder, tmp_path):
    """The embedding of one token, which only one sequence contains, is NaN."""
    broken = str(shutil.copytree(folder, tmp_path / "broken"))
    weights = load_file(f"{folder}/model.safetensors")
    weights["model.embed_tokens.weight"][RARE] = math.nan
    save_file(weights, f"{broken}/model.safetensors", metadata={"format": "pt"})
    group, member = 5, 2
    groups = list(GROUPS)
    prompt, responses, rewards = groups[group]
    with_rare = [list(response) for response in responses]
    with_rare[member] = list(range(40)) + [RARE] + list(range(20))
    groups[group] = (prompt, with_rare, rewards)
    recipes = [
        GRADIENT,
        replace(GRADIENT, keep="random"),
        replace(GRADIENT, keep="all", fraction=1.0),
        replace(GRADIENT, scope="rollout_batch", mini_batch_groups=3),
        replace(GRADIENT, scope="micro_batch"),
        replace(GRADIENT, scope="micro_batch", entropy="current"),
    ]
    for layout in (Layout(), Layout(data=2, budget=90)):
        for recipe in recipes:
            stops = ranks.run(stopped, layout.size, Run(broken, groups, recipe, layout))
            bad = [token for _, ids in stops for token in ids]
            assert {token >> 20 for token in bad} == {group * GROUP_SIZE + member}
            assert sum(bool(ids) for _, ids in stops) == 1, "on one rank alone"
            (message,) = {message for message, _ in stops}
            assert f"step 7: the policy's entropy at token {min(bad) % 2**20} of response 22 " in message
            assert "lower optimizer.learning_rate" in message


def test_a_current_entropy_that_is_not_finite_is_reported_from_within_the_pass(ranks: Ranks, folder):
    """The first update makes the weights so large that the entropies of the next mini-batch are NaN."""
    recipe = replace(
        GRADIENT, mini_batch_groups=4, scope="micro_batch", entropy="current", learning_rate=1e30, eps=1e-8
    )
    ((message, bad),) = ranks.run(stopped, 1, Run(folder, GROUPS, recipe, Layout()))
    assert bad == [], "finite before the update"
    assert "step 7: the policy's entropy at token 0 of response 16 of the batch is not finite" in message
