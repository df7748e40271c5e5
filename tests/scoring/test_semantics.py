# SPDX-License-Identifier: Apache-2.0
"""What linear_logprob promises about rows that are not scored, not differentiated, or not finite.

Each promise is checked for both backends and every schedule.
"""

import pytest
import torch

from fastpref import ScoringOptions, linear_logprob
from fastpref.scoring.statistics import OUTPUTS
from tests.scoring.cases import BACKENDS, DTYPES, make_case

V = 1030
PLANS = {
    "keep": {"schedule": "keep"},
    "kept in part": {"schedule": "keep", "memory_budget": 100 * V * 4},
    "recompute": {"schedule": "recompute"},
    "least tile": {"memory_budget": 1},
    "direct": {"schedule": "direct"},
}
NAN, INF = float("nan"), float("inf")

pytestmark = [
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.parametrize("plan", PLANS),
]


def scored(plan, backend, hidden, weight, target, outputs=("logp",), bias=None, **map):
    """Scores and the leaves that the plan differentiates."""
    hidden = hidden.detach().clone().requires_grad_()
    leaves = {"hidden": hidden}
    if plan != "direct":
        weight = weight.detach().clone().requires_grad_()
        leaves["weight"] = weight
        if bias is not None:
            bias = bias.detach().clone().requires_grad_()
            leaves["bias"] = bias
    scores = linear_logprob(
        hidden,
        weight,
        target,
        bias=bias,
        outputs=outputs,
        options=ScoringOptions(backend=backend, **PLANS[plan]),
        **map,
    )
    return scores, leaves


def differentiable(plan):
    return ("logp",) if plan == "direct" else ("logp", "entropy", "lse")


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_unscored_rows_are_never_read(backend, plan, dtype, garbage):
    case = make_case(rows=140, vocab=V, dtype=dtype, ignored=0.4, bias=True)
    outputs = OUTPUTS if plan != "direct" else ("logp", "is_top1", "mean_logits")
    results = []
    for filling in (0.0, garbage):
        hidden = torch.where(case.scored[:, None], case.hidden, filling)
        scores, leaves = scored(plan, backend, hidden, case.weight, case.target, outputs, case.bias)
        # A gradient that arrives at an unscored position goes nowhere either.
        upstream = torch.where(case.scored, 1.0, garbage)
        names = differentiable(plan)
        torch.autograd.backward([getattr(scores, name) for name in names], [upstream] * len(names))
        results.append(
            [value for value in scores if value is not None]
            + [leaf.grad for leaf in leaves.values()]
        )
        assert (leaves["hidden"].grad[~case.scored] == 0).all()
    for one, other in zip(*results, strict=True):
        assert torch.isfinite(one.float()).all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("garbage", [NAN, INF])
def test_rows_without_upstream_gradient_reach_no_gradient(backend, plan, garbage):
    case = make_case(rows=140, vocab=V, dtype=torch.float32)
    upstream = torch.randn(140)
    skipped = torch.arange(140) % 3 == 0
    upstream[skipped] = 0
    results = []
    for filling in (1.0, garbage):
        hidden = torch.where(skipped[:, None], filling, case.hidden)
        scores, leaves = scored(
            plan, backend, hidden, case.weight, case.target, differentiable(plan)
        )
        for name in differentiable(plan):
            getattr(scores, name).backward(upstream, retain_graph=True)
        results.append([leaf.grad for leaf in leaves.values()])
        assert (leaves["hidden"].grad[skipped] == 0).all()
    for one, other in zip(*results, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [-1, V, V + 7, -(2**40), 2**40])
