# SPDX-License-Identifier: Apache-2.0
"""The gradient of mean logits, alone and beside others, and what it costs."""

import pytest
import torch

from fastpref import ScoringOptions, explain, linear_logprob
from fastpref.scoring.plain_scores import plain_scores
from tests.scoring.cases import BACKENDS, DTYPES, make_case, verify
from tests.scoring.operations import Operations

V = 2051
PLANS = {
    "keep": {"schedule": "keep"},
    "kept in part": {"schedule": "keep", "memory_budget": 100 * V * 4},
    "recompute": {"schedule": "recompute"},
    "least tile": {"memory_budget": 1},
}
CAP = 4.0
backends = pytest.mark.parametrize("backend", BACKENDS)
caps = pytest.mark.parametrize("softcap", [None, CAP])


@backends
@caps
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "differentiated", [("mean_logits",), ("logp", "mean_logits", "lse")], ids="+".join
)
def test_gradient(backend, softcap, dtype, plan, differentiated):
    options = ScoringOptions(backend=backend, **PLANS[plan])
    features = {"bias": True, "ignored": 0.3, "temperature": 1.5, "softcap": softcap}
    outputs = ("logp", "mean_logits", "lse")
    verify(options, dtype, outputs=outputs, differentiated=differentiated, **features)


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("differentiated", [("mean_logits",), ("logp", "mean_logits")])
def test_gradient_of_a_frozen_head(backend, dtype, differentiated):
    options = ScoringOptions(backend=backend, schedule="direct")
    given = {"outputs": ("logp", "mean_logits"), "differentiated": differentiated}
    verify(options, dtype, **given, needs=("hidden",), bias=True, ignored=0.3)


@backends
@pytest.mark.parametrize("needs", [("weight",), ("bias",), ("hidden", "bias")], ids="+".join)
def test_some_inputs_frozen(backend, needs):
    options = ScoringOptions(backend=backend)
    given = {"outputs": ("logp", "mean_logits"), "differentiated": ("logp", "mean_logits")}
    verify(options, torch.float32, **given, needs=needs, bias=True)


@backends
@caps
def test_excluded_ids_receive_none(backend, softcap):
    """Under a cap a bias of -inf excludes nothing, and nothing passes through it."""
    case = make_case(rows=9, vocab=1030, bias=True)
    bias = case.bias.clone()
    bias[::3] = -torch.inf
    leaves = [case.hidden, case.weight, bias]
    leaves = [one.detach().clone().requires_grad_() for one in leaves]
    hidden, weight, bias = leaves
    options = ScoringOptions(backend=backend, memory_budget=1)
    given = {"bias": bias, "softcap": softcap}
    found = linear_logprob(
        hidden, weight, case.target, outputs=("mean_logits",), options=options, **given
    )
    upstream = torch.randn(9).double()
    actual = torch.autograd.grad(found.mean_logits, leaves, upstream)
    logits = (hidden @ weight.T)[:, bias != -torch.inf] + bias[bias != -torch.inf]
    mean = logits.mean(1) if softcap is None else (CAP * (logits / CAP).tanh()).sum(1) / 1030
    for one, other in zip(actual, torch.autograd.grad(mean, leaves, upstream), strict=True):
        torch.testing.assert_close(one, other)


@backends
@caps
def test_rows_without_gradient_may_hold_anything(backend, softcap):
    case = make_case(rows=9, vocab=1030, dtype=torch.float32)
    hidden, weight = case.hidden.clone(), case.weight.clone().requires_grad_()
    hidden[4] = torch.nan
    hidden.requires_grad_()
    options = ScoringOptions(backend=backend)
    scores = linear_logprob(
        hidden, weight, case.target, softcap=softcap, outputs=("mean_logits",), options=options
    )
    upstream = torch.ones(9)
    upstream[4] = 0
    for one in torch.autograd.grad(scores.mean_logits, (hidden, weight), upstream):
        assert torch.isfinite(one).all()


@caps
def test_of_a_low_rank_update(softcap):
    torch.manual_seed(0)
    case = make_case(rows=9, vocab=1030)
    leaves = [case.hidden, torch.randn(3, 7), torch.randn(1030, 3)]
    leaves = [one.detach().double().clone().requires_grad_() for one in leaves]
    hidden, a, b = leaves
    given = {"softcap": softcap, "outputs": ("logp", "mean_logits")}
    found = linear_logprob(hidden, case.weight, case.target, lora=(a, b, 0.5), **given)
    merged = case.weight + 0.5 * b @ a
    wanted = plain_scores(hidden, merged, case.target, softcap=softcap)
    upstream = torch.randn(2, 9).double().unbind()
    actual = torch.autograd.grad((found.logp, found.mean_logits), leaves, upstream)
    expected = torch.autograd.grad((wanted.logp, wanted.mean_logits), leaves, upstream)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("needs", "softcap", "units"),
    [
        (("hidden",), None, 2),
        (("hidden", "weight"), None, 3),
        (("hidden",), CAP, 3),
        (("hidden", "weight"), CAP, 4),
    ],
)
def test_what_it_costs(needs, softcap, units):
    """No product without a cap; under one the rows are projected again."""
    case = make_case(rows=128, hidden=64, vocab=1030, dtype=torch.float32)
    leaves = {"hidden": case.hidden.clone(), "weight": case.weight.clone()}
    for name in needs:
        leaves[name].requires_grad_()
    given = {"target": case.target, "softcap": softcap, "outputs": ("logp", "mean_logits")}
    with Operations() as operations:
        scores = linear_logprob(**leaves, **given)
        (scores.logp + scores.mean_logits).sum().backward()
    product = 2 * 128 * 64 * 1030
    assert operations.flop == units * product
    plan = explain(**leaves, **given)
    assert plan.units == (units if softcap is None else units - 1)
    assert plan.schedule == ("direct" if needs == ("hidden",) and softcap is None else "keep")


def test_mean_logits_alone_form_no_product_in_backward():
    case = make_case(rows=128, hidden=64, vocab=1030, dtype=torch.float32)
    hidden, weight = (one.clone().requires_grad_() for one in (case.hidden, case.weight))
    scores = linear_logprob(hidden, weight, case.target, outputs=("logp", "mean_logits"))
    with Operations() as operations:
        scores.mean_logits.sum().backward()
    assert operations.flop == 0
