"""What carries no gradient is not run, and only the work changes; an entropy that is not finite stops every rank.

With an epsilon far above any gradient Adam's first update is in proportion to it: so the exported weights tell it.
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
    """Groups of random sequences with these rewards; those that are the mean of their group have no advantage."""
    made = make_groups(len(rewards), RARE, seed=3)
    return [(prompt, responses, given) for (prompt, responses, _), given in zip(made, rewards, strict=True)]


# The responses of an advantage, of none, and a group of none at all.
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
    """What one rank saw of a step."""

    data_rank: int
    scored: list[int]
    """Tokens of each stream that was scored, with those of padding."""
    trained: list[int]
    selected: list[tuple[int, int]]
    """(sample, position), of all mini-batches before trimming."""
    metrics: dict[str, float]
    weights: dict[str, torch.Tensor]


def one_step(run: Run, trimming: bool, multiples: dict[str, int]) -> Seen:
    """A step through the learner, on one mini-batch; trimmed streams are packed with other ``multiples``."""
    from megatron_rlvr import learner
    from megatron_rlvr.algo.loss import DapoLoss
    from megatron_rlvr.batching.batch import sample_and_position

    settings = settings_of(run.recipe)
    with contextlib.ExitStack() as stack:
        policy = stack.enter_context(policy_of(run.folder, run.layout, run.recipe))
        (mini,) = mini_batches_of(policy, run.groups, run.layout.budget, run.recipe.mini_batch_groups)
        mini = replace(mini, packing=replace(mini.packing, **multiples))
        trained: list[int] = []
        selected: list[tuple[int, int]] = []

        def trim(work: Any, *arguments: Any) -> Any:
            for batch, mask in zip(work.batches, work.masks, strict=True):
                selected.extend(sample_and_position(token) for token in batch.token_ids[mask].tolist())
            return trim_itself(work, *arguments) if trimming else work

        def train_step(batches: Any, *arguments: Any) -> dict[str, float]:
            trained.extend(len(batch.tokens) for batch in batches)
            return train_step_itself(batches, *arguments)

        trim_itself, train_step_itself = learner.trim, policy.train_step
        stack.enter_context(mock.patch.object(learner, "trim", trim))
        policy.train_step = train_step
        policy.start_step()
        metrics = learner.Learner(settings, policy, DapoLoss(settings.loss)).learn(
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
    ranks: Ranks, folder: str, layout: Layout, recipe: Recipe, groups=GROUPS, trimming=True, **multiples: int
) -> list[Seen]:
    """What one rank of each replica saw."""
    seen = ranks.run(one_step, layout.size, Run(folder, groups, recipe, layout), trimming, multiples)
    return list({one.data_rank: one for one in seen}.values())


def needed_positions(groups: list[Group], seen: list[Seen]) -> int:
    """Input positions up to the last selected token of every response with an advantage, counted by hand."""
    last: dict[int, int] = {}
    for sample, position in (pair for one in seen for pair in one.selected):
        if advantage_of(groups, sample):
            last[sample] = max(last.get(sample, 0), position)
    return sum(len(groups[sample // GROUP_SIZE][0]) + position for sample, position in last.items())


def assert_figures_tell_the_work(groups: list[Group], seen: list[Seen]) -> None:
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
        whole, trimmed = (
            step_on(ranks, folder, layout, RECIPES[name], trimming=trimming) for trimming in (False, True)
        )
        expected, found = gradient(before, whole[0]), gradient(before, trimmed[0])
        assert expected.norm() > 0.5
        assert (found - expected).norm() < 1e-5 * expected.norm(), layout
        for one, other in zip(whole, trimmed, strict=True):
            assert other.metrics["train/grad_norm"] == pytest.approx(one.metrics["train/grad_norm"], rel=1e-5)
            assert other.metrics["train/loss"] == pytest.approx(one.metrics["train/loss"], rel=1e-4, abs=1e-6)
            assert one.selected == other.selected
            assert (one.scored, one.trained) == (other.scored, one.scored)
            assert one.metrics["train/tokens_dropped_fraction"] == 0
            for figure in ("selection/tokens", "selection/fraction", "entropy/selected_mean", "entropy/mean"):
                assert one.metrics[figure] == other.metrics[figure]
        assert_figures_tell_the_work(GROUPS, trimmed)
        assert len({len(one.trained) for one in trimmed}) == 1, "as many micro-batches on every rank"
        assert max(max(one.trained) for one in trimmed) <= layout.budget
        needed = needed_positions(GROUPS, trimmed)
        streams = sum(len(one.trained) for one in trimmed)
        assert needed <= sum(sum(one.trained) for one in trimmed) <= needed + streams * (layout.tensor - 1)
        assert needed < 0.8 * sum(sum(one.scored) for one in trimmed)
        assert streams < sum(len(one.scored) for one in trimmed)


def test_padding_after_each_sequence_and_more_micro_batches_change_no_gradient(ranks: Ranks, folder):
    """As context parallel and interleaved pipelines ask for them."""
    before = load_file(f"{folder}/model.safetensors")
    expected = gradient(before, step_on(ranks, folder, Layout(), GRADIENT, trimming=False)[0])
    for layout in LAYOUTS:
        seen = step_on(ranks, folder, layout, GRADIENT, sequence_multiple=6, micro_batch_multiple=4)
        assert (gradient(before, seen[0]) - expected).norm() < 1e-5 * expected.norm(), layout
        assert all(length % 6 == 0 for one in seen for length in one.trained)
        assert all(len(one.trained) % 4 == 0 for one in seen)


def test_a_rank_that_has_nothing_left_takes_part_with_padding(ranks: Ranks, folder):
    """A single selected token on one of two ranks; and no advantage anywhere, on either."""
    before = load_file(f"{folder}/model.safetensors")
    layout, one_token = Layout(data=2, budget=90), replace(GRADIENT, fraction=1e-9)
    groups = [(prompt, responses, [1.0, 1.0, -1.0, -1.0]) for prompt, responses, _ in GROUPS]
    whole, trimmed = (step_on(ranks, folder, layout, one_token, groups, trimming) for trimming in (False, True))
    expected = gradient(before, whole[0])
    assert (gradient(before, trimmed[0]) - expected).norm() < 1e-5 * expected.norm()
    assert sorted(one.trained for one in trimmed) == sorted([[1], [needed_positions(groups, trimmed)]])
    assert_figures_tell_the_work(groups, trimmed)

    nothing = groups_with(*[[1.0, 1.0, 1.0, 1.0]] * 4)
    for layout in LAYOUTS:
        seen = step_on(ranks, folder, layout, GRADIENT, nothing)
        for one in seen:
            assert one.trained == [layout.tensor], "padding only, as long as the ranks that share it"
            metrics = {name: one.metrics[f"train/{name}"] for name in ("loss", "grad_norm", "skipped", "clip_fraction")}
            assert metrics == dict.fromkeys(metrics, 0.0)
            assert one.metrics["selection/tokens"] > 0, "they count for the threshold nevertheless"
            assert all(torch.equal(one.weights[name], weight) for name, weight in before.items())
        assert_figures_tell_the_work(nothing, seen)


def test_nothing_is_left_out_where_current_entropies_decide(ranks: Ranks, folder):
    recipe = replace(GRADIENT, scope="micro_batch", entropy="current")
    for layout in LAYOUTS:
        for one in step_on(ranks, folder, layout, recipe):
            assert one.trained == one.scored
            assert one.metrics["train/tokens_dropped_fraction"] == 0


# Entropies that are not finite --------------------------------------------------------------------------------------


def stopped(run: Run) -> tuple[str, list[int]]:
    """Why the learner ended the run, and the token ids of this rank whose entropy was not finite before it."""
    from megatron_rlvr.algo.loss import DapoLoss
    from megatron_rlvr.learner import Learner, PolicyEntropyError

    settings = settings_of(run.recipe)
    with policy_of(run.folder, run.layout, run.recipe) as policy:
        minis = mini_batches_of(policy, run.groups, run.layout.budget, run.recipe.mini_batch_groups)
        micros = [micro for mini in minis for micro in mini.micro_batches]
        ids = torch.cat([micro.token_ids for micro in micros])
        bad = ids[~torch.cat(policy.score(micros).entropy).isfinite()].tolist()
        try:
            policy.start_step()
            Learner(settings, policy, DapoLoss(settings.loss)).learn(7, minis, lambda phase: contextlib.nullcontext())
        except PolicyEntropyError as error:
            return str(error), bad
        return "nothing", bad


def test_an_entropy_that_is_not_finite_stops_every_rank_with_the_sample_and_its_place(ranks: Ranks, folder, tmp_path):
    """The embedding of one token is NaN, which only one sequence contains."""
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
            told = ranks.run(stopped, layout.size, Run(broken, groups, recipe, layout))
            bad = [token for _, ids in told for token in ids]
            assert {token >> 20 for token in bad} == {group * GROUP_SIZE + member}
            assert sum(bool(ids) for _, ids in told) == 1, "one rank alone has it"
            (message,) = {message for message, _ in told}
            assert f"step 7: the policy's entropy at token {min(bad) % 2**20} of the response of sample 22 " in message
            assert "lower optimizer.learning_rate" in message


def test_a_current_entropy_that_is_not_finite_is_named_from_within_the_pass(ranks: Ranks, folder):
    """An update that takes the weights beyond all bounds: the next mini-batch finds entropies of NaN."""
    recipe = replace(
        GRADIENT, mini_batch_groups=4, scope="micro_batch", entropy="current", learning_rate=1e30, eps=1e-8
    )
    ((message, bad),) = ranks.run(stopped, 1, Run(folder, GROUPS, recipe, Layout()))
    assert bad == [], "before the update all was well"
    assert "step 7: the policy's entropy at token 0 of the response of sample 16 is not finite" in message
