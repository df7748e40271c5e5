# SPDX-License-Identifier: Apache-2.0
"""What ``explain`` says of a call is what the call does: its products are counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import ScoringOptions, explain, linear_logprob, preference_loss
from fastpref.objectives import Objective, registry
from tests.preference.cases import B, T, configured, extras_of
from tests.scoring.operations import Operations

H, REF_H, V, RANK = 48, 80, 1500, 4
ROW = 4 * V  # bytes
SCHEDULES: dict[str, dict[str, Any]] = {
    "as chosen": {},
    "with little memory": {"memory_budget": B * T * ROW},
    "recompute": {"schedule": "recompute"},
}
HEADS = ("trained", "frozen", "updated")
COMPARING = ("tdpo", "epsilon_dpo")


class Call:
    """A call of ``preference_loss`` whose every token is scored and has a gradient."""

    def __init__(
        self, declared: Objective, head: str, reference: str, seed: int = 3, length: int = T
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float32)

        self.objective = configured(declared)
        # Responses alike: none is so good or bad that an objective leaves it alone.
        self.hidden, self.weight = draw(B, length, H), 0.01 * draw(V, H)
        self.target = torch.randint(V, (B, length), generator=generator)
        self.hidden.requires_grad_()
        self.weight.requires_grad_(head == "trained")
        self.given: dict[str, Any] = {}
        if head == "updated":
            a, b = draw(RANK, H).requires_grad_(), draw(V, RANK).requires_grad_()
            self.given["lora"] = a, b, 0.1
        if declared.unit == "list":
            self.given |= {"layout": "groups", "group_size": 4}
        extras = extras_of(declared)
        extras.pop("old_token_logp", None)  # on the policy itself nothing is clipped
        if declared.name == "mallows_po" and reference != "live":
            extras["ref_entropy"] = torch.linspace(0.2, 0.8, B // 2, dtype=torch.float32)
        if reference == "live":
            ref_hidden, ref_weight = draw(B, length, REF_H), 0.01 * draw(V, REF_H)
            self.given |= {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
            for name in ("chosen_kl", "rejected_kl", "margin_plus", "margin_minus"):
                extras.pop(name, None)
        elif reference == "log-probs":
            shape = (B, T) if declared.unit == "token" else (B,)
            per_token = math.log(V) + 0.01 * draw(*shape).abs()
            self.given["ref_logps"] = -per_token * (1 if declared.unit == "token" else T)
        self.given["extras"] = {name: one.float() for name, one in extras.items()}

    def arguments(self, **options: Any) -> dict[str, Any]:
        return self.given | {"options": ScoringOptions(**options)}

    def plan(self, **options: Any) -> Any:
        arguments = self.arguments(**options)
        return explain(self.hidden, self.weight, self.target, self.objective, **arguments)

    def flop(self, **options: Any) -> int:
        with Operations() as operations:
            arguments = self.arguments(**options)
            found = preference_loss(
                self.hidden, self.weight, self.target, self.objective, **arguments
            )
            found.loss.backward()
        return operations.flop


def references(declared: Objective) -> list[str]:
    if not declared.needs_reference:
        return ["none"]
    return ["live"] if declared.name in COMPARING else ["live", "log-probs"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("declared", registry.catalogue(), ids=lambda one: one.name)
def test_every_objective(declared: Objective, schedule: str) -> None:
    for head in HEADS:
        for reference in references(declared):
            # A row without gradient costs less; the plan knows those that never have one.
            for seed in range(40):
                call = Call(declared, head, reference, seed)
                flop = call.flop(**SCHEDULES[schedule])
                trained = call.hidden.grad.any(-1)
                if trained[: B // 2].all() and (declared.name == "sft" or trained.all()):
                    break
            else:
                pytest.fail("no batch where every row has a gradient")
            plan = call.plan(**SCHEDULES[schedule])
            inner = H + (RANK if head == "updated" else 0)
            found = flop / (2 * B * T * inner * V)
            said = plan.units - accumulated(plan)
            assert found == pytest.approx(said, rel=0.02), (head, reference, str(plan))


def accumulated(plan: Any) -> float:
    """What batches cost beside products, in u."""
    policy = plan.policy
    return policy.accumulation_units if policy.schedule == "batches" else 0.0


@pytest.mark.parametrize("name", COMPARING)
def test_both_models_are_projected_once(name: str) -> None:
    """A product of each, and one for each gradient; one less where the head is frozen."""
    declared = next(one for one in registry.catalogue() if one.name == name)
    for head, gradients in (("trained", 2), ("frozen", 1)):
        batches = {"schedule": "batches", "memory_budget": B * T * ROW}
        # Of running scope there are no batches.
        for options in ({},) if name == "epsilon_dpo" else ({}, batches):
            call = Call(declared, head, "live")
            found = call.flop(**options) / (2 * B * T * H * V)
            assert found == pytest.approx(1 + REF_H / H + gradients, rel=0.02)
    if name == "epsilon_dpo":
        # The policy alone is projected again.
        call = Call(declared, "trained", "live")
        found = call.flop(schedule="recompute") / (2 * B * T * H * V)
        assert found == pytest.approx(4 + REF_H / H, rel=0.02)


@pytest.mark.parametrize("budget", [1, 100, 250, 400, 600, 1000, 3000, 9000])
@pytest.mark.parametrize("head", HEADS)
def test_a_known_direction_needs_no_product_again(head: str, budget: int) -> None:
    """Whatever the budget, of rows of logits; to add up what pieces give takes less than one."""
    for length in (101, 151):
        check_known_direction(head, budget, length)


def check_known_direction(head: str, budget: int, length: int) -> None:
    call = Call(registry.registered("tdpo"), head, "live", length=length)
    options = {"memory_budget": budget * ROW}
    plan, inner = call.plan(**options), H + (RANK if head == "updated" else 0)
    found = call.flop(**options) / (2 * B * length * inner * V)
    trained = {"trained": 1.0, "frozen": 0.0, "updated": RANK / inner}[head]
    assert found == pytest.approx(1 + REF_H / inner + 1 + trained, rel=0.02)
    assert plan.units - accumulated(plan) == pytest.approx(found, rel=0.02)
    assert accumulated(plan) <= 1
    if head == "trained" and budget == 1:
        # Four groups, in two pieces each and once more where they have more than 300 rows.
        times = 3 if length == 151 else 1
        assert accumulated(plan) == 4 * times * 100 / (B * length)


@pytest.mark.parametrize("length", [70, 145, 155, 700])
@pytest.mark.parametrize("budget", [430, 500, 560, 1200])
def test_pieces_and_tiles_stay_within_the_budget(budget: int, length: int) -> None:
    call = Call(registry.registered("tdpo"), "trained", "live", length=length)
    policy = call.plan(memory_budget=budget * ROW, schedule="batches").policy
    for one in policy.plans:
        assert one.scored + 2 * one.forward_tile.rows <= budget
    assert policy.in_pieces == (2 * length > budget - 128)


@pytest.mark.parametrize("budget", [None, 3 * 4 * V])
@pytest.mark.parametrize("head", HEADS)
def test_scores(head: str, budget: int | None) -> None:
    declared = next(one for one in registry.catalogue() if one.name == "dpo")
    call = Call(declared, head, "log-probs")
    given = {"lora": call.given.get("lora"), "options": ScoringOptions(memory_budget=budget)}
    plan = explain(call.hidden, call.weight, call.target, **given)
    with Operations() as operations:
        linear_logprob(call.hidden, call.weight, call.target, **given).logp.sum().backward()
    unit = 2 * B * T * (H + RANK * (head == "updated")) * V
    assert operations.flop / unit == pytest.approx(plan.units, rel=0.02)