def test_target_outside_the_vocabulary_is_nan_in_its_row(backend, plan, bad):
    case = make_case(rows=140, vocab=V, dtype=torch.float32)
    target = case.target.clone()
    rows = torch.tensor([0, 77, 139])
    target[rows] = bad
    bad_row = torch.zeros(140, dtype=torch.bool)
    bad_row[rows] = True
    scores, leaves = scored(plan, backend, case.hidden, case.weight, target, differentiable(plan))
    expected, _ = scored(plan, backend, case.hidden, case.weight, case.target)
    assert torch.equal(scores.logp.isnan(), bad_row)
    torch.testing.assert_close(scores.logp[~bad_row], expected.logp[~bad_row])
    # Left out of the loss, the row does no harm.
    torch.where(bad_row, 0.0, scores.logp).sum().backward()
    for leaf in leaves.values():
        assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_target_logit_of_minus_infinity(backend, plan, dtype):
    """logp is -inf, every other score finite, and the gradient that of onehot - softmax."""
    case = make_case(rows=140, vocab=V, dtype=dtype, bias=True)
    bias = case.bias.clone()
    bias[case.target[:5]] = -INF
    outputs = ("logp", "entropy", "lse", "log_sum_sq_probs", "is_top1")
    if plan == "direct":
        outputs = ("logp",)
    scores, leaves = scored(plan, backend, case.hidden, case.weight, case.target, outputs, bias)
    out = bias[case.target] == -INF
    assert torch.equal(scores.logp == -INF, out)
    for value in scores[1:]:
        assert value is None or torch.isfinite(value.float()).all()
    scores.logp.sum().backward()
    logits = case.hidden.double() @ case.weight.double().t() + bias.double()
    dz = torch.zeros_like(logits).scatter(1, case.target[:, None], 1.0) - logits.softmax(-1)
    expected = {
        "hidden": dz @ case.weight.double(),
        "weight": dz.t() @ case.hidden.double(),
        "bias": dz.sum(0),
    }
    tolerance = 64 * torch.finfo(dtype).eps
    for name, leaf in leaves.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(
            leaf.grad.double(), expected[name], rtol=0, atol=tolerance * scale, msg=name
        )


