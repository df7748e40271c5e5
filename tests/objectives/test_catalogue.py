# SPDX-License-Identifier: Apache-2.0
"""What every objective of the catalogue must hold, on inputs drawn from its own signature."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastpref import objectives
from fastpref.objectives import registry
from fastpref.objectives.signature import POLICY_LOGPS

from .drawing import SHAPES, configured, draw_logps


def those(condition):
    chosen = [one for one in registry.catalogue() if condition(one)]
    return pytest.mark.parametrize("declared", chosen, ids=lambda one: one.name)


every = those(lambda one: True)
# Hyperparameters without a default, and extras under which nothing is at a kink or an end.
REQUIRED = {"shift": 0.7, "max_completion_length": 5}
INSIDE = {
    "mask": True,
    "ranks": None,
    "group_ids": 0,
    "ref_entropy": 0.4,
    "chosen_win_probs": 0.7,
    "rejected_win_probs": 0.3,
    "preference_probs": 0.8,
    "running_std": 1.5,
    "target_probs": 0.3,
}


def ready(declared):
    known = declared.signature.hyperparameters
    return declared.replace(**{name: value for name, value in REQUIRED.items() if name in known})


def plain_extras(objective, dtype=torch.float32):
    """All that are required, and lengths."""
    shape = SHAPES[objective.unit]
    sizes = {"logps": shape, "unit": shape[:1], "rows": (shape[0], 3), "number": ()}
    extras = {}
    for position, (name, facts) in enumerate(objective.extras.items()):
        if not (facts.required or facts.filled or name == "scores"):
            continue
        size = sizes[facts.shapes[0]]
        if name in INSIDE:
            extras[name] = torch.full(size, INSIDE[name])
        elif facts.binary:
            extras[name] = torch.arange(size[0]) % 2 == 0
        elif name.endswith("lengths"):
            extras[name] = torch.arange(1, math.prod(size) + 1).reshape(size)
        else:
            steps = torch.arange(1.0, math.prod(size) + 1) * 0.37 + 0.11 * position
            extras[name] = (0.2 + steps.sin() ** 2 * 0.7).reshape(size)
    # A float extra in the dtype of the log-probs, or a gradcheck in float64 sees its rounding.
    return {name: one.to(dtype) if one.is_floating_point() else one for name, one in extras.items()}


def plain_logps(objective, **keywords):
    count = POLICY_LOGPS[objective.unit] * (2 if objective.needs_reference else 1)
    count = 2 if objective.unit == "token" else count
    shape = SHAPES[objective.unit]
    generator = torch.Generator().manual_seed(0)
    rows = -12 * torch.rand(count, *shape, generator=generator, dtype=torch.float64)
    if objective.unit == "token":
        rows[1] = rows[0] + 0.1 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return [torch.tensor(row.tolist(), **keywords) for row in rows]


@pytest.mark.heavy
@every
@given(data=st.data())
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_finite_in_fp32(declared, data):
    objective, extras = data.draw(configured(declared))
    logps = [one.requires_grad_() for one in draw_logps(data.draw, declared)]
    result = objective(*logps, **extras)
    units = SHAPES[declared.unit][0]
    assert result.losses.dtype == torch.float32 and result.losses.shape == (units,)
    assert not any(one is not None and one.requires_grad for one in result[1:])
    assert all(one is None or torch.isfinite(one).all() for one in result)
    if result.losses.requires_grad:
        gradients = torch.autograd.grad(result.losses.sum(), logps, allow_unused=True)
        assert all(torch.isfinite(g).all() for g in gradients if g is not None)


# Weights, anchors and targets that take no gradient: a difference quotient would see them move;
# test_formulas.py has their gradients.
DETACH = (
    *("beta_dpo", "alpha_dpo", "epsilon_dpo", "relative_po", "amapo", "kto", "bco", "lipo"),
    *("tpo", "cispo", "vespo", "tdpo", "ofs_dpo", "disco", "adpo"),
)


@those(lambda one: one.name not in DETACH)
def test_gradcheck(declared):
    objective = ready(declared)
    extras = plain_extras(objective, torch.float64)
    logps = plain_logps(objective, dtype=torch.float64, requires_grad=True)
    if objective.unit == "token":
        logps[1].requires_grad_(False)

    def losses(*rows):
        return objective(*rows, *logps[len(rows) :], **extras).losses

    rows = [one for one in logps if one.requires_grad]
    assert torch.autograd.gradcheck(losses, rows)


def outside(fact):
    """Values that miss the domain by nothing, by an ulp, or by far."""
    if fact.choices is not None:
        return ["no such choice"]
    if fact.domain is None:
        return []
    domain = fact.domain
    ends = [end for end in (domain.low, domain.high) if end not in domain.includes]
    below = [] if domain.low == -math.inf else [math.nextafter(domain.low, -math.inf)]
    return [math.nan, *ends, *below]


OUTSIDE = [
    pytest.param(declared, key, value, id=f"{declared.name}-{key}-{value}")
    for declared in registry.catalogue()
    for key, fact in declared.signature.hyperparameters.items()
    for value in outside(fact)
]


@pytest.mark.parametrize(("declared", "key", "value"), OUTSIDE)
def test_domain_is_checked_by_get_and_by_the_function(declared, key, value):
    objective = ready(declared)
    with pytest.raises(ValueError, match=f"{declared.name}: {key} must be"):
        objective.replace(**{key: value})
    given = dict(objective.settings) | {key: value}
    with pytest.raises(ValueError, match=f"{declared.name}: {key} must be"):
        getattr(objectives, declared.name)(
            *plain_logps(objective), **plain_extras(objective), **given
        )


@those(lambda one: "dp_group" in one.signature.hyperparameters)
def test_a_group_must_be_one(declared):
    with pytest.raises(TypeError, match="dp_group must be a ProcessGroup or None, got int"):
        ready(declared).replace(dp_group=3)


MEANS = (
    *("ipo", "sigmoid_norm", "rainbow_po", "alpha_dpo", "simpo", "alpha_po", "orpo", "asft"),
    *("simper", "amapo", "simnpo", "pro", "rrhf"),
)


@every
def test_sums_or_means(declared):
    assert declared.reduction == ("mean" if declared.name in MEANS else "sum")


def test_ipo_compares_what_it_is_told_to():
    assert objectives.get("ipo", normalize="sum").reduction == "sum"
    assert (
        objectives.Objective(lambda chosen, rejected: chosen, unit="pair", scope="pair").reduction
        == "sum"
    )


@those(lambda one: one.unit != "token")
def test_reference_is_needed_or_refused(declared):
    objective = ready(declared)
    extras, settings_ = plain_extras(objective), dict(objective.settings)
    policy = plain_logps(objective)[: POLICY_LOGPS[objective.unit]]
    function = getattr(objectives, declared.name)
    if objective.needs_reference:
        for call in (
            lambda: function(*policy, **extras, **settings_),
            lambda: objective(*policy, **extras),
        ):
            with pytest.raises(ValueError, match="pass zeros for a uniform reference"):
                call()
    else:
        with pytest.raises(ValueError, match="takes no reference"):
            function(*policy, *policy, **extras, **settings_)
        function(*policy, *[None] * len(policy), **extras, **settings_)


@every
def test_function_and_objective_agree(declared):
    objective = ready(declared)
    logps, extras = plain_logps(objective), plain_extras(objective)
    direct = getattr(objectives, declared.name)(*logps, **extras, **dict(objective.settings))
    for got, expected in zip(objective(*logps, **extras), direct, strict=True):
        assert got is expected is None or torch.equal(got, expected)


@every
def test_half_precision_is_computed_in_fp32(declared):
    objective = ready(declared)
    logps = [one.bfloat16() for one in plain_logps(objective)]
    extras = plain_extras(objective)
    halves, floats = (
        objective(*rows, **extras) for rows in (logps, [one.float() for one in logps])
    )
    for got, expected in zip(halves, floats, strict=True):
        assert got is expected is None or torch.equal(got, expected)
    assert halves.losses.dtype == torch.float32


@every
def test_extras_get_no_gradient_unless_declared(declared):
    objective = ready(declared)
    if declared.name == "tdpo":
        objective = objective.replace(version=1)  # version 2 stops that of the chosen one
    logps = [one.requires_grad_() for one in plain_logps(objective)]
    extras = {
        name: one.requires_grad_() if one.is_floating_point() else one
        for name, one in plain_extras(objective).items()
    }
    losses = objective(*logps, **extras).losses
    wanted = {name: one for name, one in extras.items() if one.requires_grad}
    if wanted:
        gradients = torch.autograd.grad(losses.sum(), list(wanted.values()), allow_unused=True)
        for name, gradient in zip(wanted, gradients, strict=True):
            assert (gradient is not None) == objective.extras[name].differentiable, name


@every
def test_docstring_has_formula_and_exported(declared):
    assert "loss =" in getattr(objectives, declared.name).__doc__
    assert declared.name in objectives.__all__


@every
def test_numbers_of_any_dtype_are_taken_in_that_of_the_log_probs(declared):
    objective = ready(declared)
    logps, extras = plain_logps(objective), plain_extras(objective)
    wide = {name: one.double() if one.is_floating_point() else one for name, one in extras.items()}
    wide |= {name: one.int() for name, one in extras.items() if one.dtype == torch.bool}
    expected = objective(*logps, **extras)
    for got, want in zip(objective(*logps, **wide), expected, strict=True):
        assert got is want is None or torch.equal(got, want)
    assert expected.losses.dtype == torch.float32


def slopes_of_pairs(objective, seed):
    """At what ``preference_loss`` scores, (scores, P), with all scores drawn or for no seed 0."""
    extras = plain_extras(objective, torch.float64)
    scored = [name for name in extras if objective.extras[name].differentiable]
    generator = torch.Generator().manual_seed(seed or 0)
    logps = plain_logps(objective, dtype=torch.float64)
    for one in (*logps, *(extras[name] for name in scored)):
        one.normal_(generator=generator).mul_(0 if seed is None else 30).requires_grad_()
    wanted = [*logps[: POLICY_LOGPS[objective.unit]], *(extras[name] for name in scored)]
    losses = objective(*logps, **extras).losses
    return torch.stack(torch.autograd.grad(losses.sum(), wanted, materialize_grads=True))


def same_direction(objective):
    first = slopes_of_pairs(objective, None)
    for seed in range(4):
        other = slopes_of_pairs(objective, seed)
        across = first[:, None] * other - first * other[:, None]
        if not torch.allclose(across, torch.zeros_like(across), atol=1e-12):
            return False
    return bool(first.any(0).all())


@those(lambda one: one.fixed_direction)
def test_a_fixed_direction_is_one(declared):
    for version in (1, 2):
        assert same_direction(ready(declared).replace(version=version))
    assert objectives.wpo(declared).fixed_direction
    assert not objectives.combine([declared, "dpo"], [1.0, 1.0]).fixed_direction


def test_not_every_direction_is_fixed():
    assert not registry.registered("dpop").fixed_direction
    assert not same_direction(registry.registered("dpop"))


@those(lambda one: "labels" in one.extras)
def test_labels_are_two(declared):
    objective, logps = ready(declared), plain_logps(declared)
    labels = torch.tensor([1, -1, 1, -1])
    with pytest.raises(ValueError, match="labels must be 0 or 1, got -1"):
        objective(*logps, labels=labels)
    ones = objective(*logps, labels=(labels > 0).float()).losses
    assert torch.equal(ones, objective(*logps, labels=labels > 0).losses)


@every
def test_nothing_at_all(declared):
    objective = ready(declared)
    logps = [one[:0].requires_grad_() for one in plain_logps(objective)]
    extras = {
        name: one if objective.extras[name].shapes == ("number",) else one[:0]
        for name, one in plain_extras(objective).items()
    }
    losses = objective(*logps, **extras).losses
    assert losses.shape == (0,)
    (losses.sum() + sum(one.sum() for one in logps)).backward()


def test_what_divides_by_lengths_says_what_an_empty_response_is():
    for one in registry.catalogue():
        # r_dpo takes their difference.
        if one.name != "r_dpo" and any(name.endswith("lengths") for name in one.extras):
            assert "without scored tokens" in one.function.__doc__, one.name
