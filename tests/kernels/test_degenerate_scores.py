# SPDX-License-Identifier: Apache-2.0
"""Scores of degenerate rows: finite where mathematics is, and alike on every backend; and float16
products beyond 65504."""

import functools

import pytest
import torch
from torch import Tensor

from fastpref import ScoringOptions, linear_logprob
from fastpref.scoring.backends import cpp
from fastpref.scoring.backends import torch as torch_backend
from fastpref.scoring.statistics import DIFFERENTIABLE, OUTPUTS
from tests.kernels.degenerate import AVAILABLE, BACKENDS, DTYPES, INF, only, tolerance, whole

ROWS, H, V = 4, 8, 40
CPP = pytest.param(cpp, marks=pytest.mark.skipif("cpp" not in AVAILABLE, reason="no compiler"))
TARGET = [5, 6, 0, 39]
PLANS = {"keep": {"schedule": "keep"}, "recompute": {"schedule": "recompute"}}
backends = pytest.mark.parametrize("backend", BACKENDS)


def rows(hidden=None, weight=None, bias=None, target=TARGET, **map):
    return {
        "hidden": whole(ROWS, H, seed=1) if hidden is None else hidden,
        "weight": whole(V, H, seed=3) if weight is None else weight,
        "bias": bias,
        "target": torch.tensor(target),
        **map,
    }


CASES = {
    "ordinary": rows(),
    "zeros": rows(torch.zeros(ROWS, H).double()),
    "equal logits": rows(weight=torch.ones(V, H).double()),
    "one column": rows(weight=whole(1, H), target=[0] * ROWS),
    "two columns": rows(weight=whole(2, H), target=[0, 1, 1, 0]),
    "all but the target excluded": rows(bias=only([5]), target=[5] * ROWS),
    "all but another excluded": rows(bias=only([5]), target=[6] * ROWS),
    "some excluded": rows(bias=only([0, 5, 6, 9, 39])),
    "some excluded, zeros": rows(torch.zeros(ROWS, H).double(), bias=only([0, 5, 6, 9, 39])),
    "some excluded, cap": rows(bias=only([0, 5, 6, 9, 39]), softcap=4.0),
    "huge": rows(logit_scale=2.0**12),
    "huger": rows(logit_scale=2.0**40),
    "huger, cap": rows(logit_scale=2.0**40, softcap=4.0),
    "tiny": rows(logit_scale=2.0**-20),
    "tinier": rows(logit_scale=2.0**-45),
    "huge products": rows(64 * whole(ROWS, H, seed=1)),
}


def slopes(case, logits: Tensor, allowed: Tensor) -> dict[str, Tensor]:
    """Outputs in closed form, and the gradients of the sum of the differentiable ones at the
    logits, of those of -inf 0."""
    log_p = logits.log_softmax(1)
    p, own = log_p.exp(), case["target"][:, None]
    plogp = torch.where(p > 0, p * torch.where(p > 0, log_p, 0.0), 0.0)
    entropy = -plogp.sum(1)
    onehot = torch.zeros_like(p).scatter(1, own, 1.0)
    mean = torch.where(allowed, logits, 0.0).sum(1) / allowed.sum()
    found = {
        "logp": log_p.gather(1, own)[:, 0],
        "entropy": entropy,
        "log_sum_sq_probs": (2 * log_p).logsumexp(1),
        "mean_logits": mean,
        "is_top1": logits.argmax(1) == case["target"],
        "lse": logits.logsumexp(1),
    }
    gradients = {
        "logp": onehot - p,
        "entropy": -plogp - p * entropy[:, None],
        "mean_logits": (allowed.double() / allowed.sum()).expand_as(p),
        "lse": p,
    }
    return found | {f"d {name}": one for name, one in gradients.items()}


@functools.cache
def expected(name: str) -> dict[str, Tensor]:
    case = CASES[name]
    z, bias, cap = case["hidden"] @ case["weight"].t(), case["bias"], case.get("softcap")
    allowed = torch.ones(z.shape[1], dtype=torch.bool)
    if bias is not None:
        z = z + bias
        if cap is None:
            allowed = bias != -INF
    logits, slope = z * case.get("logit_scale", 1.0), torch.full_like(z, 1.0)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
        slope = 1 - (logits / cap).square()
    found = slopes(case, logits, allowed)
    for output in DIFFERENTIABLE:
        d = found.pop(f"d {output}") * slope * case.get("logit_scale", 1.0)
        found[f"d hidden of {output}"] = d @ case["weight"]
        found[f"d weight of {output}"] = d.t() @ case["hidden"]
    return found