def test_entries_out_of_the_vocabulary(backend, plan):
    """A bias of -inf at entries that are no target: as if their rows of weight were not there."""
    case = make_case(rows=140, vocab=V, dtype=torch.float64, bias=True)
    out = torch.ones(V, dtype=torch.bool)
    out[case.target] = False
    out[::3] = False
    bias = torch.where(out, -INF, case.bias)
    names = differentiable(plan)
    scores, leaves = scored(plan, backend, case.hidden, case.weight, case.target, names, bias)
    index = torch.cumsum(~out, 0) - 1
    small, expected = scored(
        plan,
        backend,
        case.hidden,
        case.weight[~out],
        index[case.target],
        names,
        case.bias[~out],
    )
    for one, other in zip(scores, small, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other)
    sum(getattr(scores, name) for name in names).sum().backward()
    sum(getattr(small, name) for name in names).sum().backward()
    torch.testing.assert_close(leaves["hidden"].grad, expected["hidden"].grad)
    for name in set(leaves) - {"hidden"}:
        torch.testing.assert_close(leaves[name].grad[~out], expected[name].grad)
        assert (leaves[name].grad[out] == 0).all()


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_mean_logits_leave_excluded_ids_out(backend, plan, softcap):
    """Under a cap a bias of -inf is a logit of -softcap, and excludes nothing."""
    case = make_case(rows=8, vocab=V, dtype=torch.float32, bias=True)
    bias = case.bias.clone()
    bias[::3] = -INF
    options = ScoringOptions(backend=backend, **PLANS[plan])
    scores = linear_logprob(
        case.hidden,
        case.weight,
        case.target,
        bias=bias,
        softcap=softcap,
        outputs=("mean_logits",),
        options=options,
    )
    logits = case.hidden.double() @ case.weight.double().t() + bias.double()
    if softcap is None:
        logits = logits[:, ~bias.isinf()]
    else:
        logits = softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(scores.mean_logits.double(), logits.mean(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_hidden_is_nan_in_its_row_only(backend, plan, dtype, bad):
    case = make_case(rows=140, vocab=V, dtype=dtype)
    hidden = case.hidden.clone()
    hidden[70, 3] = bad
    outputs = ("logp",) if plan == "direct" else OUTPUTS
    scores, leaves = scored(plan, backend, hidden, case.weight, case.target, outputs)
    bad_row = torch.arange(140) == 70
    for name in outputs:
        if name in ("logp", "entropy", "log_sum_sq_probs"):
            assert torch.equal(getattr(scores, name).isnan(), bad_row), name
        if name in ("mean_logits", "lse"):
            assert torch.equal(~getattr(scores, name).isfinite(), bad_row), name
    scores.logp[~bad_row].sum().backward()
    for leaf in leaves.values():
        assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("at_target", [False, True])
def test_logit_of_plus_infinity_is_nan_in_its_row(backend, plan, at_target):
    case = make_case(rows=140, vocab=V, dtype=torch.float32)
    hidden, weight = case.hidden.clone(), case.weight.clone()
    hidden[:, 0] = 0
    column = case.target[70] if at_target else (case.target[70] + 1) % V
    weight[:, 0] = 0
    weight[column, 0] = 3e38
    hidden[70, 0] = 10
    scores, _ = scored(plan, backend, hidden, weight, case.target)
    assert torch.equal(scores.logp.isnan(), torch.arange(140) == 70)


def test_one_target_for_all_rows(backend, plan):
    case = make_case(rows=140, vocab=V, dtype=torch.float64)
    common = V - 3
    target = torch.full((140,), common)
    scores, leaves = scored(plan, backend, case.hidden, case.weight, target)
    (scores.logp * torch.linspace(-1, 1, 140)).sum().backward()
    logits = case.hidden @ case.weight.t()
    torch.testing.assert_close(scores.logp, logits.log_softmax(-1)[:, common])
    dz = -logits.softmax(-1)
    dz[:, common] += 1
    dz *= torch.linspace(-1, 1, 140)[:, None]
    torch.testing.assert_close(leaves["hidden"].grad, dz @ case.weight)
    if plan != "direct":
        torch.testing.assert_close(leaves["weight"].grad, dz.t() @ case.hidden)


def test_equal_logits(backend, plan):
    """Of equal logits the first counts as greatest, every p is 1 / V."""
    hidden = torch.zeros(140, 3)
    scores, leaves = scored(
        plan,
        backend,
        hidden,
        torch.randn(V, 3),
        torch.arange(140),
        ("logp",) if plan == "direct" else OUTPUTS,
    )
    torch.testing.assert_close(scores.logp, torch.full((140,), -float(V)).abs().log().neg())
    if plan != "direct":
        torch.testing.assert_close(scores.entropy, torch.full((140,), float(V)).log())
        torch.testing.assert_close(scores.log_sum_sq_probs, -torch.full((140,), float(V)).log())
        assert torch.equal(scores.mean_logits, torch.zeros(140))
        assert torch.equal(scores.is_top1, torch.arange(140) == 0)
    scores.logp.sum().backward()
    assert torch.isfinite(leaves["hidden"].grad).all()


def test_max_scored(backend, plan):
    case = make_case(rows=140, vocab=V, dtype=torch.float32, ignored=0.5)
    count = int(case.scored.sum())
    options = PLANS[plan]
    weight = case.weight.clone().requires_grad_(plan != "direct")
    hidden = case.hidden.clone().requires_grad_()

    def logp(max_scored):
        return linear_logprob(
            hidden,
            weight,
            case.target,
            options=ScoringOptions(backend=backend, max_scored=max_scored, **options),
        ).logp

    assert torch.equal(logp(count), logp(None))
    assert torch.equal(logp(1000), logp(None))
    with pytest.raises(ValueError, match=rf"max_scored.*max_scored={count - 1}.*{count}.*raise it"):
        logp(count - 1)


def test_bit_equal_run_to_run(backend, plan):
    case = make_case(rows=140, vocab=V, dtype=torch.bfloat16, ignored=0.2, bias=True)
    results = []
    for _ in range(5):
        scores, leaves = scored(
            plan, backend, case.hidden, case.weight, case.target, differentiable(plan), case.bias
        )
        values = [value for value in scores if value is not None]
        sum(values).backward(torch.linspace(-2, 1, 140))
        results.append([*values, *(leaf.grad for leaf in leaves.values())])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_results_may_be_changed_in_place(backend, plan, ignored):
    case = make_case(rows=140, vocab=V, dtype=torch.float32, ignored=ignored)
    outputs = differentiable(plan)
    gradients = []
    for change in (False, True):
        scores, leaves = scored(plan, backend, case.hidden, case.weight, case.target, outputs)
        loss = sum((k + 1) * getattr(scores, name).sum() for k, name in enumerate(outputs))
        if change:
            for name in outputs:
                getattr(scores, name).detach().fill_(NAN)
        loss.backward()
        gradients.append(leaves["hidden"].grad)
    assert torch.equal(*gradients)


def test_results_differentiate_through_in_place_changes(backend, plan):
    case = make_case(rows=140, vocab=V, dtype=torch.float32)
    gradients = []
    for change in (lambda logp: logp * 3, lambda logp: logp.mul_(3)):
        scores, leaves = scored(plan, backend, case.hidden, case.weight, case.target)
        change(scores.logp).sum().backward()
        gradients.append(leaves["hidden"].grad)
    assert torch.equal(*gradients)


def test_int32_targets_beside_a_wide_ignore_index(backend, plan):
    case = make_case(rows=140, vocab=V, dtype=torch.float32)
    target = case.target.int()
    target[:5] = 0
    options = ScoringOptions(backend=backend, **PLANS[plan])
    hidden = case.hidden.clone().requires_grad_()
    call = (hidden, case.weight, target)
    wide = linear_logprob(*call, ignore_index=2**32, options=options).logp
    assert torch.equal(wide, linear_logprob(*call, options=options).logp)
