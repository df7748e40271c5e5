# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters of one value a unit in preference_loss: against the sums by hand, in one pass and
in two, traced, and as parameters that train."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import ScoringOptions, explain, preference_loss

B, T, H, V = 8, 6, 5, 22
GENERATOR = torch.Generator().manual_seed(8)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


HIDDEN, WEIGHT, REF = draw(B, T, H), draw(V, H), -15 + draw(B)
TARGET = torch.randint(V, (B, T), generator=GENERATOR)
BETA = torch.tensor([0.3, 0.0, 0.1, 0.7], dtype=torch.float64)
SMOOTHING = torch.tensor([0.0, 0.1, 0.2, 0.4], dtype=torch.float64)
PAIRS = torch.tensor([[0, 5], [1, 4], [2, 7], [3, 6]])
LAYOUTS: list[Any] = ["halves", "interleaved", PAIRS]
ROWS = [PAIRS.new_tensor([[0, 4], [1, 5], [2, 6], [3, 7]]), torch.arange(B).view(4, 2), PAIRS]
SMALL = V * 8 * T * 2  # bytes, of the exponentials of a pair


def by_hand(rows: Tensor, beta: Tensor = BETA) -> tuple[Tensor, ...]:
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    logp = (hidden @ weight.T).log_softmax(-1).gather(-1, TARGET[..., None]).sum((-1, -2))
    ratio = logp - REF
    margin = beta * (ratio[rows[:, 0]] - ratio[rows[:, 1]])
    losses = torch.nn.functional.softplus(-margin) + SMOOTHING * margin
    inputs = [one for one in (hidden, weight, beta) if one.requires_grad]
    return losses.detach(), *torch.autograd.grad(losses.mean(), inputs)


def arguments(beta: Tensor = BETA, **changes: Any) -> dict[str, Any]:
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    given = {"hidden": hidden, "weight": weight, "target": TARGET, "objective": "dpo"}
    return given | {"ref_logps": REF, "beta": beta, "label_smoothing": SMOOTHING} | changes


def results(given: dict[str, Any]) -> tuple[Tensor, ...]:
    output = preference_loss(**given)
    inputs = [given[name] for name in ("hidden", "weight", "beta") if given[name].requires_grad]
    return output.losses, *torch.autograd.grad(output.loss, inputs)


@pytest.mark.parametrize("schedule", ["auto", "batches", "recompute"])
@pytest.mark.parametrize(("layout", "rows"), list(zip(LAYOUTS, ROWS, strict=True)))
def test_one_value_a_pair(layout: Any, rows: Tensor, schedule: Any) -> None:
    options = ScoringOptions(schedule=schedule, memory_budget=SMALL)
    given = arguments(layout=layout, options=options)
    for got, want in zip(results(given), by_hand(rows), strict=True):
        torch.testing.assert_close(got, want)
    if schedule == "batches":
        assert explain(**given).schedule == "batches"


def test_values_that_train_take_two_passes() -> None:
    beta = BETA.clone().requires_grad_()
    trained = arguments(beta, options=ScoringOptions(memory_budget=SMALL))
    for got, want in zip(results(trained), by_hand(ROWS[0], beta), strict=True):
        torch.testing.assert_close(got, want)
    forced = trained | {"options": ScoringOptions(schedule="batches", memory_budget=SMALL)}
    with pytest.raises(ValueError, match="parameters that need a gradient"):
        preference_loss(**forced)


@pytest.mark.heavy
def test_traced() -> None:
    given = arguments()

    def loss(hidden: Tensor, weight: Tensor, beta: Tensor) -> Tensor:
        return preference_loss(**(given | {"hidden": hidden, "weight": weight, "beta": beta})).loss

    inputs = (given["hidden"], given["weight"], BETA.clone().requires_grad_())
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    want = loss(*inputs)
    torch.testing.assert_close(found, want)
    gradients = (torch.autograd.grad(one, inputs) for one in (found, want))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)


def test_lists_and_responses() -> None:
    scores = {"scores": draw(2, 4)}
    lists = {"objective": "plackett_luce", "layout": "groups", "group_size": 4, "extras": scores}
    labels = {"labels": torch.arange(B) % 2 == 0}
    units = {"objective": "kto", "extras": labels | {"kl": torch.tensor(0.3)}}
    for changes, count in ((lists, 2), (units, B)):
        values = torch.linspace(0.1, 0.5, count, dtype=torch.float64)
        given = arguments(**changes)
        del given["label_smoothing"]
        found = preference_loss(**(given | {"beta": values})).losses
        alone = [preference_loss(**(given | {"beta": one})).losses for one in values.tolist()]
        want = torch.stack([losses[unit] for unit, losses in enumerate(alone)])
        torch.testing.assert_close(found, want)
