# SPDX-License-Identifier: Apache-2.0
"""linear_logprob on the triton backend against float64: the error contract over schedules, logit
maps, odd shapes, overflowing rows and statistics."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastpref import ScoringOptions, explain, linear_logprob
from fastpref.scoring.backends import torch as torch_backend
from fastpref.scoring.backends import triton as triton_backend
from fastpref.scoring.slab import Projection, Slab
from fastpref.scoring.statistics import OUTPUTS
from fastpref.scoring.types import LogitMap
from tests.scoring.cases import Case, check_scores, make_case, run, upstream_of, verify
from tests.scoring.test_numbers import FEATURES, SCHEDULES, dtype_name, options_of

pytestmark = pytest.mark.skipif(not triton_backend.INTERPRETED, reason="on a GPU: pytest -m gpu")
dtypes = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=dtype_name,
)
# Three row tiles and five column tiles, none of them full; H takes a second, shorter step.
SIZES = {"rows": 70, "hidden": 40, "vocab": 315}


def options(dtype, schedule, **changes):
    return options_of("triton", dtype, **{**SCHEDULES[schedule], **changes}, vocab=SIZES["vocab"])


@pytest.mark.parametrize(
    "feature, schedule, dtype",
    [
        pytest.param(feature, schedule, dtype, marks=[] if sum(at) % 3 == 0 else pytest.mark.slow)
        for *at, feature, schedule, dtype in (
            (i, j, k, feature, schedule, dtype)
            for i, feature in enumerate(FEATURES)
            for j, schedule in enumerate(("auto", "recompute", "slabs"))
            for k, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
        )
    ],
)
def test_logp(dtype, schedule, feature):
    verify(options(dtype, schedule), dtype, **SIZES, **FEATURES[feature])


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize("feature", ["plain", "softcap"])
@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_all_outputs(dtype, schedule, feature):
    verify(
        options(dtype, schedule),
        dtype,
        outputs=OUTPUTS,
        differentiated=("logp", "entropy", "mean_logits", "lse"),
        **SIZES,
        **FEATURES[feature],
    )


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize("chunk_rows", [None, 33])
def test_without_gradient(dtype, chunk_rows):
    verify(
        ScoringOptions(backend="triton", chunk_rows=chunk_rows),
        dtype,
        outputs=OUTPUTS,
        differentiated=(),
        **SIZES,
        **FEATURES["softcap"],
    )


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize("feature", ["plain", "softcap"])
def test_frozen_head(dtype, feature):
    verify(options(dtype, "auto"), dtype, needs=("hidden",), **SIZES, **FEATURES[feature])


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize("below", [0.1, 1.0])
@pytest.mark.parametrize("schedule", ["keep", "recompute", "kept in part"])
@pytest.mark.parametrize("outputs", [("logp",), OUTPUTS], ids=["logp", "all"])
def test_targets_far_below_the_maximum(dtype, schedule, below, outputs):
    """100 to 1000 nats: the first exponentials overflow, and the rows are projected again."""
    verify(options(dtype, schedule), dtype, outputs=outputs, below=below, ignored=0.1, **SIZES)


@pytest.mark.heavy
@dtypes
def test_sharp_rows(dtype):
    for schedule in ("keep", "recompute"):
        verify(options(dtype, schedule), dtype, spread=60.0, **SIZES)


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize(
    "rows, hidden, vocab",
    [(1, 8, 1), (1, 48, 257), (65, 8, 63), (33, 32, 64), (32, 40, 65), (2, 24, 2)],
)
@pytest.mark.parametrize("outputs", [("logp",), OUTPUTS], ids=["logp", "all"])
def test_odd_sizes(dtype, rows, hidden, vocab, outputs):
    verify(
        ScoringOptions(backend="triton"),
        dtype,
        rows=rows,
        hidden=hidden,
        vocab=vocab,
        bias=True,
        outputs=outputs,
    )


@pytest.mark.heavy
def test_double_goes_through_a_tile():
    verify(ScoringOptions(backend="triton"), torch.float64, outputs=OUTPUTS, **SIZES)


def test_nothing_scored():
    case = make_case(rows=5, hidden=7, vocab=11, dtype=torch.float32)
    case.target.fill_(-100)
    hidden = case.hidden.clone().requires_grad_()
    scores = linear_logprob(
        hidden, case.weight, case.target, options=ScoringOptions(backend="triton")
    )
    scores.logp.sum().backward()
    assert not scores.logp.any() and not hidden.grad.any()


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_transposed_storage(dtype, which):
    case = make_case(dtype=dtype, **SIZES)
    lies = getattr(case, which).t().contiguous().t()
    check_gradients(replace(case, **{which: lies}), dtype, "auto")


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:All-NaN slice")
@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_alone(dtype, value):
    case = make_case(dtype=dtype, **SIZES)
    hidden = case.hidden.clone()
    hidden[3] = value
    given = ScoringOptions(backend="triton")
    clean = linear_logprob(case.hidden, case.weight, case.target, options=given).logp
    logp = linear_logprob(hidden, case.weight, case.target, options=given).logp
    others = torch.arange(len(logp)) != 3
    assert torch.equal(logp[others], clean[others])
    assert not torch.isfinite(logp[3])


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize("target", [-1, 315, 10**12])
def test_targets_outside_the_vocabulary(dtype, target):
    case = make_case(dtype=dtype, **SIZES)
    changed = case.target.clone()
    changed[3] = target
    hidden = case.hidden.clone().requires_grad_()
    logp = linear_logprob(
        hidden, case.weight, changed, options=ScoringOptions(backend="triton")
    ).logp
    assert logp.isnan().tolist() == [row == 3 for row in range(len(logp))]
    logp[torch.arange(len(logp)) != 3].sum().backward()
    assert hidden.grad.isfinite().all() and not hidden.grad[3].any()


def check_gradients(case: Case, dtype: torch.dtype, schedule: str) -> None:
    """The error contract, for a case that ``make_case`` does not make."""
    upstream = upstream_of(case, ("logp",))
    actual = run(case, options=options(dtype, schedule), upstream=upstream)
    eager, exact = (
        run(case.to(one), upstream=upstream, reference=True) for one in (dtype, torch.float64)
    )
    check_scores(case, actual, eager, exact)


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize("above", [13, 26, 39])
@pytest.mark.parametrize("map", [{}, {"softcap": 50.0}], ids=["plain", "capped"])
def test_targets_below_what_is_most_probable(dtype, above, map):
    """By what the first exponentials still hold: the rows are not projected again. The logits are
    small but for one, which eager has exactly."""
    case = make_case(dtype=dtype, spread=0.5, **SIZES, **map)
    hidden, weight, target = case.hidden.clone(), case.weight.clone(), case.target.clone()
    weight[:, 0], weight[7, 1:], hidden[:, 0] = 0, 0, 0
    weight[7, 0], hidden[::3, 0] = 1, above
    target[target == 7] = 8
    check_gradients(replace(case, hidden=hidden, weight=weight, target=target), dtype, "keep")


@pytest.mark.heavy
@dtypes
def test_logits_far_beyond_a_cap(dtype):
    """Their slopes are tiny, and must be so to a relative error."""
    sizes = {"rows": 65, "hidden": 8, "vocab": 130}
    verify(options(dtype, "keep"), dtype, spread=0.3, softcap=2.0, below=0.2, **sizes)


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_gradients_with_masked_columns(dtype, schedule):
    """A bias of -inf on half of the columns, none of them a target."""
    case = make_case(dtype=dtype, bias=True, ignored=0.2, **SIZES)
    bias = case.bias.clone()
    bias[torch.rand(len(bias), generator=torch.Generator().manual_seed(5)) < 0.5] = -torch.inf
    bias[case.target[case.scored]] = 0
    assert 50 < bias.isinf().sum() < 200
    case = replace(case, bias=bias)
    check_gradients(case, dtype, schedule)


@pytest.mark.heavy
@pytest.mark.parametrize("statistics", [False, True])
def test_masked_columns(statistics):
    """A bias of -inf takes columns out: the target's own, all others, and a whole column tile."""
    outputs = OUTPUTS if statistics else ("logp",)
    case = make_case(dtype=torch.float32, **SIZES)
    for allowed in (slice(0, 64), slice(64, 315), slice(5, 6)):
        bias = torch.full((SIZES["vocab"],), -torch.inf)
        bias[allowed] = 0
        target = case.target.clone()
        target[::2] = allowed.start
        exact = case.hidden.double() @ case.weight.double().t() + bias.double()
        log_p = exact.log_softmax(-1)
        scores = linear_logprob(
            case.hidden,
            case.weight,
            target,
            bias=bias,
            outputs=outputs,
            options=ScoringOptions(backend="triton"),
        )
        expected = log_p.gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(scores.logp.double(), expected, rtol=1e-5, atol=2e-6)
        if statistics:
            entropy = -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(1)
            torch.testing.assert_close(scores.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
            assert torch.equal(scores.is_top1, exact.argmax(1) == target)


@pytest.mark.heavy
@pytest.mark.parametrize("statistics", [False, True])
def test_a_shard_of_nothing_but_minus_infinity_has_a_finite_anchor(statistics):
    """Whatever another shard adds must not turn NaN."""
    hidden, weight = torch.randn(3, 8), torch.randn(70, 8)
    slab = Slab(weight, torch.full((70,), -torch.inf), LogitMap(1.0, 0.0))
    anchor = torch.tensor([0.5, -torch.inf, torch.nan])
    sums = triton_backend.project(
        Projection(hidden, slab, None, torch.tensor([-1, 0, 69])), anchor, False, statistics
    )
    assert sums.sum.tolist() == [0, 0, 0]
    assert sums.anchor.isfinite().all() and sums.anchor[0] == 0.5
    if statistics:
        assert sums.weighted.tolist() == sums.squares.tolist() == [0, 0, 0]


@pytest.mark.heavy
def test_a_cap_far_above_the_logits_costs_no_digits():
    """tanh of a thousandth, times a thousand."""
    verify(ScoringOptions(backend="triton"), torch.float32, softcap=1000.0, **SIZES)


@pytest.mark.heavy
@dtypes
def test_the_same_bits_every_time(dtype):
    case = make_case(dtype=dtype, below=0.2, **SIZES)
    upstream = upstream_of(case, ("logp",))
    runs = [
        run(case, options=ScoringOptions(backend="triton"), upstream=upstream) for _ in range(2)
    ]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@pytest.mark.heavy
@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_only_doubles_take_a_pass_in_place(monkeypatch, schedule):
    double = triton_backend.temporary_bytes(10, 5000, "cpu", torch.float64, False)
    assert double == torch_backend.temporary_bytes(10, 5000, "cpu", torch.float64, False)

    def in_place(*arguments):
        raise RuntimeError("a pass in place")

    other = SimpleNamespace(
        temporary_bytes=lambda *sizes: 0,
        project=in_place,
        project_gradient=in_place,
    )
    monkeypatch.setattr(triton_backend, "_in_place", lambda device_type: other)
    for dtype in triton_backend.DTYPES:
        verify(options(dtype, schedule), dtype, **SIZES)
    with pytest.raises(RuntimeError, match="a pass in place"):
        verify(options(torch.float64, schedule), torch.float64, **SIZES)


@pytest.mark.heavy
def test_scoring_takes_no_tile(monkeypatch):
    """But for the rows of one that operands at odd addresses take."""
    other = SimpleNamespace(temporary_bytes=lambda *sizes: 0)
    monkeypatch.setattr(triton_backend, "_in_place", lambda device_type: other)
    case = make_case(dtype=torch.bfloat16, **{**SIZES, "rows": 5000})
    arguments = (case.hidden, case.weight, case.target)
    plan = explain(*arguments, options=ScoringOptions(backend="triton", memory_budget=1 << 20))
    assert plan.schedule == "score" and not plan.scores_in_tiles
    rows = plan.workspace_bytes - plan.saved_bytes - 5000 * SIZES["hidden"] * 2
    assert rows <= 512 * SIZES["vocab"] * 2
