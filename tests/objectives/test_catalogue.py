# SPDX-License-Identifier: Apache-2.0
"""What every objective of the catalogue must hold, drawn from its own signature."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref import objectives
from fastpref.objectives.signature import POLICY_LOGPS

P = 4
COUNTS = st.lists(st.integers(0, 4000), min_size=P, max_size=P)
LOGPS = st.lists(st.floats(-1e4, 0, width=32), min_size=P, max_size=P)
NAMES = objectives.names()


def draw_hyperparameter(draw, fact):
    if fact.choices is not None:
        return draw(st.sampled_from(fact.choices))
    low, high = max(fact.domain.low, -20.0), min(fact.domain.high, 20.0)
    values = st.floats(low, high).filter(fact.domain.contains)
    return draw(values.filter(lambda value: value == 0 or abs(value) > 1e-3))


def draw_extra(draw, name):
    if name.endswith("lengths"):
        return torch.tensor(draw(COUNTS))
    if name == "chosen_nll":
        return -torch.tensor(draw(LOGPS))
    raise NotImplementedError(f"no strategy for the extra {name}")


@st.composite
def configured(draw, name):
    """An objective with drawn hyperparameters and extras."""
    facts = objectives.get(name).signature
    hyperparameters = {
        key: draw_hyperparameter(draw, fact) for key, fact in facts.hyperparameters.items()
    }
    extras = {key: draw_extra(draw, key) for key in facts.extras}
    return objectives.get(name, **hyperparameters), extras


def shaped(objective, rows, **kwargs):
    count = POLICY_LOGPS[objective.unit] * (2 if objective.needs_reference else 1)
    return [torch.tensor(row, **kwargs) for row in rows[:count]]


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data(), rows=st.lists(LOGPS, min_size=4, max_size=4))
@settings(max_examples=100, deadline=None)
def test_finite_in_fp32(name, data, rows):
    objective, extras = data.draw(configured(name))
    logps = shaped(objective, rows, dtype=torch.float32, requires_grad=True)
    result = objective(*logps, **extras)
    assert result.losses.dtype == torch.float32 and result.losses.shape == (P,)
    assert not any(reward.requires_grad for reward in result[1:])
    assert all(torch.isfinite(value).all() for value in result)
    if result.losses.requires_grad:
        gradients = torch.autograd.grad(result.losses.sum(), logps, allow_unused=True)
        assert all(torch.isfinite(g).all() for g in gradients if g is not None)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    objective = objectives.get(name)
    generator = torch.Generator().manual_seed(0)
    rows = (-30 * torch.rand(4, P, generator=generator, dtype=torch.float64)).tolist()
    extras = {key: torch.tensor([1, 7, 3, 12]) for key in objective.extras if "lengths" in key}
    logps = shaped(objective, rows, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: objective(*x, **extras).losses, logps)


def outside(fact):
    """Values that miss the domain by nothing, by an ulp, or by far."""
    if fact.choices is not None:
        return ["no such choice"]
    domain = fact.domain
    ends = [end for end in (domain.low, domain.high) if end not in domain.includes]
    below = [] if domain.low == -math.inf else [math.nextafter(domain.low, -math.inf)]
    return [math.nan, *ends, *below]


OUTSIDE = [
    pytest.param(name, key, value, id=f"{name}-{key}-{value}")
    for name in NAMES
    for key, fact in objectives.get(name).signature.hyperparameters.items()
    for value in outside(fact)
]


@pytest.mark.parametrize(("name", "key", "value"), OUTSIDE)
def test_domain_is_checked_by_get_and_by_the_function(name, key, value):
    with pytest.raises(ValueError, match=f"{name}: {key} must be"):
        objectives.get(name, **{key: value})
    objective = objectives.get(name)
    logps = shaped(objective, torch.zeros(4, P).tolist())
    extras = {extra: torch.ones(P) for extra in objective.extras}
    with pytest.raises(ValueError, match=f"{name}: {key} must be"):
        getattr(objectives, name)(*logps, **extras, **{key: value})


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_needed_or_refused(name):
    objective = objectives.get(name)
    policy = [torch.zeros(P)] * POLICY_LOGPS[objective.unit]
    extras = {extra: torch.ones(P) for extra in objective.extras}
    function = getattr(objectives, name)
    if objective.needs_reference:
        with pytest.raises(ValueError, match="pass zeros for a uniform reference"):
            function(*policy, **extras)
        with pytest.raises(ValueError, match="pass zeros for a uniform reference"):
            objective(*policy, policy[0], **extras)
    else:
        with pytest.raises(ValueError, match="takes no reference"):
            function(*policy, *policy, **extras)
        function(*policy, *[None] * len(policy), **extras)


@pytest.mark.parametrize("name", NAMES)
def test_function_and_objective_agree(name):
    objective = objectives.get(name)
    logps = shaped(objective, torch.linspace(-9, -1, 4 * P).view(4, P).tolist())
    extras = {extra: torch.arange(1.0, P + 1) for extra in objective.extras}
    direct = getattr(objectives, name)(*logps, **extras)
    for got, expected in zip(objective(*logps, **extras), direct, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_fp32(name):
    objective = objectives.get(name)
    logps = [
        t.bfloat16() for t in shaped(objective, torch.linspace(-300, -1, 4 * P).view(4, P).tolist())
    ]
    extras = {extra: torch.arange(1.0, P + 1) for extra in objective.extras}
    for got, expected in zip(
        objective(*logps, **extras), objective(*[t.float() for t in logps], **extras), strict=True
    ):
        assert got.dtype == torch.float32 and torch.equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_extras_get_no_gradient_unless_declared(name):
    objective = objectives.get(name)
    logps = shaped(objective, torch.full((4, P), -3.0).tolist(), requires_grad=True)
    extras = {key: torch.full((P,), 2.0, requires_grad=True) for key in objective.extras}
    losses = objective(*logps, **extras).losses
    if extras:
        gradients = torch.autograd.grad(losses.sum(), list(extras.values()), allow_unused=True)
        for (key, facts), gradient in zip(objective.extras.items(), gradients, strict=True):
            assert (gradient is not None) == facts.differentiable, key


@pytest.mark.parametrize("name", NAMES)
def test_docstring_has_formula_and_exported(name):
    assert "loss =" in getattr(objectives, name).__doc__
    assert name in objectives.__all__
