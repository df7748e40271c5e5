# SPDX-License-Identifier: Apache-2.0
"""Scores of a policy and a reference, and what is made of both, from the same tiles."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import ScoringOptions
from fastpref.scoring import autograd
from fastpref.scoring.api import ask
from fastpref.scoring.backward import backward
from fastpref.scoring.forward import Run, forward
from fastpref.scoring.head import Model
from fastpref.scoring.operators import WITH_DIVERGENCE, WITH_MIXTURE
from fastpref.scoring.plan import choose
from fastpref.scoring.request import Call, make_request, plan_target
from fastpref.scoring.rules.compared import AlongDirection, WithDivergence, WithMixture
from fastpref.scoring.rules.scores import Scores
from fastpref.scoring.statistics import OUTPUTS
from tests.scoring.cases import BACKENDS, Case, check_contract, make_case
from tests.scoring.operations import Operations

N, H, REF_H, V = 150, 24, 40, 1100
EPSILON = 0.3
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MATRIX = N * V  # elements
SCHEDULES: dict[str, dict[str, Any]] = {
    "all kept": {},
    "kept in part": {"memory_budget": 3 * MATRIX},
    "recomputed": {"schedule": "recompute", "memory_budget": MATRIX},
}
NEEDS = {
    "both": ("hidden", "weight", "bias"),
    "frozen": ("hidden",),
    "weight alone": ("weight",),
    "nothing": (),
}
RULES = {
    "divergence": WithDivergence(Scores(("logp",), ("logp",)), Scores(("logp", "entropy"), ())),
    "mixture": WithMixture(Scores(("logp", "lse"), ("logp",)), Scores(("logp",), ()), EPSILON),
}


@dataclass
class Both:
    """A policy and its reference of another hidden size."""

    dtype: torch.dtype = torch.float64
    needs: tuple[str, ...] = NEEDS["both"]
    features: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = {"rows": N, "vocab": V, "bias": True, "ignored": 0.2} | self.features
        self.policy = make_case(hidden=H, dtype=self.dtype, **given)
        self.reference = make_case(hidden=REF_H, dtype=self.dtype, seed=1, **given)
        generator = torch.Generator().manual_seed(2)
        self.upstream = torch.randn(2, N, generator=generator, dtype=torch.float64)
        # Some rows have a gradient at one alone, some have none.
        self.upstream[0, ::5] = 0
        self.upstream[1, ::3] = 0

    def leaves(self, case: Case) -> dict[str, Tensor]:
        return {
            name: getattr(case, name).detach().clone().requires_grad_(name in self.needs)
            for name in ("hidden", "weight", "bias")
        }

    def asked(self, leaves: dict[str, Tensor], lora: Any = None) -> list[Model]:
        target, other = self.policy.target, self.reference
        one = ask(
            leaves["hidden"],
            leaves["weight"],
            target,
            bias=leaves["bias"],
            lora=lora,
            **self.policy.map,
        )
        ref = ask(other.hidden, other.weight, target, bias=other.bias, **self.policy.map)
        return [one.models[0], ref.models[0]]

    def call(self, rule: Any, models: list[Model], **options: Any) -> Call:
        request = make_request(models, ignore_index=-100, options=ScoringOptions(**options))
        value = self.policy.map.get("temperature")
        by_row = value if isinstance(value, Tensor) else None
        return plan_target(request, rule, models, self.policy.target, temperature=by_row)

    def found(self, name: str, **options: Any) -> dict[str, Tensor]:
        leaves, rule = self.leaves(self.policy), RULES[name]
        models = self.asked(leaves)
        outputs = autograd.run(self.call(rule, models, **options), models)
        named = dict(zip(rule.output_names, outputs, strict=True))
        return self._with_gradients(name, {one: named[one] for one in rule.outputs}, leaves)

    def _with_gradients(
        self, name: str, named: dict[str, Tensor], leaves: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found = {one: value.detach() for one, value in named.items()}
        if self.needs:
            g = self.upstream.to(named["logp"].dtype)
            loss = (named["logp"] * g[0]).sum()
            if name == "divergence":
                loss = loss + (named["kl"] * g[1]).sum()
            loss.backward()
            found |= {f"d {one}": leaves[one].grad for one in self.needs}
        return found

    def plain(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = self.leaves(self.policy.to(dtype))
        wide = torch.promote_types(dtype, torch.float32)
        other, map = self.reference.to(dtype), self.policy.map

        def logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            z = ((hidden @ weight.t()).to(wide) + bias.to(wide)) * map.get("logit_scale", 1.0)
            if map.get("softcap"):
                z = map["softcap"] * torch.tanh(z / map["softcap"])
            return z / self.policy.to(dtype).temperature

        s = logits(*leaves.values())
        t = logits(other.hidden, other.weight, other.bias)
        index = self.policy.target.clamp(min=0)[:, None]

        def own(values: Tensor) -> Tensor:
            return values.log_softmax(-1).gather(-1, index)[:, 0]

        log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
        named = {"logp": own(s), "ref_logp": own(t)}
        if name == "divergence":
            named["kl"] = (log_p.exp() * (log_p - log_q)).sum(-1)
            named["ref_entropy"] = -(log_p.exp() * log_p).sum(-1)
        else:
            named["lse"] = s.logsumexp(-1)
            named["plus"] = own((1 + EPSILON) * s - EPSILON * t)
            named["minus"] = own((1 - EPSILON) * s + EPSILON * t)
        scored = self.policy.scored
        named = {one: torch.where(scored, value, 0) for one, value in named.items()}
        return self._with_gradients(name, named, leaves)

    def check(self, name: str, found: dict[str, Tensor]) -> None:
        check_contract(found, self.plain(name, self.dtype), self.plain(name, torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RULES)
def test_numbers(name: str, schedule: str, dtype: torch.dtype, backend: str) -> None:
    for needs in NEEDS.values():
        both = Both(dtype, needs)
        given = dict(SCHEDULES[schedule])
        if "memory_budget" in given:
            given["memory_budget"] *= dtype.itemsize
        both.check(name, both.found(name, backend=backend, **given))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("temperature", [{"temperature": 1.4}, {"uneven": True}], ids=str)
def test_the_map_of_logits(
    temperature: dict[str, Any], schedule: str, name: str, backend: str
) -> None:
    """A row's own temperature is that of both models."""
    features = {"softcap": 9.0, "logit_scale": 0.7} | temperature
    both = Both(torch.float32, features=features)
    given = dict(SCHEDULES[schedule])
    if "memory_budget" in given:
        given["memory_budget"] *= 4
    both.check(name, both.found(name, backend=backend, **given))


