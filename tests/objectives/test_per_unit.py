# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters of one value a unit, of every objective that takes them, against a loop over the
units with a number each; those that take numbers only refuse them and say so."""

import math

import pytest
import torch

from fastpref import objectives
from fastpref.objectives import registry

from .drawing import SHAPES
from .test_catalogue import plain_extras, plain_logps, ready

# Under which other choices a hyperparameter is used at all.
BESIDE = {
    ("f_dpo", "alpha"): {"divergence": "alpha", "alpha": 0.4},
    ("lipo", "alpha"): {"variant": "approx_ndcg"},
}
# Losses of a batch that depend on those of all units: tests of their own.
TOGETHER = [("dr_dpo", "beta"), ("bco", "beta")]


def choices(declared, key):
    """The settings beside ``key``: those it needs, or else one for each choice there is."""
    beside = BESIDE.get((declared.name, key))
    if beside is not None:
        return [beside]
    named = [
        {name: choice}
        for name, fact in declared.signature.hyperparameters.items()
        for choice in fact.choices or ()
        if choice is not False and choice != "alpha"
    ]
    return named or [{}]


def cases(condition, vary=False):
    """``vary``: under every choice of the other hyperparameters."""
    return [
        pytest.param(ready(declared).replace(**beside), key, id=f"{declared.name}-{key}-{beside}")
        for declared in registry.catalogue()
        for key, fact in declared.signature.hyperparameters.items()
        if fact.domain is not None and condition(declared, key, fact.domain)
        for beside in choices(declared, key)[: None if vary else 1]
    ]


PER_UNIT = cases(lambda one, key, domain: domain.per_unit)
ALONE = cases(lambda one, key, domain: domain.per_unit and (one.name, key) not in TOGETHER, True)
SHARED = cases(lambda one, key, domain: not domain.per_unit)
BETAS = cases(lambda one, key, domain: domain.zero_per_unit, True)


def values_of(objective, key):
    """(units,), inside the domain and all different."""
    domain = objective.signature.hyperparameters[key].domain
    places = torch.linspace(0.15, 0.85, SHAPES[objective.unit][0], dtype=torch.float64)
    if domain.low == -math.inf:
        return 2 * places - 1
    return domain.low + places * (2.0 if domain.high == math.inf else domain.high - domain.low)


def given(objective, key):
    logps = [one.requires_grad_() for one in plain_logps(objective, dtype=torch.float64)]
    extras = plain_extras(objective, torch.float64)
    if key == "beta" and "ref_token_logp" in objective.extras:
        extras["ref_token_logp"] = logps[0].detach() * 0.9
    return logps, extras


def at(value, unit):
    return value[unit : unit + 1] if isinstance(value, torch.Tensor) and value.dim() else value


@pytest.mark.parametrize(("objective", "key"), ALONE)
def test_is_a_loop_over_the_units(objective, key):
    logps, extras = given(objective, key)
    values = values_of(objective, key)
    found = objective(*logps, **extras, **{key: values})
    slopes = torch.autograd.grad(found.losses.sum(), logps, materialize_grads=True)
    alone = objective.scope in ("unit", "pair", "list") or objective.name == "epsilon_dpo"
    total = [torch.zeros_like(one) for one in slopes]
    for unit, value in enumerate(values.tolist()):
        one = objective.replace(**{key: value})
        if alone:
            rows = [at(row, unit) for row in logps]
            want = one(*rows, **{name: at(extra, unit) for name, extra in extras.items()})
        else:
            want = [None if t is None else at(t, unit) for t in one(*logps, **extras)]
        for got, wanted in zip(found, want, strict=True):
            assert (got is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(at(got, unit), wanted, rtol=1e-12, atol=1e-12)
        parts = torch.autograd.grad(want[0].sum(), logps, materialize_grads=True)
        total = [a + b for a, b in zip(total, parts, strict=True)]
    for got, want in zip(slopes, total, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    single = objective(*(one.float() for one in logps), **extras, **{key: values})
    assert single.losses.dtype == torch.float32


def test_dr_dpo_has_the_mean_of_losses_at_their_betas():
    objective = objectives.get("dr_dpo", tau=0.7)
    logps, _ = given(objective, "beta")
    beta = values_of(objective, "beta")
    losses = objectives.dpo(*logps, beta=beta).losses
    want = -0.7 * torch.log(torch.exp(-losses / 0.7).mean())
    found = objective(*logps, beta=beta)
    torch.testing.assert_close(found.losses, want.expand(4))
    torch.testing.assert_close(found.chosen_rewards, (beta * (logps[0] - logps[2])).detach())


def test_bco_shifts_by_the_mean_of_rewards_at_their_betas():
    objective = objectives.get("bco")
    logps, extras = given(objective, "beta")
    beta = values_of(objective, "beta")
    rewards = (beta * (logps[0] - logps[1])).detach()
    shifted = [objective(*logps, **extras, beta=beta)]
    shifted += [objective(*logps, **extras, beta=beta, delta=rewards.mean())]
    for got, want in zip(*shifted, strict=True):
        torch.testing.assert_close(got, want)
    for unit, value in enumerate(beta.tolist()):
        rows = [at(row, unit) for row in logps]
        labels = at(extras["labels"], unit)
        want = objective.replace(beta=value)(*rows, labels=labels, delta=rewards.mean())
        torch.testing.assert_close(at(shifted[0].losses, unit), want.losses)


OTHER_TERMS = {"sft_weight": 0.0}
PARTLY = ("cal_dpo", "flex_dpo")  # whose other terms have a gradient all the same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("objective", "key"), BETAS)
def test_a_beta_of_0_is_no_weight(objective, key, dtype):
    known = objective.signature.hyperparameters
    objective = objective.replace(
        **{name: one for name, one in OTHER_TERMS.items() if name in known}
    )
    logps, extras = given(objective, key)
    logps = [one.detach().to(dtype).requires_grad_() for one in logps]
    beta = values_of(objective, key).index_fill(0, torch.tensor(1), 0.0).requires_grad_()
    losses = objective(*logps, **extras, **{key: beta}).losses
    slopes = torch.autograd.grad(losses[1], [*logps, beta], materialize_grads=True)
    assert torch.isfinite(losses).all() and all(torch.isfinite(one).all() for one in slopes)
    if objective.name not in PARTLY:
        assert all((one[1] == 0).all() for one in slopes[:-1])
    with pytest.raises(ValueError, match=f"{key} must be > 0"):
        objective.replace(**{key: 0.0})


# What the formula takes as a constant gets no gradient there.
STOPPED = ("alpha_dpo", "amapo", "vespo", "cispo", "bco")


@pytest.mark.parametrize(("objective", "key"), PER_UNIT)
def test_values_are_differentiable_and_rewards_are_not(objective, key):
    logps, extras = given(objective, key)
    logps = [one.detach() for one in logps]
    values = values_of(objective, key).requires_grad_()
    result = objective(*logps, **extras, **{key: values})
    assert not any(one is not None and one.requires_grad for one in result[1:])
    if objective.name not in STOPPED:
        assert torch.autograd.gradcheck(
            lambda one: objective(*logps, **extras, **{key: one}).losses, values
        )


@pytest.mark.parametrize(("objective", "key"), SHARED)
def test_what_the_batch_shares_is_a_number(objective, key):
    logps, extras = given(objective, key)
    with pytest.raises(TypeError, match=f"{objective.name}: {key} must be a number, got a tensor"):
        objective(*logps, **extras, **{key: values_of(objective, key)})
    with pytest.raises(TypeError, match="the whole batch shares it"):
        objective.replace(**{key: values_of(objective, key)})
    said = objective.registration.formula.__doc__
    assert f"``{key}``" in said and "numbers only" in " ".join(said.split())


def test_these_and_no_others_are_shared():
    names = {(one.values[0].name, one.values[1]) for one in SHARED}
    assert names == {
        *(("aot", "beta"), ("aot", "label_smoothing")),
        *(("aot_unpaired", "beta"), ("aot_unpaired", "label_smoothing")),
        *(("dr_dpo", "tau"), ("epsilon_dpo", "epsilon")),
        *(("disco", "tau"), ("disco", "delta"), ("disco", "kl_weight")),
    }


@pytest.mark.parametrize(("objective", "key"), PER_UNIT)
def test_values_are_checked_on_cpu_tensors_only(objective, key):
    logps, extras = given(objective, key)
    values = values_of(objective, key)
    call = f"{objective.name}: {key} must be"
    for wrong in (values[:-1], values.expand(2, -1), values[0]):
        with pytest.raises(ValueError, match=f"{call} a number or one value a unit"):
            objective(*logps, **extras, **{key: wrong})
    with pytest.raises(TypeError, match=f"{call} numbers, got torch.bool"):
        objective(*logps, **extras, **{key: values > 0})
    nan = values.index_fill(0, torch.tensor(2), math.nan)
    with pytest.raises(ValueError, match=f"{call} .*got nan"):
        objective.replace(**{key: nan})
    objective.replace(**{key: nan.to("meta")})  # which has nothing to read


def test_a_negative_beta_is_refused():
    with pytest.raises(ValueError, match="dpo: beta must be >= 0, got -1"):
        objectives.get("dpo", beta=torch.tensor([0.0, -1.0]))


def test_modifiers_hand_them_on():
    logps, beta = plain_logps(objectives.get("dpo"), dtype=torch.float64), torch.rand(4).double()
    parts = [objectives.dpo(*logps, beta=beta).losses, objectives.hinge(*logps, beta=beta).losses]
    both = objectives.combine(["dpo", "hinge"], [0.7, 0.3])
    for found in (both(*logps, beta=beta), both.replace(beta=beta)(*logps)):
        torch.testing.assert_close(found.losses, 0.7 * parts[0] + 0.3 * parts[1])
    weights = {"chosen_weights": torch.rand(4), "rejected_weights": torch.rand(4)}
    product = weights["chosen_weights"].double() * weights["rejected_weights"]
    found = objectives.wpo("dpo")(*logps, **weights, beta=beta).losses
    torch.testing.assert_close(found, product * parts[0])


def test_objectives_compare_by_the_tensors_they_hold():
    first, second = torch.ones(3), torch.ones(3)
    one = objectives.get("dpo", beta=first)
    assert one == objectives.get("dpo", beta=first) != objectives.get("dpo", beta=second)
    assert hash(one) == hash(objectives.get("dpo", beta=first)) and one != "dpo"
