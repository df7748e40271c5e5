# SPDX-License-Identifier: Apache-2.0
"""preference_loss at a temperature for each token or row: as with hidden states divided by it, in
every schedule and for what compares whole distributions."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import ScoringOptions, explain, objectives, preference_loss
from tests.preference.cases import B, Data, H, T, V

GIVEN = {
    "whole": {},
    "recompute": {"schedule": "recompute"},
    "batches": {"schedule": "batches", "memory_budget": 3 * T * V * 8},
}
NAMES = ["dpo", "simpo", "tdpo", "epsilon_dpo", "mallows_po"]


def temperatures(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return 0.3 + 1.7 * torch.rand(*shape, generator=generator, dtype=torch.float64)


def results(data: Data, name: str, by: Tensor | None, **given: Any) -> list[Tensor]:
    """Loss, log-probs and gradients, at temperatures (B, T); ``by`` divides the hidden states
    instead."""
    objective = objectives.get(name)
    models = {"hidden": data.hidden, "ref_hidden": data.ref_hidden}
    if by is not None:
        # NaN where nothing is scored stays there.
        models = {name: one / by[..., None] for name, one in models.items()}
    if not objective.needs_reference:
        del models["ref_hidden"]
    else:
        given["ref_weight"] = data.ref_weight
    output = preference_loss(
        weight=data.weight, target=data.target, objective=objective, **models, **given
    )
    leaves = [data.hidden, data.weight]
    gradients = torch.autograd.grad(1.3 * output.loss + output.logps.sum(), leaves)
    gradients = (gradients[0].masked_fill(~data.scored[..., None], 0), gradients[1])
    return [output.loss.detach(), output.losses, output.logps.detach(), *gradients]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", GIVEN)
def test_as_of_hidden_states_divided_by_it(schedule: str, name: str) -> None:
    data, temperature = Data(), temperatures(B, T)
    options = ScoringOptions(**GIVEN[schedule])
    if schedule == "batches" and name == "epsilon_dpo":
        options = ScoringOptions(memory_budget=1)
    own = temperature.masked_fill(~data.scored, 0)
    found = results(data, name, None, temperature=own, options=options)
    torch.testing.assert_close(found, results(data, name, temperature))


def test_one_a_row_and_a_number() -> None:
    data, rows = Data(), temperatures(B, 1)
    whole = results(data, "dpo", None, temperature=rows.expand(B, T).contiguous())
    torch.testing.assert_close(results(data, "dpo", None, temperature=rows), whole)
    equal = results(data, "tdpo", None, temperature=torch.full((B, T), 0.7))
    number = results(data, "tdpo", None, temperature=0.7)
    torch.testing.assert_close(equal, number, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", ["(N,)", "(1, N)"])
def test_packed(shape: str) -> None:
    data, temperature = Data(), temperatures(B, T)
    boundaries = T * torch.arange(B + 1)
    rows = (1, B * T) if shape == "(1, N)" else (B * T,)
    given: dict[str, Any] = {"weight": data.weight, "objective": "dpo", "cu_seqlens": boundaries}
    packed = preference_loss(
        data.hidden.view(*rows, H),
        target=data.target.view(rows),
        ref_hidden=data.ref_hidden.view(*rows, -1),
        ref_weight=data.ref_weight,
        temperature=temperature.view(rows),
        **given,
    )
    whole = results(data, "dpo", None, temperature=temperature)
    torch.testing.assert_close([packed.loss.detach(), packed.losses], whole[:2])


def test_a_token_without_weight_may_have_any() -> None:
    data = Data()
    weights = (temperatures(B, T) > 1).double()
    temperature = temperatures(B, T).masked_fill(weights == 0, 0)
    found = results(data, "dpo", None, temperature=temperature, token_weights=weights)
    assert all(one.isfinite().all() for one in found)
    with pytest.raises(ValueError, match=r"temperature must be greater than 0.*got 0\.0"):
        results(data, "dpo", None, temperature=temperature)


def test_explained_as_it_runs() -> None:
    data = Data()
    given = data.hidden, data.weight, data.target, "simpo"
    plan = explain(*given, temperature=temperatures(B, T))
    assert plan == explain(*given)
    with pytest.raises(ValueError, match=r"broadcast to the shape of target, \(8, 7\); got \(8,\)"):
        explain(*given, temperature=temperatures(B))
    trained = temperatures(B, T).requires_grad_()
    with pytest.raises(ValueError, match=r"pass temperature.detach\(\)"):
        preference_loss(*given, temperature=trained)
