# SPDX-License-Identifier: Apache-2.0
"""The reference, and one run of every backend, against numpy loops over the definition."""

import math

import numpy as np
import pytest
import torch

from fastpref import ScoringOptions, linear_logprob
from fastpref.scoring.plain_scores import plain_scores
from fastpref.scoring.statistics import OUTPUTS
from tests.scoring.cases import BACKENDS, IGNORED, make_case


def definition(hidden, weight, bias, target, temperature, logit_scale, softcap):
    """One row at a time, no shortcut: p = exp(t) / sum exp(t)."""
    rows = []
    for h, y in zip(hidden, target, strict=True):
        z = np.array([sum(a * b for a, b in zip(h, w, strict=True)) for w in weight]) + bias
        t = logit_scale * z
        if softcap is not None:
            t = softcap * np.tanh(t / softcap)
        t = t / temperature
        total = math.fsum(math.exp(v) for v in t)
        p = np.exp(t) / total
        rows.append(
            (
                math.log(p[y]),
                -math.fsum(v * math.log(v) for v in p),
                math.log(math.fsum(v * v for v in p)),
                math.fsum(t) / len(t),
                bool(max(t) == t[y]),
                math.log(total),
            )
        )
    columns = (torch.tensor(np.array(column)) for column in zip(*rows, strict=True))
    return dict(zip(OUTPUTS, columns, strict=True))


@pytest.mark.parametrize("scorer", ["reference", *BACKENDS])
@pytest.mark.parametrize(
    "map",
    [
        {"temperature": 1.0, "logit_scale": 1.0, "softcap": None},
        {"temperature": 0.8, "logit_scale": 1.7, "softcap": 3.0},
        {"temperature": 2.0, "logit_scale": -0.6, "softcap": None},
    ],
)
def test_against_the_definition(scorer, map):
    case = make_case(rows=9, hidden=5, vocab=33, bias=True)
    arguments = (case.hidden, case.weight, case.target)
    if scorer == "reference":
        scores = plain_scores(*arguments, bias=case.bias, **map)
    else:
        options = ScoringOptions(backend=scorer)
        scores = linear_logprob(*arguments, bias=case.bias, outputs=OUTPUTS, options=options, **map)
    numpy = [tensor.numpy() for tensor in (case.hidden, case.weight, case.bias, case.target)]
    for name, expected in definition(*numpy, **map).items():
        actual = getattr(scores, name)
        torch.testing.assert_close(
            actual.double(), expected.double(), rtol=1e-11, atol=1e-11, msg=name
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_formulas(backend):
    """d logp_y / dz = onehot - p,  d lse / dz = p,  d H / dz = -p (log p + H), times dt/dz."""
    case = make_case(rows=6, hidden=4, vocab=29, bias=True)
    cap, temperature = 4.0, 1.3
    hidden, weight, bias = (
        tensor.clone().requires_grad_() for tensor in (case.hidden, case.weight, case.bias)
    )
    g, k, h = (torch.randn(6, dtype=torch.float64) for _ in range(3))
    scores = linear_logprob(
        hidden,
        weight,
        case.target,
        bias=bias,
        softcap=cap,
        temperature=temperature,
        outputs=("logp", "entropy", "lse"),
        options=ScoringOptions(backend=backend),
    )
    (scores.logp * g + scores.entropy * k + scores.lse * h).sum().backward()

    z = case.hidden @ case.weight.t() + case.bias
    p = torch.softmax(cap * torch.tanh(z / cap) / temperature, -1)
    entropy = -(p * p.log()).sum(-1, keepdim=True)
    onehot = torch.zeros_like(p).scatter(1, case.target[:, None], 1.0)
    dt = g[:, None] * (onehot - p) + h[:, None] * p - k[:, None] * p * (p.log() + entropy)
    dz = dt * (1 - torch.tanh(z / cap) ** 2) / temperature
    torch.testing.assert_close(hidden.grad, dz @ case.weight, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(weight.grad, dz.t() @ case.hidden, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(bias.grad, dz.sum(0), rtol=1e-11, atol=1e-12)


def test_reference_leaves_unscored_positions_at_zero():
    case = make_case(rows=20, hidden=4, vocab=11, ignored=0.5)
    scores = plain_scores(case.hidden, case.weight, case.target)
    for name, value in zip(OUTPUTS, scores, strict=True):
        assert (value[case.target == IGNORED] == 0).all(), name
        assert value.shape == case.target.shape
