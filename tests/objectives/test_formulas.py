# SPDX-License-Identifier: Apache-2.0
"""Every objective against numpy formulas written from the papers, and differentiated by complex
step, in float64."""

import numpy as np
import pytest
import torch

from fastpref import objectives
from fastpref.objectives import ListLosses, PairLosses, TokenLosses, UnitLosses, registry

from .formulas import listwise, numeric, pair, pair_examples, reference_free, token, unit

RNG = np.random.default_rng(7)
RESULTS = {"pair": PairLosses, "unit": UnitLosses, "list": ListLosses, "token": TokenLosses}
SHAPES = {"pair": (12,), "unit": (12,), "list": (5, 4), "token": (12, 9)}
FORMULAS = (
    pair.FORMULAS | reference_free.FORMULAS | unit.FORMULAS | listwise.FORMULAS | token.FORMULAS
)
EXAMPLES = pair_examples.EXAMPLES | unit.EXAMPLES | listwise.EXAMPLES | token.EXAMPLES
CASES = [
    pytest.param(name, example, id=f"{name}-{number}")
    for name in FORMULAS
    for number, example in enumerate(EXAMPLES[name])
]


def draw_logps(objective):
    """Those of each parameter, numpy; a token's are near those of the old policy."""
    shape = SHAPES[objective.unit]
    count = len(objective.signature.logps)
    if objective.unit == "token":
        old = RNG.uniform(-3.0, 0.0, shape)
        return [old + RNG.uniform(-0.35, 0.35, shape), old]
    if objective.unit == "pair" and not objective.needs_reference:
        count = 2
    if objective.unit != "pair" and not objective.needs_reference:
        count = 1
    return [RNG.uniform(-40.0, -0.5, shape) for _ in range(count)]


def to_torch(value):
    return torch.tensor(value) if isinstance(value, np.ndarray) else value


def test_the_catalogue_is_complete():
    assert set(objectives.names()) == set(FORMULAS)


@pytest.mark.parametrize(("name", "example"), CASES)
def test_formula(name, example):
    function = getattr(objectives, name)
    declared = next(one for one in registry.catalogue() if one.name == name)
    arrays = draw_logps(declared)
    expected = FORMULAS[name](*arrays, **example)
    logps = [torch.tensor(one, requires_grad=True) for one in arrays]
    keywords = {key: to_torch(value) for key, value in example.items()}
    result = function(*logps, **keywords)
    assert type(result) is RESULTS[declared.unit]
    for got, want in zip(result, expected, strict=True):
        if want is None:
            assert got is None
        else:
            np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-9, atol=1e-9)
    assert not any(one is not None and one.requires_grad for one in result[1:])
    weights = RNG.uniform(0.5, 1.5, expected[0].shape)
    # A loss that is all in its extras has none.
    losses = result.losses + 0 * sum(one.sum() for one in logps)
    gradients = torch.autograd.grad(losses, logps, torch.tensor(weights))
    exact = numeric.gradient(lambda *moved: FORMULAS[name](*moved, **example), arrays, weights)
    for got, want in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-9)
