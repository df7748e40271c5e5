# SPDX-License-Identifier: Apache-2.0
"""The error of preference_loss against float64, next to that of plain torch at the same dtype."""

import pytest
import torch
from torch import Tensor

from fastpref import ScoringOptions, objectives, preference_loss
from tests.scoring.cases import check_contract

B, T, H, V = 12, 24, 48, 700
NAMES = ("hidden", "weight", "ref_hidden", "ref_weight")
OPTIONS = {
    "kept": {},
    "recomputed": {"schedule": "recompute"},
    "batches": {"schedule": "batches", "memory_budget": 3 * T * V * 4},
    "least": {"schedule": "batches", "memory_budget": 1},
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Float16 waits for a loss scaler and takes no batches.
CASES = [
    (dtype, name)
    for dtype in DTYPES
    for name, options in OPTIONS.items()
    if dtype != torch.float16 or options.get("schedule") != "batches"
]


def batch(dtype: torch.dtype) -> dict[str, Tensor]:
    """Likely tokens, as of a trained model, in the dtype's own values."""
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(V, H, generator=generator) * H**-0.5
    target = torch.randint(V, (B, T), generator=generator)
    hidden = torch.randn(B, T, H, generator=generator) + 4 * weight[target]
    noise = torch.randn(B, T, H, generator=generator)
    models = hidden, weight, hidden + 0.2 * noise, weight
    target[torch.rand(B, T, generator=generator) < 0.4] = -100
    return dict(zip(NAMES, (one.to(dtype) for one in models), strict=True)) | {"target": target}


def plain(given: dict[str, Tensor], objective: str) -> tuple[Tensor, Tensor]:
    target = given["target"]

    def sums(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        logits = hidden @ weight.t()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        picked = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
        return torch.where(target < 0, 0, picked).sum(1)

    policy = sums(given["hidden"], given["weight"])
    reference = sums(given["ref_hidden"], given["ref_weight"]).detach()
    function = objectives.get(objective)
    return function(*policy.chunk(2), *reference.chunk(2)).losses.mean(), policy


def found(loss: Tensor, logps: Tensor, given: dict[str, Tensor], upstream: float):
    leaves = [given["hidden"], given["weight"]]
    gradients = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))
    names = ("d hidden", "d weight")
    results = dict(zip(names, gradients, strict=True))
    return {"loss": loss.detach()[None], "logps": logps.detach()} | results


@pytest.mark.parametrize("dtype, options", CASES, ids=str)
@pytest.mark.parametrize("objective", ["dpo", "apo_zero"])
@pytest.mark.parametrize("upstream", [1.0, -3.7])
def test_error(dtype: torch.dtype, options: str, objective: str, upstream: float) -> None:
    given = batch(dtype)
    exact = {name: one.double() if one.is_floating_point() else one for name, one in given.items()}
    for one in (given, exact):
        one["hidden"].requires_grad_()
        one["weight"].requires_grad_()
    output = preference_loss(
        **given, objective=objective, options=ScoringOptions(**OPTIONS[options])
    )
    check_contract(
        found(output.loss, output.logps, given, upstream),
        found(*plain(given, objective), given, upstream),
        found(*plain(exact, objective), exact, upstream),
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_bits_are_the_same_every_time(options: str) -> None:
    given = batch(torch.float32)
    given["hidden"].requires_grad_()
    given["weight"].requires_grad_()
    runs = []
    for _ in range(2):
        chosen = ScoringOptions(**OPTIONS[options])
        output = preference_loss(**given, objective="dpo", options=chosen)
        runs.append(found(output.loss, output.logps, given, 1.0))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
