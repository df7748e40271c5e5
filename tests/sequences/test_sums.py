# SPDX-License-Identifier: Apache-2.0
"""sequence_logp against plain float64 loops, in every layout."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.sequences import sequence_logp
from fastpref.sequences import sums as summing

LENGTHS = [3, 0, 1, 7, 0]
N, B, T = sum(LENGTHS), len(LENGTHS), 8


def case(seed=0, dtype=torch.float64):
    """The same tokens padded and packed: (padded logp, mask, weights), (packed logp, ...)."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for b, length in enumerate(LENGTHS):
        mask[b, torch.randperm(T, generator=generator)[:length]] = True
    logp = -5 * torch.rand(B, T, generator=generator, dtype=torch.float64)
    weights = 2 * torch.rand(B, T, generator=generator, dtype=torch.float64)
    logp = logp.to(dtype)
    cu_seqlens = torch.tensor([0, *np.cumsum(LENGTHS)])
    ids = torch.arange(B).repeat_interleave(torch.tensor(LENGTHS))
    return (logp, mask, weights), (logp[mask], cu_seqlens, ids, weights[mask])


def loop(logp, mask, weights=None, reduction="sum"):
    sums = []
    for b in range(logp.shape[0]):
        terms = [
            float(logp[b, t]) * (1.0 if weights is None else float(weights[b, t]))
            for t in range(logp.shape[1])
            if mask[b, t]
        ]
        total = float(np.sum(np.array(terms, dtype=np.float64)))
        sums.append(total / max(len(terms), 1) if reduction == "mean" else total)
    return torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("layout", ["mask", "cu_seqlens", "sequence_ids", "shuffled_ids"])
def test_against_a_loop(layout, reduction, weighted):
    (padded, mask, weights), (packed, cu_seqlens, ids, packed_weights) = case()
    expected = loop(padded, mask, weights if weighted else None, reduction)
    kwargs = {"reduction": reduction}
    if layout == "mask":
        padded = padded.masked_fill(~mask, float("nan"))
        weights = weights.masked_fill(~mask, float("nan"))
        kwargs |= {"mask": mask, "token_weights": weights if weighted else None}
        actual = sequence_logp(padded, **kwargs)
    elif layout == "cu_seqlens":
        kwargs |= {"cu_seqlens": cu_seqlens.int(), "token_weights": packed_weights}
        actual = sequence_logp(packed, **kwargs | ({} if weighted else {"token_weights": None}))
    else:
        ignored = torch.full((4,), float("nan"), dtype=torch.float64)
        packed = torch.cat([ignored, packed])
        packed_weights = torch.cat([ignored, packed_weights])
        ids = torch.cat([torch.tensor([-1, -100, -1, -7]), ids])
        if layout == "shuffled_ids":
            order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
            packed, packed_weights, ids = packed[order], packed_weights[order], ids[order]
        kwargs |= {"sequence_ids": ids, "num_sequences": B}
        kwargs |= {"token_weights": packed_weights if weighted else None}
        actual = sequence_logp(packed, **kwargs)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    assert actual[1] == 0 and actual[4] == 0


