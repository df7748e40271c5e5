# SPDX-License-Identifier: Apache-2.0
"""preference_loss on two ranks, over which tokens, vocabulary or pairs are spread, against one
process."""

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastpref import ScoringOptions, explain, preference_loss
from tests.preference.two_models import pieces_of
from tests.ranks import Ranks

pytestmark = pytest.mark.heavy

B, T, H, V, RANK = 8, 8, 5, 22, 2
BATCHES = ScoringOptions(schedule="batches", memory_budget=V * 8 * T * 2)
LEAST = ScoringOptions(schedule="batches", memory_budget=1)
TEMPERATURE = torch.linspace(0.4, 1.8, B * T, dtype=torch.float64).view(B, T)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tokens": ("seq_group", "dpo", {}),
    "tokens, lengths": ("seq_group", "simpo", {}),
    "tokens, weights of 0": ("seq_group", "simpo", {"weighted": True}),
    "tokens, no memory": ("seq_group", "dpo", {"options": ScoringOptions(memory_budget=1)}),
    "vocabulary": ("tp_group", "dpo", {}),
    "vocabulary, batches": ("tp_group", "dpo", {"options": BATCHES}),
    "vocabulary, entropy of the reference": ("tp_group", "mallows_po", {}),
    "vocabulary, updated head": ("tp_group", "dpo", {"updated": True}),
    "vocabulary, divergence": ("tp_group", "tdpo", {}),
    "vocabulary, divergence, batches": ("tp_group", "tdpo", {"options": BATCHES}),
    "vocabulary, divergence, pieces": ("tp_group", "tdpo", {"options": LEAST, "rows": 3}),
    "vocabulary, divergence, recomputed": (
        "tp_group",
        "tdpo",
        {"options": ScoringOptions(schedule="recompute")},
    ),
    "vocabulary, mixture": ("tp_group", "epsilon_dpo", {}),
    "vocabulary, temperatures": ("tp_group", "dpo", {"temperature": TEMPERATURE}),
    "vocabulary, temperatures, batches": (
        "tp_group",
        "dpo",
        {"temperature": TEMPERATURE, "softcap": 3.0, "options": BATCHES},
    ),
    "vocabulary, temperatures, divergence": ("tp_group", "tdpo", {"temperature": TEMPERATURE}),
    "pairs": ("dp_group", "aot", {}),
}


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = torch.randint(V, (B, T), generator=generator)
    target[torch.rand(B, T, generator=generator) < 0.3] = -100
    return {
        "hidden": draw(B, T, H),
        "weight": draw(V, H),
        "target": target,
        "bias": draw(V),
        "ref_hidden": draw(B, T, H),
        "ref_weight": draw(V, H),
        "ref_bias": draw(V),
        "a": draw(RANK, H),
        "b": draw(V, RANK),
        "token_weights": draw(B, T).relu(),  # half of them 0
    }


def own_part(given: dict[str, Tensor], spread: str, rank: int) -> dict[str, Tensor]:
    tokens, columns = slice(rank * T // 2, (rank + 1) * T // 2), slice(rank * 9, 9 + rank * V)
    pairs = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7]][rank])
    part = dict(given)
    for name, value in given.items():
        if spread == "seq_group" and value.shape[:2] == (B, T):
            part[name] = value[:, tokens]
        if spread == "tp_group" and value.shape[0] == V:
            part[name] = value[columns]
        if spread == "dp_group" and value.shape[0] == B:
            part[name] = value[pairs]
    return part


def loss_and_gradients(given: dict[str, Tensor], name: str, **changes: Any) -> dict[str, Tensor]:
    _, objective, settings = CASES[name]
    given, settings = dict(given), dict(settings)
    updated = settings.pop("updated", False)
    if not settings.pop("weighted", False):
        del given["token_weights"]
    wanted = ["hidden", "bias", *(("a", "b") if updated else ("weight",))]
    leaves = [given[one].requires_grad_() for one in wanted]
    a, b = given.pop("a"), given.pop("b")
    if objective == "simpo":
        given = {key: value for key, value in given.items() if not key.startswith("ref_")}
    if updated:
        settings["lora"] = (a, b, 0.7)
    rows = settings.pop("rows", None)
    with contextlib.nullcontext() if rows is None else pieces_of(rows):
        output = preference_loss(**given, objective=objective, **settings, **changes)
    found = dict(zip(wanted, torch.autograd.grad(output.loss, leaves), strict=True))
    return {"losses": output.losses, "logps": output.logps.detach()} | found


def on_a_rank(rank: int, name: str) -> dict[str, Tensor]:
    spread = CASES[name][0]
    return loss_and_gradients(own_part(batch(), spread, rank), name, **{spread: dist.group.WORLD})


@pytest.mark.parametrize("name", [name for name in CASES if name != "pairs"])
def test_as_one_process(two_ranks: Ranks, name: str) -> None:
    spread, whole = CASES[name][0], loss_and_gradients(batch(), name)
    ranks = two_ranks(on_a_rank, name)
    for rank, results in enumerate(ranks):
        for key in ("losses", "logps"):
            torch.testing.assert_close(results[key], whole[key])
        parts = {key: whole[key] for key in whole if key not in ("losses", "logps")}
        parts = own_part(parts, spread, rank)
        for key, want in parts.items():
            summed = spread == "seq_group" and key != "hidden"
            got = sum(one[key] for one in ranks) if summed else results[key]
            torch.testing.assert_close(got, want)


def test_statistics_of_all_pairs(two_ranks: Ranks) -> None:
    """Each rank has its pairs of the losses, which are sorted over both."""
    whole = loss_and_gradients(batch(), "pairs")
    found = torch.cat([one["losses"] for one in two_ranks(on_a_rank, "pairs")])
    torch.testing.assert_close(found.sort().values, whole["losses"].sort().values)


def share_with_a_gradient(rank: int) -> tuple[float, float]:
    """As planned for an objective that trains no rejected response, and as it is."""
    given = own_part(batch(), "seq_group", rank)
    hidden, weight, target = (given[one] for one in ("hidden", "weight", "target"))
    plan: Any = explain(
        hidden.requires_grad_(), weight.requires_grad_(), target, "sft", seq_group=dist.group.WORLD
    )
    scored = target != -100
    return plan.policy.active, int(scored[: B // 2].sum()) / int(scored.sum())


def test_the_plan_counts_the_ranks_own_tokens(two_ranks: Ranks) -> None:
    for planned, own in two_ranks(share_with_a_gradient):
        assert planned == own
