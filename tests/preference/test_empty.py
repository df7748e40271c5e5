# SPDX-License-Identifier: Apache-2.0
"""preference_loss of no rows, of rows without tokens, and of packed rows without any: 0, still
connected to the graph, with metrics that are 0."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import PreferenceOutput, ScoringOptions, objectives, preference_loss
from fastpref.objectives import registry
from tests.preference.cases import LAYOUTS, H, V, configured, extras_of

METRICS = ("entropy", "mean_logits", "accuracy")


class Empty:
    """Leaves and arguments of a call on no tokens."""

    def __init__(self, objective: objectives.Objective, *shape: int, packed_rows: int = 0) -> None:
        self.leaves = [torch.randn(*size, requires_grad=True) for size in ((*shape, H), (V, H))]
        self.target, self.objective = torch.zeros(shape, dtype=torch.int64), objective
        self.given: dict[str, Any] = {"outputs": METRICS}
        if len(shape) == 1:
            self.given["cu_seqlens"] = torch.zeros(packed_rows + 1, dtype=torch.int64)
        if objective.needs_reference:
            self.given["ref_hidden"] = torch.randn(*shape, H)
        if objective.unit == "list":
            self.given |= {"layout": "groups", "group_size": 4}

    def run(self, **changes: Any) -> PreferenceOutput:
        """The loss of nothing, whose gradients are 0."""
        hidden, weight = self.leaves
        output = preference_loss(
            hidden, weight, self.target, self.objective, **(self.given | changes)
        )
        assert output.loss.requires_grad
        for gradient in torch.autograd.grad(output.loss.sum(), self.leaves):
            assert not gradient.any()
        for name, value in output.metrics.items():
            assert value.isfinite(), name
        return output


def without_rows(objective: objectives.Objective) -> dict[str, Tensor]:
    """The extras of no rows."""
    given = extras_of(objective)
    given.pop("old_token_logp", None)
    return {name: value[:0] if value.dim() else value for name, value in given.items()}


@pytest.mark.parametrize("declared", registry.catalogue(), ids=lambda one: one.name)
def test_no_rows(declared: objectives.Objective) -> None:
    objective, extras = configured(declared), without_rows(declared)
    output = Empty(objective, 0, 5).run(extras=extras)
    assert output.loss == 0 and output.loss.dim() == 0
    assert not any(output.metrics.values())
    assert output.losses.shape == output.logps.shape == output.rewards.shape == (0,)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("schedule", ["auto", "recompute", "batches"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (0,)])
def test_layouts_and_reductions(
    shape: tuple[int, ...], schedule: str, reduction: str, layout: str
) -> None:
    given = torch.zeros(0, 2, dtype=torch.int64) if layout == "index" else layout
    if (schedule, reduction) == ("batches", "none"):
        schedule = "keep"
    options = ScoringOptions(schedule=schedule)
    empty = Empty(objectives.get("dpo"), *shape)
    loss = empty.run(layout=given, reduction=reduction, options=options).loss
    assert loss.shape == ((0,) if reduction == "none" else ()) and not loss.any()
    if reduction != "none":
        assert empty.run(layout=given, reduction=reduction, denominator=3.0).loss == 0


@pytest.mark.parametrize("name", ["dpo", "simpo", "kto", "lipo", "grpo"])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_without_tokens(packed: bool, name: str) -> None:
    """Are like rows of which none is scored."""
    objective = objectives.get(name)
    if packed and objective.unit == "token":
        packed = False
    extras = extras_of(objective)
    extras.pop("old_token_logp", None)
    empty = Empty(objective, 0, packed_rows=8) if packed else Empty(objective, 8, 0)
    unscored = Empty(objective, 8, 3)
    unscored.target.fill_(-100)
    got, want = (one.run(extras=extras) for one in (empty, unscored))
    assert torch.equal(got.losses, want.losses) and torch.equal(got.loss, want.loss)
    assert got.metrics == want.metrics
