# SPDX-License-Identifier: Apache-2.0
"""Row sums merged over parts of the vocabulary, and the scores made of them, against float64."""

import itertools

import pytest
import torch

from fastpref.scoring.rows import row_scores
from fastpref.scoring.slab import Products
from fastpref.scoring.statistics import OUTPUTS, RowSums, merge, token_scores
from fastpref.scoring.types import LogitMap
from tests.scoring.cases import BACKENDS

BOUNDS = [0, 3, 20, 33]
PLAIN = LogitMap(1.0, 0.0)


def parts_of(raw, target, backend, statistics=True, dtype=torch.float64, map=PLAIN):
    """Row sums of slabs of the vocabulary, each as a backend makes them."""
    from fastpref.scoring.backends import load

    own = map.logit(raw).gather(1, target[:, None])[:, 0].to(dtype)
    parts = []
    for start, stop in itertools.pairwise(BOUNDS):
        products = Products(raw[:, start:stop].to(dtype).contiguous(), None, map)
        sums = load(backend).kernels.exp_rows(products, target - start, own, False, statistics)
        if sums.best_index is not None:
            sums = sums._replace(best_index=sums.best_index + start)
        parts.append(sums)
    return parts, own


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("capped", [False, True])
def test_merged_scores(backend, spread, capped):
    raw = spread * torch.randn(50, BOUNDS[-1], dtype=torch.float64)
    target = torch.randint(0, BOUNDS[-1], (50,))
    # No logit reaches the cap: those that do are all equal.
    map = LogitMap(1.0, 5 + 2 * spread) if capped else PLAIN
    logits = map.logit(raw)
    parts, own = parts_of(raw, target, backend, map=map)
    sums = merge(parts)
    rows = row_scores(sums, own)
    outputs = [one for one in OUTPUTS if capped or one != "mean_logits"]
    scores = token_scores(tuple(outputs), sums, rows, target, own, BOUNDS[-1])
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    expected = {
        "logp": log_p.gather(1, target[:, None])[:, 0],
        "entropy": -torch.where(p > 0, p * log_p, 0.0).sum(1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(1),
        "mean_logits": logits.mean(1),
        "is_top1": logits.argmax(1) == target,
        "lse": logits.logsumexp(1),
    }
    for name in outputs:
        actual, value = getattr(scores, name), expected[name]
        if value.dtype == torch.bool:
            assert torch.equal(actual, value)
        else:
            digits = 1e-11 if capped else 1e-12
            torch.testing.assert_close(actual, value, rtol=digits, atol=digits, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_maxima_the_first_wins(backend):
    logits = torch.zeros(3, BOUNDS[-1], dtype=torch.float64)
    logits[:, [5, 25]] = 2.0
    sums = merge(parts_of(logits, torch.tensor([5, 25, 7]), backend)[0])
    assert sums.best_index.tolist() == [5, 5, 5]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_usual_anchor_loses_no_digit(backend):
    """logp = -log1p(S), to the last digits of a tiny S."""
    logits = torch.full((4, BOUNDS[-1]), 0.0, dtype=torch.float32)
    target = torch.tensor([0, 5, 19, 32])
    logits[range(4), target] = torch.tensor([17.0, 20.0, 40.0, 80.0])
    parts, own = parts_of(logits, target, backend, statistics=False, dtype=torch.float32)
    logp = row_scores(merge(parts), own).logp
    exact = -torch.log1p(32 * torch.exp(-own.double()))
    torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=0)


def test_logp_of_an_anchor_above_the_target():
    """Another column holds it then, so that S is 1 at least; at the target S may be anything."""
    own = torch.tensor([20.1, -3.3, 0.7, 11.0])
    cases = [(0.0, total) for total in (0.0, 1e-30, 1e-12, 1e-6, 1.0, 100.0)]
    cases += [(shift, total) for shift in (1e-5, 0.1, 20.0) for total in (1.0, 1.001, 100.0)]
    for shift, total in cases:
        sums = RowSums(own + shift, torch.full((4,), total), torch.zeros(4))
        logp = row_scores(sums, own).logp
        relative = own.double() - sums.anchor.double()
        exact = -torch.log1p(total * torch.exp(-relative))
        assert (logp <= 0).all()
        torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=0)


def test_one_part_is_itself():
    part = RowSums(*(torch.randn(3) for _ in range(3)))
    assert merge([part]) is part
