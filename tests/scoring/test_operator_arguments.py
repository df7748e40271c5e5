# SPDX-License-Identifier: Apache-2.0
"""What the compiled operators refuse, each argument by its name."""

import pytest
import torch

from tests.scoring.cases import BACKENDS
from tests.scoring.operator_calls import (
    BAD_VECTORS,
    PLACES,
    SETTLED,
    exp_rows_arguments,
    gradient_rows_arguments,
    logit_grad_arguments,
    score_rows_arguments,
    spread_rows_arguments,
)

pytestmark = pytest.mark.skipif("cpp" not in BACKENDS, reason="the operators are not built")
ops = torch.ops.fastpref


@pytest.mark.parametrize("call", [exp_rows_arguments, logit_grad_arguments])
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("tile", torch.zeros(3), "tile.*rows, cols"),
        ("tile", torch.zeros(3, 5, dtype=torch.int32), "tile.*float64.*float16.*cast"),
        ("tile", torch.zeros(5, 3).t(), "tile.*contiguous rows.*stride"),
        ("target", torch.zeros(3, dtype=torch.int32), "target.*int64"),
        ("target", torch.zeros(2, dtype=torch.long), r"target.*\(3,\)"),
        ("bias", torch.zeros(4), r"bias.*\(5,\)"),
        ("bias", torch.zeros(5, dtype=torch.float64), "bias.*dtype"),
        *(("anchor", value, f"anchor.*{message}") for value, message in BAD_VECTORS),
        *(("factor", value, f"factor.*{message}") for value, message in BAD_VECTORS),
    ],
)
def test_argument_checks(call, name, value, message):
    arguments = call(**{name: value})
    with pytest.raises(RuntimeError, match=message):
        (ops.exp_rows_ if call is exp_rows_arguments else ops.logit_grad_)(**arguments)


@pytest.mark.parametrize(
    "name", ["norm", "logp", "grad_logp", "grad_lse", "grad_entropy", "entropy"]
)
@pytest.mark.parametrize("value, message", BAD_VECTORS)
def test_row_vectors_of_logit_grad(name, value, message):
    with pytest.raises(RuntimeError, match=f"{name}.*{message}"):
        ops.logit_grad_(**logit_grad_arguments(**{name: value}))


def test_entropy_comes_with_its_gradient():
    with pytest.raises(RuntimeError, match="entropy must come with grad_entropy"):
        ops.logit_grad_(**logit_grad_arguments(entropy=None))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("tile", torch.zeros(5), "tile.*rows, cols"),
        ("tile", torch.zeros(37, 5).t(), "tile.*contiguous rows.*stride"),
        ("tile", torch.zeros(5, 37).double(), "hidden.*dtype of tile"),
        ("tile", torch.zeros(5, 36), "weight.*36 columns of tile.*37"),
        ("tile", torch.zeros(4, 37), r"target.*\(4,\)"),
        ("target", torch.zeros(5).int(), "target.*int64"),
        ("target", torch.zeros(4).long(), r"target.*\(5,\)"),
        ("target", torch.zeros(5, 2).long(), r"target.*\(5,\)"),
        ("target", torch.zeros(10).long()[::2], "target.*contiguous"),
        ("bias", torch.zeros(36), r"bias.*\(37,\)"),
        ("bias", torch.zeros(37).double(), "bias.*dtype"),
        ("bias", torch.zeros(74)[::2], "bias.*contiguous"),
        ("hidden", torch.zeros(4, 8), r"hidden.*\(5, H\)"),
        ("hidden", torch.zeros(5), r"hidden.*\(5, H\)"),
        ("hidden", torch.zeros(8, 5).t(), "hidden.*contiguous rows"),
        ("weight", torch.zeros(37, 7), r"weight.*\(rows, 8\)"),
        ("weight", torch.zeros(36, 8), "weight.*37 columns of tile.*36"),
        ("weight", torch.zeros(37, 8).double(), "weight.*dtype"),
        ("weight", torch.zeros(8, 37).t(), "weight.*contiguous rows"),
    ],
)
def test_arguments_of_score_rows(name, value, message):
    with pytest.raises(RuntimeError, match=message):
        ops.score_rows_(**score_rows_arguments(**{name: value}))