def leaves_of(case, dtype):
    given = {
        key: one.to(dtype) if key in ("hidden", "weight", "bias") and one is not None else one
        for key, one in case.items()
    }
    leaves = [given[key].clone().requires_grad_() for key in ("hidden", "weight")]
    return given | dict(zip(("hidden", "weight"), leaves, strict=True)), leaves


def found(name: str, backend: str, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    given, leaves = leaves_of(CASES[name], dtype)
    options = ScoringOptions(backend=backend, **options)
    scores = linear_logprob(**given, outputs=OUTPUTS, options=options)
    results = {key: getattr(scores, key) for key in OUTPUTS}
    for output in DIFFERENTIABLE:
        gradients = torch.autograd.grad(results[output].sum(), leaves, retain_graph=True)
        for key, one in zip(("hidden", "weight"), gradients, strict=True):
            results[f"d {key} of {output}"] = one
    return {key: one.detach() for key, one in results.items()}


@backends
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", CASES)
def test_as_in_float64(name, plan, backend):
    problems, scale = [], CASES[name].get("logit_scale", 1.0)
    for dtype in DTYPES[backend]:
        for key, value in found(name, backend, dtype, **PLANS[plan]).items():
            right = expected(name)[key]
            if key == "is_top1":
                # Of equal logits either answer is right.
                assert (value == right).all() or "equal" in name or "zeros" in name
                continue
            if dtype == torch.float16 and key.startswith("d ") and scale > 2**10:
                continue  # the gradients at the logits pass 65504
            sizes = right[right.isfinite()].abs().tolist()
            size = max([*sizes, scale if key.startswith("d ") else 1e-7])
            finite = right.isfinite() & (right.abs() <= torch.finfo(value.dtype).max / 4)
            error = (value.double() - right)[finite].abs()
            if not (error <= tolerance(dtype, size)).all() or not torch.equal(
                value.double()[right.isinf()], right[right.isinf()]
            ):
                problems.append(f"{dtype} {key}: {value} instead of {right}")
    assert not problems, "\n".join(problems)


# Row 1 has products of 90000 and the like, the others none.
OVERFLOWING = {
    "at the target": {6: 300.0},
    "elsewhere": {9: 300.0},
    "at both": {6: 300.0, 9: 310.0},
    "at the target, below": {6: -300.0},
    "elsewhere, below": {9: -300.0},
    "everywhere, below": dict.fromkeys(range(V), -300.0),
    "everywhere but at the target, below": {
        **dict.fromkeys(range(V), -300.0),
        6: -218.0,
    },
}


@backends
@pytest.mark.parametrize("plan", [*PLANS, "direct"])
@pytest.mark.parametrize("name", OVERFLOWING)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.0**-10])
def test_halves_are_right_or_nan(name, plan, backend, scale, by_row):
    """Where a product passes 65504 the row's numbers are those of wider arithmetic, or NaN where
    plain torch's are not finite either; gradients are so where the scores are. ``by_row`` the other
    rows have the other scale."""
    hidden, weight = whole(ROWS, H, seed=1), whole(V, H, seed=3)
    hidden[:, 0], weight[:, 0], hidden[1, 0] = 0, 0, 300
    for column, value in OVERFLOWING[name].items():
        weight[column, 0] = value
    hidden, weight = hidden.half(), weight.half()
    target, row = torch.tensor(TARGET), torch.arange(ROWS)
    given = numbers = {"logit_scale": scale}
    if by_row:
        scale = torch.full((ROWS, 1), 2.0**-10 / scale).index_fill(0, torch.tensor([1]), scale)
        given = {"temperature": 1 / scale[:, 0]}
    logits = scale * (hidden.double() @ weight.double().t())
    exact = logits.log_softmax(1)
    plain = (scale * (hidden @ weight.t()).float()).log_softmax(1)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(plan != "direct")]
    outputs = ("logp", "entropy", "lse") if plan != "direct" else ("logp",)
    options = ScoringOptions(backend=backend, schedule=plan)
    scores = linear_logprob(*leaves, target, **given, outputs=outputs, options=options)
    if by_row:
        own = ScoringOptions(backend="rows" if backend == "triton" else backend, schedule=plan)
        alone = linear_logprob(hidden[1:2], weight, target[1:2], **numbers, options=own).logp
        assert torch.equal(alone.isnan(), scores.logp[1:2].isnan())
    right = {
        "logp": exact[row, target],
        "entropy": -(exact.exp() * exact).sum(1),
        "lse": logits.logsumexp(1),
    }
    for output in outputs:
        value = getattr(scores, output).detach().double()
        unknown = value.isnan()
        assert plain[unknown].isfinite().logical_not().any(1).all() and not unknown[[0, 2, 3]].any()
        size = logits.abs().amax(1).clamp(min=1)
        assert ((value - right[output])[~unknown].abs() <= 2e-3 * size[~unknown]).all(), output
    onehot, p = torch.zeros_like(exact).scatter(1, target[:, None], 1.0), exact.exp()
    slopes = {"logp": onehot - p, "entropy": -p * (exact + right["entropy"][:, None]), "lse": p}
    for output in outputs:
        value = getattr(scores, output)
        (gradient,) = torch.autograd.grad(value.sum(), hidden, retain_graph=True)
        dz, known = slopes[output] * scale, value.isfinite()
        want, sizes = dz @ weight.detach().double(), dz.abs() @ weight.detach().double().abs()
        assert ((gradient.double() - want).abs() <= 4e-3 * sizes + 1e-3)[known].all(), output
        assert gradient[~known].isnan().all(), output