@pytest.mark.parametrize("name", RULES)
def test_a_low_rank_update(name: str) -> None:
    """As the weight that it makes."""
    both = Both(needs=("hidden",))
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, H), (V, 3)))
    rule = RULES[name]
    found = []
    for updated in (True, False):
        leaves = both.leaves(both.policy)
        if not updated:
            leaves["weight"] = leaves["weight"] + 0.3 * b @ a
        models = both.asked(leaves, (a, b, 0.3) if updated else None)
        outputs = autograd.run(both.call(rule, models), models)
        named = dict(zip(rule.output_names, outputs, strict=True))
        named = {one: named[one] for one in rule.outputs}
        found.append(both._with_gradients(name, named, leaves))
    for one, value in found[0].items():
        torch.testing.assert_close(value, found[1][one], msg=one)


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RULES)
def test_products_are_what_the_plan_says(name: str, schedule: str, needs: str) -> None:
    both = Both(torch.float32, NEEDS[needs])
    both.upstream.fill_(1.0)
    given = dict(SCHEDULES[schedule])
    if "memory_budget" in given:
        given["memory_budget"] *= 4
    plan = both.call(RULES[name], both.asked(both.leaves(both.policy)), **given).plan
    with Operations() as operations:
        both.found(name, **given)
    unit = 2 * plan.scored * H * V
    assert operations.flop / unit == pytest.approx(plan.units)
    if schedule == "all kept" and needs == "both":
        assert plan.units == pytest.approx(3 + REF_H / H)
    if schedule == "recomputed" and needs == "both":
        again = REF_H / H if name == "divergence" else 0
        assert plan.units == pytest.approx(4 + REF_H / H + again)