def test_padded_sum_without_mask_takes_every_token():
    (padded, _, _), _ = case()
    torch.testing.assert_close(sequence_logp(padded), padded.sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_is_fp32_rounded_once(dtype):
    (padded, mask, _), (packed, cu_seqlens, ids, _) = case(dtype=dtype)
    expected = loop(padded.double(), mask).float()
    for actual in (
        sequence_logp(padded, mask=mask),
        sequence_logp(packed, cu_seqlens=cu_seqlens),
        sequence_logp(packed, sequence_ids=ids, num_sequences=B),
    ):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


def test_long_sequences_keep_fp32_accuracy():
    logp = torch.full((200_000,), -0.1)
    expected = logp.double().sum().float()
    boundaries = torch.tensor([0, 200_000])
    ids = torch.zeros(200_000, dtype=torch.int64)
    assert sequence_logp(logp[None])[0] == expected
    assert sequence_logp(logp, cu_seqlens=boundaries)[0] == expected
    assert sequence_logp(logp, sequence_ids=ids, num_sequences=1)[0] == expected


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradcheck(reduction):
    (padded, mask, weights), (packed, cu_seqlens, ids, packed_weights) = case()
    ids = torch.where(torch.arange(N) == 2, -1, ids)
    calls = [
        (padded, weights, {"mask": mask}),
        (packed, packed_weights, {"cu_seqlens": cu_seqlens}),
        (packed, packed_weights, {"sequence_ids": ids, "num_sequences": B}),
    ]
    for logp, token_weights, layout in calls:
        assert torch.autograd.gradcheck(
            lambda x, w: sequence_logp(x, token_weights=w, reduction=reduction, **layout),  # noqa: B023
            (logp.clone().requires_grad_(), token_weights.clone().requires_grad_()),
        )


def test_nan_outside_the_mask_reaches_no_gradient():
    (padded, mask, weights), _ = case()
    padded = padded.masked_fill(~mask, float("nan")).requires_grad_()
    weights = weights.masked_fill(~mask, float("nan")).requires_grad_()
    sums = sequence_logp(padded, mask=mask, token_weights=weights)
    for gradient in torch.autograd.grad(sums.sum(), (padded, weights)):
        assert (gradient[~mask] == 0).all() and torch.isfinite(gradient).all()


def test_nan_in_one_sequence_stays_there():
    _, (packed, cu_seqlens, ids, _) = case()
    packed[0] = float("nan")
    packed[3] = -float("inf")
    for layout in ({"cu_seqlens": cu_seqlens}, {"sequence_ids": ids, "num_sequences": B}):
        sums = sequence_logp(packed, **layout)
        assert sums[0].isnan() and sums[2] == -float("inf") and torch.isfinite(sums[3:]).all()


def test_integer_mask_is_a_mask():
    (padded, mask, _), _ = case()
    assert torch.equal(sequence_logp(padded, mask=mask.long()), sequence_logp(padded, mask=mask))


@pytest.mark.parametrize("shape", ["no tokens", "no sequences", "neither"])
def test_nothing_to_sum_stays_connected(shape):
    tokens = torch.randn(3 if shape == "no sequences" else 0, requires_grad=True)
    count = 2 if shape == "no tokens" else 0
    ids = torch.full(tokens.shape, -1)
    calls = [sequence_logp(tokens, sequence_ids=ids, num_sequences=count)]
    if shape != "no sequences":
        cu_seqlens = torch.zeros(count + 1, dtype=torch.int64)
        calls.append(sequence_logp(tokens, cu_seqlens=cu_seqlens))
    for sums in calls:
        assert sums.tolist() == [0.0] * count
        gradient = torch.autograd.grad(sums.sum(), tokens)[0]
        assert gradient.shape == tokens.shape and (gradient == 0).all()


@given(
    ids=st.lists(st.integers(-2, 4), max_size=40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_sorted_form_equals_index_add(ids, seed):
    """What runs on a GPU, here on the CPU."""
    ids = torch.tensor(ids, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(ids), generator=generator, dtype=torch.float64)
    values = torch.where(ids >= 0, values, 0).requires_grad_()
    ids = ids.clamp(min=0)
    grad = torch.randn(5, generator=generator, dtype=torch.float64)
    results = []
    for form in (summing._sum_by_id, summing._sum_by_sorted_id):
        sums = form(values, ids, 5)
        results.append((sums.detach(), torch.autograd.grad(sums, values, grad)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-13, atol=1e-13)


X, XX = torch.zeros(4), torch.zeros(2, 3)
CU, IDS = torch.tensor([0, 1, 4]), torch.zeros(4, dtype=torch.int64)
ERRORS = {
    "integer logp": (TypeError, "logp must be floating point", (X.long(),), {}),
    "3-D logp": (ValueError, r"\(B, T\) padded or \(N,\) packed", (XX[None],), {}),
    "packed without layout": (ValueError, "needs cu_seqlens, or sequence_ids", (X,), {}),
    "packed with mask": (ValueError, "mask belongs", (X,), {"mask": X > 0}),
    "cu_seqlens and mask": (ValueError, "stands alone", (X,), {"cu_seqlens": CU, "mask": X > 0}),
    "cu_seqlens and ids": (
        ValueError,
        "stands alone",
        (X,),
        {"cu_seqlens": CU, "sequence_ids": IDS},
    ),
    "cu_seqlens and count": (
        ValueError,
        "stands alone",
        (X,),
        {"cu_seqlens": CU} | {"num_sequences": 2},
    ),
    "ids and mask": (
        ValueError,
        "negative there instead",
        (X,),
        {"sequence_ids": IDS, "num_sequences": 1, "mask": X > 0},
    ),
    "ids without count": (ValueError, "needs num_sequences", (X,), {"sequence_ids": IDS}),
    "negative count": (
        ValueError,
        "num_sequences must be >= 0, got -1",
        (X,),
        {"sequence_ids": IDS, "num_sequences": -1},
    ),
    "id too large": (
        ValueError,
        "below num_sequences = 2, got 2",
        (X,),
        {"sequence_ids": IDS + 2, "num_sequences": 2},
    ),
    "padded with cu_seqlens": (ValueError, "describe packed logp", (XX,), {"cu_seqlens": CU}),
    "padded with count": (ValueError, "describe packed logp", (XX,), {"num_sequences": 2}),
    "padded mean without mask": (ValueError, "needs mask", (XX,), {"reduction": "mean"}),
    "mask shape": (
        ValueError,
        r"mask must be shaped like logp, \(2, 3\)",
        (XX,),
        {"mask": XX[0] > 0},
    ),
    "list of logp": (TypeError, "logp must be a torch.Tensor, got list", ([1.0],), {}),
    "list mask": (TypeError, "mask must be a torch.Tensor, got list", (XX,), {"mask": [[1]]}),
    "complex mask": (TypeError, "mask must be real", (XX,), {"mask": XX.cfloat()}),
    "float num_sequences": (
        TypeError,
        "num_sequences must be an int or None, got float",
        (X,),
        {"sequence_ids": IDS, "num_sequences": 4.0},
    ),
    "float mask": (TypeError, "weights go into token_weights", (XX,), {"mask": XX}),
    "weights shape": (ValueError, "token_weights must be shaped", (XX,), {"token_weights": XX[0]}),
    "ids shape": (
        ValueError,
        "sequence_ids must be shaped",
        (X,),
        {"sequence_ids": IDS[:2], "num_sequences": 1},
    ),
    "float ids": (
        TypeError,
        "sequence_ids must be an integer",
        (X,),
        {"sequence_ids": X, "num_sequences": 1},
    ),
    "float cu_seqlens": (
        TypeError,
        "cu_seqlens must be an integer",
        (X,),
        {"cu_seqlens": CU * 1.0},
    ),
    "2-D cu_seqlens": (ValueError, r"must be \(B \+ 1,\)", (X,), {"cu_seqlens": CU[None]}),
    "short cu_seqlens": (ValueError, "from 0 to N = 4, got 0 to 1", (X,), {"cu_seqlens": CU[:2]}),
    "late cu_seqlens": (ValueError, "got 1 to 4", (X,), {"cu_seqlens": CU[1:]}),
    "falling cu_seqlens": (
        ValueError,
        "not rising throughout",
        (X,),
        {"cu_seqlens": torch.tensor([0, 3, 2, 4])},
    ),
    "other device": (
        ValueError,
        "cu_seqlens is on meta and logp on cpu",
        (X,),
        {"cu_seqlens": CU.to("meta")},
    ),
    "reduction": (ValueError, "reduction must be 'sum' or 'mean'", (XX,), {"reduction": "max"}),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_boundaries_of_any_integer_dtype(dtype):
    expected = sequence_logp(X, cu_seqlens=CU)
    assert torch.equal(sequence_logp(X, cu_seqlens=CU.to(dtype)), expected)


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    error, message, args, kwargs = ERRORS[name]
    with pytest.raises(error, match=message):
        sequence_logp(*args, **kwargs)


@pytest.mark.parametrize("layout", ["cu_seqlens", "sequence_ids"])
def test_compiles_without_a_graph_break(layout):
    _, (packed, cu_seqlens, ids, _) = case()
    kwargs = {"cu_seqlens": cu_seqlens}
    if layout == "sequence_ids":
        kwargs = {"sequence_ids": ids, "num_sequences": B}
    compiled = torch.compile(sequence_logp, fullgraph=True, backend="eager")
    assert torch.equal(compiled(packed, **kwargs), sequence_logp(packed, **kwargs))


@pytest.mark.parametrize("score", [np.nan, -np.inf, np.inf, -3.0])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("layout", ["mask", "cu_seqlens", "sequence_ids"])
def test_a_weight_of_0_takes_its_token_out(layout, reduction, score):
    """Of value and gradients, but counts as scored; and another token's NaN does not come to it."""
    (padded, mask, weights), (packed, cu_seqlens, ids, packed_weights) = case()
    logp, weights = (padded, weights) if layout == "mask" else (packed, packed_weights)
    kwargs = {
        "mask": {"mask": mask},
        "cu_seqlens": {"cu_seqlens": cu_seqlens},
        "sequence_ids": {"sequence_ids": ids, "num_sequences": B},
    }[layout]
    out = torch.zeros_like(logp, dtype=torch.bool)
    places = mask.nonzero() if layout == "mask" else torch.arange(N)[:, None]
    out[places[[1, 5]].unbind(1)] = True
    weights = weights.masked_fill(out, 0.0).requires_grad_()
    given = logp.masked_fill(out, score).requires_grad_()
    sums = sequence_logp(given, token_weights=weights, reduction=reduction, **kwargs)
    want = sequence_logp(
        logp.masked_fill(out, 0.0), token_weights=weights, reduction=reduction, **kwargs
    )
    assert torch.equal(sums, want)
    d_logp, d_weights = torch.autograd.grad(sums.sum(), (given, weights), retain_graph=True)
    (factors,) = torch.autograd.grad(want.sum(), weights)
    assert not d_logp[out].any() and d_logp.isfinite().all()
    assert torch.equal(d_weights[~out], factors[~out])
    scale = d_logp.detach()[~out][0] / weights.detach()[~out][0]  # of the first sequence
    expected = score if np.isfinite(score) else 0.0
    assert d_weights[out][0] == pytest.approx(float(scale) * expected)
    (d_logp,) = torch.autograd.grad(sums, given, torch.full_like(sums, torch.nan))
    assert not d_logp[out].any()


def test_packed_rows_with_a_leading_dimension_of_one():
    """As the collators of FlashAttention give them."""
    _, (packed, cu_seqlens, ids, weights) = case()
    given = packed[None].requires_grad_()
    for layout in (
        {"cu_seqlens": cu_seqlens.int()},
        {"sequence_ids": ids, "num_sequences": B},
    ):
        wide = {key: one[None] if key == "sequence_ids" else one for key, one in layout.items()}
        for reduction in ("sum", "mean"):
            own = sequence_logp(given, token_weights=weights[None], reduction=reduction, **wide)
            flat = sequence_logp(packed, token_weights=weights, reduction=reduction, **layout)
            assert torch.equal(own, flat)
    (gradient,) = torch.autograd.grad(sequence_logp(given, cu_seqlens=cu_seqlens).sum(), given)
    assert torch.equal(gradient, torch.ones(1, N, dtype=torch.float64))
    with pytest.raises(ValueError, match="describe packed logp"):
        sequence_logp(torch.zeros(2, N), cu_seqlens=cu_seqlens)