def test_rows_of_integers_are_not_scored():
    with pytest.raises(RuntimeError, match=r"tile.*float64.*float16.*cast"):
        ops.score_rows_(**score_rows_arguments(dtype=torch.int32))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("target", torch.zeros(9).int(), "target.*int64"),
        ("target", torch.zeros(18).long()[::2], "target.*contiguous"),
        ("tile", torch.zeros(37, 5).t(), "tile.*contiguous rows.*stride"),
        ("weight", torch.zeros(36, 8), "weight.*37 columns of tile.*36"),
        *(("places", value, message) for value, message in PLACES),
    ],
)
def test_arguments_of_score_batch(name, value, message):
    arguments = score_rows_arguments(target=torch.zeros(9).long(), places=torch.arange(5))
    del arguments["statistics"]
    with pytest.raises(RuntimeError, match=message):
        ops.score_batch_(**{**arguments, name: value})


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("gradient", torch.zeros(9).double(), "gradient.*dtype of rows"),
        ("gradient", torch.zeros(9).half(), "gradient.*dtype of rows"),
        ("rows", torch.zeros(9, 6).int(), "rows.*float64.*float16"),
        ("rows", torch.zeros(6, 9).t(), r"rows.*\(\.\.\., H\).*contiguous"),
        ("rows", torch.tensor(1.0), r"rows.*\(\.\.\., H\).*contiguous"),
        ("rows", torch.zeros(8, 6), "rows.*9 of gradient or the 5 at places, got 8"),
        ("rows", torch.zeros(9, 6).double(), "gradient.*dtype of rows"),
        ("numbers", torch.zeros(9, 5), r"numbers.*\(10, 5\), got 2 dim.* 45 el"),
        ("numbers", torch.zeros(10, 9), r"numbers.*\(10, 5\), got 2 dim.* 90 el"),
        ("numbers", torch.zeros(10), r"numbers.*\(10, 5\), got 1 dim"),
        ("rows", torch.zeros(8, 0), "rows.*9 of gradient or the 5 at places, got 8"),
        ("numbers", torch.zeros(10, 5).double(), "numbers.*dtype of gradient"),
        ("numbers", torch.zeros(5, 10).t(), "numbers.*contiguous"),
        *(("places", value, message) for value, message in PLACES),
    ],
)
def test_arguments_of_gradient_rows(name, value, message):
    with pytest.raises(RuntimeError, match=message):
        ops.gradient_rows(**gradient_rows_arguments(**{name: value}))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("rows", torch.zeros(5, 6).int(), "rows.*float64.*float16"),
        ("rows", torch.zeros(5), r"rows.*\(rows, H\)"),
        ("rows", torch.zeros(6, 5).t(), r"rows.*contiguous"),
        ("out", torch.zeros(9, 6).double(), "out.*dtype of rows"),
        ("out", torch.zeros(6, 9).t(), "out.*contiguous"),
        ("out", torch.zeros(9, 5), r"out.*\(\.\.\., 6\), got 2 dim.* 45 el"),
        ("out", torch.zeros(18, 3), r"out.*\(\.\.\., 6\), got 2 dim.* 54 el"),
        ("out", torch.tensor(1.0), r"out.*\(\.\.\., 6\), got 0 dim"),
        ("factor", torch.zeros(5).double(), "factor.*dtype"),
        ("factor", torch.zeros(4), r"factor.*\(5,\)"),
        *(("places", value, message) for value, message in PLACES),
    ],
)
def test_arguments_of_spread_rows(name, value, message):
    with pytest.raises(RuntimeError, match=message):
        ops.spread_rows_(**spread_rows_arguments(**{name: value}))


def test_rows_are_not_spread_over_themselves():
    given = spread_rows_arguments(total=5, count=5)
    with pytest.raises(RuntimeError, match="out must not be rows"):
        ops.spread_rows_(**{**given, "out": given["rows"]})
    none = ops.spread_rows_(torch.ones(9, 0), torch.ones(5, 0), given["factor"], torch.arange(5))
    assert none is None


