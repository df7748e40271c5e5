# SPDX-License-Identifier: Apache-2.0
"""A token weight of exactly 0 takes its token out of preference_loss: whatever its score, and at no
cost, but lengths count it."""

import pytest
import torch
from torch import Tensor

from fastpref import ScoringOptions, explain, objectives, preference_loss
from fastpref.scoring import batches
from tests.preference.cases import SPLITS, B, Data, H, T, V, by_hand, compare, run, run_packed
from tests.scoring.operations import Operations

OUT = torch.arange(B * T).view(B, T) % 3 == 1
OPTIONS = {
    "auto": None,
    "recompute": ScoringOptions(schedule="recompute"),
    "batches": ScoringOptions(schedule="batches", memory_budget=2 * T * V * 8 * 4 // 3),
}


def with_zeros(trained: bool = False) -> Data:
    data = Data()
    data.token_weights = data.token_weights.detach().masked_fill(OUT, 0.0)
    data.token_weights.requires_grad_(trained)
    return data


def poisoned(data: Data, value: float = torch.nan) -> Data:
    """What the tokens of weight 0 are scored with is no number."""
    other = with_zeros(data.token_weights.requires_grad)
    for one in (other.hidden.detach(), other.ref_hidden):
        one[OUT] = value
    return other


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["dpo", "simpo", "orpo"])
def test_as_by_hand(name: str, packed: bool, options: str) -> None:
    objective, data = objectives.get(name), with_zeros()
    given = {"token_weights": data.token_weights, "options": OPTIONS[options]}
    call = run_packed if packed else run
    losses = by_hand(objective, data, SPLITS["pair"], {}, weighted=True)
    compare(data, losses, call(objective, data, **given))
    losses = by_hand(objective, data, SPLITS["pair"], {}, weighted=True)
    other = poisoned(data)
    output = call(objective, other, **given)
    torch.testing.assert_close(output.losses, losses.detach())
    leaves = (data.hidden, data.weight, data.bias), (other.hidden, other.weight, other.bias)
    want = torch.autograd.grad(losses.mean(), leaves[0])
    for got, expected in zip(torch.autograd.grad(output.loss, leaves[1]), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["tdpo", "epsilon_dpo", "mallows_po", "wpo"])
def test_what_is_made_of_distributions(name: str) -> None:
    """Of the tokens that are left: as if the others were not scored."""
    objective = objectives.wpo(objectives.get("dpo")) if name == "wpo" else objectives.get(name)
    data = poisoned(with_zeros())
    with_weights = run(objective, data, token_weights=data.token_weights)
    cut = with_zeros()
    cut.target = cut.target.masked_fill(OUT, -100)
    left = run(objective, cut, token_weights=data.token_weights)
    assert with_weights.losses.isfinite().all()
    torch.testing.assert_close(with_weights.losses, left.losses)
    torch.testing.assert_close(
        *(torch.autograd.grad(one.loss, d.weight) for one, d in ((with_weights, data), (left, cut)))
    )


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_metrics_are_of_the_tokens_that_are_left(packed: bool, trained: bool) -> None:
    call, outputs = run_packed if packed else run, ("entropy", "mean_logits", "accuracy")
    data, cut = poisoned(with_zeros(trained)), with_zeros()
    cut.target = cut.target.masked_fill(OUT, -100)
    found, left = (
        call(objectives.get("dpo"), one, token_weights=one.token_weights, outputs=outputs).metrics
        for one in (data, cut)
    )
    for name, value in left.items():
        torch.testing.assert_close(found[name], value)


def test_the_gradient_of_a_weight_of_0_is_its_score() -> None:
    """Where that is finite; else 0."""
    objective, data = objectives.get("dpo"), with_zeros(trained=True)
    losses = by_hand(objective, data, SPLITS["pair"], {}, weighted=True)
    compare(data, losses, run(objective, data, token_weights=data.token_weights))
    losses = by_hand(objective, data, SPLITS["pair"], {}, weighted=True)
    (want,) = torch.autograd.grad(losses.mean(), data.token_weights)
    assert want[OUT & data.scored].any()
    for value in (torch.nan, torch.inf):
        other = poisoned(data, value)
        loss = run(objective, other, token_weights=other.token_weights).loss
        (got,) = torch.autograd.grad(loss, other.token_weights)
        torch.testing.assert_close(got[~OUT], want[~OUT])
        assert not got[OUT].any()


@pytest.mark.parametrize("options", [None, ScoringOptions(memory_budget=2 * T * V * 8)])
def test_costs_no_product(options: ScoringOptions | None) -> None:
    hidden, weight = torch.randn(B, T, H), torch.randn(V, H, requires_grad=True)
    target, weights = torch.randint(V, (B, T)), torch.ones(B, T).masked_fill(OUT, 0)
    hidden.requires_grad_()
    given = {"token_weights": weights, "options": options}
    plan = explain(hidden, weight, target, "simpo", **given)
    assert plan.policy.scored == int((~OUT).sum())
    with Operations() as operations:
        preference_loss(hidden, weight, target, "simpo", **given).loss.backward()
    tokens = int((~OUT).sum())
    own = plan.policy
    units = own.product_units if isinstance(own, batches.BatchedPlan) else own.units
    assert operations.flop == pytest.approx(units * 2 * tokens * H * V, rel=0.02)


def test_lengths_count_every_scored_token() -> None:
    seen: list[Tensor] = []

    def loss(chosen: Tensor, rejected: Tensor, *, chosen_lengths: Tensor) -> Tensor:
        seen.append(chosen_lengths)
        return rejected - chosen

    data = with_zeros()
    run_plain = {"token_weights": data.token_weights}
    preference_loss(data.hidden, data.weight, data.target, loss, **run_plain)
    assert torch.equal(seen[0], data.scored.sum(1)[: B // 2])
