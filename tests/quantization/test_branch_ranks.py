"""Each layer's branch has a rank of its own, for the bit operations of one rank everywhere."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import quick_recipe
from ptqd import InputError, Recipe, Sampling, load, quantize
from ptqd.diffusion import run_batch
from ptqd.quantization import run_cost
from ptqd.quantization.branch_ranks import BranchOptions, choose_ranks
from ptqd.quantization.methods import LowRank
from ptqd.quantization.sites import quantized_layers

RUN = Sampling(4, 0.0, samples=8, batch=8, call={"class_labels": [0, 1], "guidance_scale": 2.0})


def test_the_word_and_the_rule() -> None:
    (branch,) = (m for m in Recipe.parse("w4a4-svd8x8-ranks-best").methods if isinstance(m, LowRank))
    assert (branch.rank, branch.bits, branch.by_layer) == (8, 8, True)
    (branch,) = (m for m in Recipe.parse("w4a4-ranks").methods if isinstance(m, LowRank))
    assert (branch.rank, branch.by_layer) == (16, True)
    with pytest.raises(InputError, match="the rank of a rule is 0 to"):
        Recipe.from_dict({**Recipe.parse("w4a4-svd").to_dict(), "rules": [{"match": "*", "rank": -1}]})


def test_with_returns_that_fall_no_choice_at_its_cost_takes_away_more() -> None:
    """Against all choices, for the budgets that the greedy choice spends whole."""
    draw = np.random.default_rng(0)
    layers = {}
    for name in "abcd":
        gains = np.sort(draw.random(3))[::-1]
        layers[name] = BranchOptions(float(draw.integers(1, 4)), dict(enumerate(2.0 - np.cumsum([0.0, *gains]))))

    def left(ranks: dict[str, int]) -> float:
        return sum(layers[name].effects[rank] for name, rank in ranks.items())

    def cost(ranks: dict[str, int]) -> float:
        return sum(layers[name].cost * rank for name, rank in ranks.items())

    whole = 0
    for budget in range(1, 25):
        chosen = choose_ranks(layers, budget)
        assert cost(chosen) <= budget
        if cost(chosen) == budget:
            every = (dict(zip(layers, ranks, strict=True)) for ranks in itertools.product(range(4), repeat=4))
            whole += left(chosen) == pytest.approx(min(left(ranks) for ranks in every if cost(ranks) <= budget))
    assert whole >= 5


def test_a_rank_that_helps_less_than_a_larger_one_for_its_cost_is_passed_over() -> None:
    assert choose_ranks({"a": BranchOptions(1.0, {0: 1.0, 1: 0.95, 2: 0.1})}, 2) == {"a": 2}
    assert choose_ranks({"a": BranchOptions(1.0, {0: 1.0, 1: 0.95, 2: 0.1})}, 1) == {"a": 1}
    assert choose_ranks({"a": BranchOptions(1.0, {0: 1.0, 1: 1.1})}, 5) == {"a": 0}


def test_ranks_are_saved_with_the_recipe(pipe: Any, tmp_path: Path) -> None:
    uniform, chosen = (
        quantize(pipe, quick_recipe("w4a4-svd2x8", 4), RUN),
        quantize(pipe, quick_recipe("w4a4-svd2x8-ranks", 4), RUN),
    )
    ranks = {name: layer.rank for name, layer in quantized_layers(chosen.unet)}
    assert len(set(ranks.values())) > 2
    assert run_cost(chosen, RUN).ratio >= run_cost(uniform, RUN).ratio
    assert ranks != {name: layer.rank for name, layer in quantized_layers(uniform.unet)}
    chosen.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert ranks == {name: layer.rank for name, layer in quantized_layers(again.unet)}
    want, found = (run_batch(each, RUN, range(2), "latent") for each in (chosen, again))
    assert torch.equal(torch.as_tensor(want), torch.as_tensor(found))


@pytest.mark.slow
def test_ranks_that_were_chosen_before_a_kill_are_taken(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(pipe, quick_recipe("w4a4-svd2x8-ranks", 4), RUN)
    again = quantize(pipe, quick_recipe("w4a4-svd2x8-ranks", 4), RUN, scratch=tmp_path)
    (decided,) = tmp_path.glob("*/ranks.json")
    monkeypatch.delattr("ptqd.quantization.quantize.branch_ranks")
    third = quantize(pipe, quick_recipe("w4a4-svd2x8-ranks", 4), RUN, scratch=tmp_path)
    assert decided.is_file()
    pictures = [torch.as_tensor(run_batch(each, RUN, range(2), "latent")) for each in (whole, again, third)]
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])


def test_a_recipe_with_the_branch_alone_draws_the_rows_that_ranks_need(pipe: Any) -> None:
    methods = [{"name": "svd", "rank": 2, "by_layer": True}]
    alone = Recipe.from_dict({**quick_recipe("w4a4", 4).to_dict(), "methods": methods})
    ranks = {layer.rank for _, layer in quantized_layers(quantize(pipe, alone, RUN).unet)}
    assert len(ranks) > 2
    with pytest.raises(InputError, match="named twice"):
        Recipe.parse("w4a4-svd-svd8-ranks")