VECTOR = {"gradient": torch.zeros(3), "scale": torch.zeros(3), "rate": 1.0}


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("gradient", torch.zeros(3, 1), "gradient.*shape.*2 dimensions"),
        ("gradient", torch.tensor(1.0), "gradient.*shape.*0 dimensions"),
        ("gradient", torch.zeros(6)[::2], "gradient.*contiguous"),
        ("gradient", torch.zeros(3).half(), "gradient.*float32 or float64"),
        ("gradient", torch.zeros(3).long(), "gradient.*float32 or float64"),
        *(("scale", value, f"scale.*{message}") for value, message in BAD_VECTORS),
    ],
)
def test_arguments_of_gradient_factors(name, value, message):
    with pytest.raises(RuntimeError, match=message):
        ops.gradient_factors(**{**VECTOR, name: value})


@pytest.mark.parametrize(
    "operator, value, message",
    [
        ("scored_places", torch.zeros(6).long()[::2], "target.*contiguous"),
        ("scored_places", torch.zeros(3).int(), "target.*int64"),
        ("scored_places", torch.zeros(3), "target.*int64"),
        ("nonzero_places", torch.zeros(3, 1), "gradient.*shape.*2 dimensions"),
        ("nonzero_places", torch.tensor(3.0), "gradient.*shape.*0 dimensions"),
        ("nonzero_places", torch.zeros(6)[::2], "gradient.*contiguous"),
        ("nonzero_places", torch.zeros(3).half(), "gradient.*float32 or float64"),
        ("nonzero_places", torch.zeros(3).long(), "gradient.*float32 or float64"),
    ],
)
def test_arguments_of_places(operator, value, message):
    rest = (-100,) if operator == "scored_places" else ()
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, operator)(value, *rest)


MATRICES = {
    "hidden": torch.zeros(3, 4),
    "weight": torch.zeros(9, 4),
    "target": torch.zeros(3).long(),
    "bias": torch.zeros(9),
    "scale": 1.0,
    "cap": 0.0,
}
ROWS = {"out": torch.zeros(3, 4), "input": torch.zeros(3, 4), "factor": torch.zeros(3)}


@pytest.mark.parametrize(
    "op, name, value, message",
    [
        ("target_logits", "hidden", torch.zeros(4), "hidden.*rows, H"),
        ("target_logits", "hidden", torch.zeros(4, 3).t()[:3], "hidden.*contiguous rows"),
        ("target_logits", "hidden", torch.zeros(3, 4).int(), "hidden.*float64.*float16"),
        ("target_logits", "weight", torch.zeros(9, 5), "weight.*rows, 4"),
        ("target_logits", "weight", torch.zeros(9, 4).double(), "weight.*dtype"),
        ("target_logits", "target", torch.zeros(2).long(), r"target.*\(3,\)"),
        ("target_logits", "target", torch.zeros(3).int(), "target.*int64"),
        ("target_logits", "bias", torch.zeros(4), r"bias.*\(9,\)"),
        ("target_logits", "bias", torch.zeros(9).double(), "bias.*dtype"),
        ("settle_rows_", "exps", torch.zeros(3), r"exps.*rows, V"),
        ("settle_rows_", "exps", torch.zeros(3, 4).int(), "exps.*float64.*float16"),
        ("settle_rows_", "exps", torch.zeros(2, 4), "exps.*3 rows"),
        ("settle_rows_", "exps", torch.zeros(4, 3).t(), "exps.*contiguous rows"),
        ("settle_rows_", "anchor", torch.zeros(3, 1), r"anchor.*\(rows,\)"),
        ("settle_rows_", "column", torch.zeros(3).int(), "column.*int64"),
        *(
            ("settle_rows_", name, value, f"{name}.*{message}")
            for name in ("sum", "offset", "best", "raw", "logit")
            for value, message in BAD_VECTORS
        ),
        ("scale_rows_", "input", torch.zeros(3), r"rows, H"),
        ("scale_rows_", "out", torch.zeros(2, 4), r"out.*rows, H"),
        ("scale_rows_", "out", torch.zeros(3, 5), r"out.*rows, 4"),
        ("scale_rows_", "out", torch.zeros(3, 4).half(), "out.*dtype"),
        ("scale_rows_", "factor", torch.zeros(3).double(), "factor.*dtype"),
        ("scale_rows_", "factor", torch.zeros(4), r"factor.*\(3,\)"),
    ],
)
def test_matrix_argument_checks(op, name, value, message):
    given = {"target_logits": MATRICES, "settle_rows_": SETTLED, "scale_rows_": ROWS}[op]
    arguments = {**given, name: value}
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(**arguments)