def test_backward_twice() -> None:
    """The kept matrices are combined elsewhere than where they lie."""
    both = Both(torch.float32)
    leaves = both.leaves(both.policy)
    models = both.asked(leaves)
    outputs = autograd.run(both.call(RULES["divergence"], models), models)
    named = dict(zip(RULES["divergence"].output_names, outputs, strict=True))
    loss = (named["logp"] * both.upstream[0]).sum() + (named["kl"] * both.upstream[1]).sum()
    once = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    again = torch.autograd.grad(loss, list(leaves.values()))
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("schedule", ["keep", "direct", "recompute"])
def test_along_a_direction(schedule: str, dtype: torch.dtype, backend: str) -> None:
    """One matrix of a row has the gradient of both, by a factor that comes later."""
    needs = NEEDS["frozen" if schedule == "direct" else "both"]
    both = Both(dtype, needs, {"uneven": True, "softcap": 9.0})
    leaves, rule = both.leaves(both.policy), RULES["divergence"]
    directed = AlongDirection(rule.policy, rule.reference)
    models = [one.detached() for one in both.asked(leaves)]
    call = both.call(rule, both.asked(leaves), schedule=schedule, backend=backend)
    heads, rows = call.heads(models), [call.rows(one) for one in models]
    upstream: list[Tensor | None] = [None] * len(rule.output_names)
    g = call.packing.gather(both.upstream.t()).t().to(call.row_factor().dtype)  # type: ignore[union-attr]
    upstream[0], upstream[2 * len(OUTPUTS)] = g[0].contiguous(), g[1].contiguous()
    length = torch.linspace(-3, 2, g.shape[1], dtype=g.dtype)
    longer = [None if one is None else one * length for one in upstream]
    target, factor = call.packing.gather(both.policy.target), call.row_factor()
    found = []
    for own, direction in ((rule, None), (directed, AlongDirection.direction(upstream))):
        plan = call.plan
        if own is directed and schedule != "recompute":
            plan = choose(replace(plan, matrices=1, directed=True), call.request.options)
        run = Run(own, heads, plan)
        outputs, kept = forward(run, rows, target, factor, direction)
        gradients = backward(run, rows, kept, longer, dtype)
        found.append([*outputs, *gradients])
    digits = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=digits, atol=digits)


def test_directions() -> None:
    upstream: list[Tensor | None] = [None] * len(WithDivergence.output_names)
    upstream[0] = torch.tensor([0.0, 2.0, -2.0, 1e-30, 0.0])
    upstream[2 * len(OUTPUTS)] = torch.tensor([0.0, 0.0, 1.0, -1.0, 3.0])
    logp, kl = AlongDirection.direction(upstream)
    assert logp.tolist() == [1, 1, 1, torch.tensor(-1e-30).item(), 0]
    assert kl.tolist() == [0, 0, -0.5, 1, 1]
    (factor,) = AlongDirection(RULES["divergence"].policy, RULES["divergence"].reference).factors(
        None,
        [logp],
        upstream,  # type: ignore[arg-type]
    )
    assert factor.tolist() == [0, 2, -2, -1, 3]


@pytest.mark.heavy
@pytest.mark.parametrize("name", RULES)
def test_traced(name: str) -> None:
    """The operator gives what the engine gives, and opcheck passes."""
    both = Both(needs=("hidden", "weight"))
    operators = WITH_DIVERGENCE if name == "divergence" else WITH_MIXTURE
    models, rule = both.asked(both.leaves(both.policy)), RULES[name]
    request = make_request(models, ignore_index=-100, options=ScoringOptions())
    arguments = request, rule, models, both.policy.target
    found = operators.run(*arguments)
    expected = autograd.run(plan_target(*arguments), models)
    for one, value, wanted in zip(rule.output_names, found, expected, strict=True):
        if one in rule.outputs:
            assert torch.equal(value, wanted)
    torch.library.opcheck(operators.operator.default, operators.arguments(*arguments))