@backends
def test_halves_that_all_lie_low_are_not_lost(backend):
    """In a row whose temperature leaves little between the largest and the smallest logit."""
    hidden, weight = whole(ROWS, H, seed=1), whole(V, H, seed=3)
    hidden[:, 0], weight[:, 0], hidden[1, 0] = 0, -200, 300
    temperature = torch.tensor([1.0, 1024.0, 1.0, 1.0])
    given = hidden.half(), weight.half(), torch.tensor(TARGET)
    options = ScoringOptions(backend=backend)
    scores = linear_logprob(*given, temperature=temperature, options=options)
    assert scores.logp.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_beside_a_bias_that_excludes(backend):
    """A bias of -inf or far below at most ids is no product that was lost."""
    hidden, weight = whole(ROWS, H, seed=1).half(), whole(V, H, seed=3).half()
    options = ScoringOptions(backend=backend)
    for value in (-INF, -60000.0):
        bias = torch.full((V,), value).half()
        bias[5] = 1
        scores = linear_logprob(hidden, weight, torch.full((ROWS,), 5), bias=bias, options=options)
        assert (scores.logp == 0).all()
    bias = torch.full((V,), -60000.0).half()
    scores = linear_logprob(hidden, weight, torch.tensor(TARGET), bias=bias, options=options)
    assert scores.logp.isfinite().all()


@backends
def test_halves_beside_a_bias_that_lifts_a_lost_product(backend):
    """What is lost may weigh more than all that is left: NaN."""
    hidden, weight = whole(ROWS, H, seed=1), whole(V, H, seed=3)
    hidden[:, 0], weight[:, 0], hidden[1] = 0, -218, 0
    hidden[1, 0], weight[9, 0], bias = 300, -219, torch.zeros(V).half()
    bias[9] = 1000
    given = hidden.half(), weight.half(), torch.tensor(TARGET)
    scores = linear_logprob(*given, bias=bias, options=ScoringOptions(backend=backend))
    assert scores.logp.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("backend", [torch_backend, CPP])
def test_a_row_without_upstream_gradient_gets_none(backend):
    """Whatever it was scored with."""
    gradient, scale = torch.tensor([0.0, -0.0, 0.0, 3.0]), torch.tensor([INF, torch.nan, 1, 2])
    assert backend.gradient_factors(gradient, scale, 0.5).tolist() == [0, 0, 0, -3]
