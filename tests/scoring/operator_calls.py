# SPDX-License-Identifier: Apache-2.0
"""Arguments of the compiled operators, and what comes of a call, to the bit."""

import torch

NUMBERS = 10  # that score_batch_ returns of a row, the last its scale
EXACT = (torch.float32, torch.float64)
INF = float("inf")
BAD_VECTORS = [
    (torch.zeros(4), "shape"),
    (torch.zeros(3, 1), "shape"),
    (torch.zeros(3, dtype=torch.float64), "dtype"),
    (torch.zeros(6)[::2], "contiguous"),
]
PLACES = [
    (torch.tensor([0, 2, 9, 3, 1]), r"places must be in \[0, 9\), got 9"),
    (torch.tensor([0, -1, 8, 3, 1]), r"places must be in \[0, 9\), got -1"),
    (torch.zeros(5, 1).long(), "places.*shape"),
    (torch.zeros(5).int(), "places.*int64"),
    (torch.zeros(10).long()[::2], "places.*contiguous"),
    (torch.arange(4), r"\(4,\)|target.*\(5,\)|numbers.*\(10, 4\)|places.*5, got 4"),
]
SETTLED = {
    "exps": torch.zeros(3, 4),
    **{name: torch.zeros(3) for name in ("anchor", "sum", "offset", "best", "raw", "logit")},
    "column": torch.zeros(3).long(),
    "scale": 1.0,
    "cap": 0.0,
}


def exact_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def exp_rows_arguments(rows=3, cols=5, dtype=torch.float32, **changes):
    arguments = {
        "tile": torch.randn(rows, cols).to(dtype),
        "target": torch.zeros(rows, dtype=torch.long),
        "anchor": torch.zeros(rows, dtype=exact_of(dtype)),
        "bias": None,
        "scale": 1.0,
        "cap": 0.0,
        "factor": None,
        "write": True,
        "statistics": True,
    }
    return {**arguments, **changes}


def logit_grad_arguments(rows=3, cols=5, dtype=torch.float32, **changes):
    exact = exact_of(dtype)
    arguments = {
        "tile": torch.randn(rows, cols).to(dtype),
        "target": torch.zeros(rows, dtype=torch.long),
        "anchor": torch.zeros(rows, dtype=exact),
        "norm": torch.ones(rows, dtype=exact),
        "logp": torch.zeros(rows, dtype=exact),
        "grad_logp": torch.ones(rows, dtype=exact),
        "grad_lse": torch.ones(rows, dtype=exact),
        "grad_entropy": torch.ones(rows, dtype=exact),
        "entropy": torch.ones(rows, dtype=exact),
        "bias": torch.zeros(cols, dtype=exact),
        "scale": 1.0,
        "cap": 0.0,
        "factor": None,
    }
    return {**arguments, **changes}


def score_rows_arguments(rows=5, cols=37, dtype=torch.float32, **changes):
    arguments = {
        "tile": torch.randn(rows, cols).to(dtype),
        "hidden": torch.randn(rows, 8).to(dtype),
        "weight": torch.randn(cols, 8).to(dtype),
        "target": torch.randint(0, max(cols, 1), (rows,)),
        "bias": None,
        "scale": 1.0,
        "cap": 0.0,
        "write": True,
        "statistics": True,
    }
    return {**arguments, **changes}


def same_bits(one, other):
    """NaN equals NaN, and -0.0 is not 0.0."""
    assert one.dtype == other.dtype and one.shape == other.shape
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    nan = one.isnan()
    assert torch.equal(nan, other.isnan())
    assert torch.equal(one[~nan].view(size), other[~nan].view(size))


def outputs_and_tile(operator, arguments):
    tile = arguments["tile"].clone(memory_format=torch.preserve_format)
    return *operator(**{**arguments, "tile": tile}), tile


def places_of(total, rows):
    return torch.randperm(total)[:rows].sort().values


def gradient_rows_arguments(dtype=torch.float32, total=9, count=5, width=6, **changes):
    """Of a batch whose rows are ``total``, of which ``count`` have a gradient."""
    exact = exact_of(dtype)
    arguments = {
        "gradient": torch.randn(total, dtype=exact),
        "numbers": torch.randn(NUMBERS, count, dtype=exact),
        "rows": torch.randn(total, width).to(dtype),
        "places": places_of(total, count) if count < total else None,
        "rate": 0.7,
    }
    return {**arguments, **changes}


def spread_rows_arguments(dtype=torch.float32, total=9, count=5, width=6, **changes):
    arguments = {
        "out": torch.randn(total, width).to(dtype),
        "rows": torch.randn(count, width).to(dtype),
        "factor": torch.randn(count, dtype=exact_of(dtype)),
        "places": places_of(total, count),
    }
    return {**arguments, **changes}


def patterns(rows):
    """Which of the rows there are: none, one, some, all but one, all."""
    some = torch.rand(rows) < 0.4
    one = torch.arange(rows) == rows // 2
    return {"none": one & ~one, "one": one, "some": some, "but one": ~one, "all": one | ~one}
