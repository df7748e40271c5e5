# SPDX-License-Identifier: Apache-2.0
"""The error contract of linear_logprob, outputs and gradients, for every backend, schedule, budget
and dtype."""

from dataclasses import replace

import pytest
import torch

from fastpref import ScoringOptions, linear_logprob
from fastpref.scoring.statistics import OUTPUTS
from tests.scoring.cases import BACKENDS, DTYPES, INPUTS, make_case, run, upstream_of, verify

# Of 140 rows; budgets are in rows, 0 stands for the least tile: three slabs, three row groups.
VOCAB = 2051
SCHEDULES = {
    "auto": {},
    "keep": {"schedule": "keep"},
    "recompute": {"schedule": "recompute"},
    "kept in part": {"schedule": "keep", "rows": 100},
    "slabs": {"schedule": "recompute", "rows": 100},
    "least tile": {"rows": 0},
    "chunked": {"schedule": "recompute", "chunk_rows": 50},
}
FEATURES = {
    "plain": {},
    "bias": {"bias": True, "ignored": 0.3},
    "temperature": {"temperature": 0.7, "logit_scale": 0.5},
    "negative scale": {"logit_scale": -1.3, "bias": True},
    "softcap": {"softcap": 5.0, "temperature": 1.5, "bias": True, "ignored": 0.3},
}


def options_of(backend, dtype, schedule="auto", rows=None, chunk_rows=None, vocab=VOCAB):
    budget = None if rows is None else max(1, rows * vocab * dtype.itemsize)
    return ScoringOptions(
        backend=backend, schedule=schedule, memory_budget=budget, chunk_rows=chunk_rows
    )


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


pytestmark = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@dtypes
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logp(backend, dtype, schedule, feature):
    options = options_of(backend, dtype, **SCHEDULES[schedule])
    verify(options, dtype, vocab=VOCAB, **FEATURES[feature])


@dtypes
@pytest.mark.parametrize("feature", ["plain", "softcap"])
@pytest.mark.parametrize("schedule", ["auto", "chunked", "slabs", "least tile"])
def test_direct(backend, dtype, schedule, feature):
    options = options_of(backend, dtype, **{**SCHEDULES[schedule], "schedule": "direct"})
    verify(options, dtype, vocab=VOCAB, needs=("hidden",), **FEATURES[feature])


@dtypes
@pytest.mark.parametrize("needs", [("weight",), ("bias",), ("hidden", "bias")], ids="+".join)
@pytest.mark.parametrize("schedule", ["keep", "kept in part"])
def test_some_inputs_frozen(backend, dtype, schedule, needs):
    options = options_of(backend, dtype, **SCHEDULES[schedule])
    verify(options, dtype, vocab=VOCAB, needs=needs, **FEATURES["softcap"])


@dtypes
@pytest.mark.parametrize("feature", ["plain", "softcap"])
@pytest.mark.parametrize("schedule", ["auto", "kept in part", "least tile"])
def test_all_outputs_together(backend, dtype, schedule, feature):
    verify(
        options_of(backend, dtype, **SCHEDULES[schedule]),
        dtype,
        vocab=VOCAB,
        outputs=OUTPUTS,
        differentiated=("logp", "entropy", "mean_logits", "lse"),
        **FEATURES[feature],
    )


@dtypes
@pytest.mark.parametrize("differentiated", ["entropy", "lse"])
@pytest.mark.parametrize("schedule", ["auto", "least tile"])
def test_one_output_differentiated(backend, dtype, schedule, differentiated):
    verify(
        options_of(backend, dtype, **SCHEDULES[schedule]),
        dtype,
        vocab=VOCAB,
        outputs=(differentiated,),
        differentiated=(differentiated,),
        **FEATURES["bias"],
    )


@dtypes
@pytest.mark.parametrize("schedule", ["auto", "least tile"])
def test_without_gradient(backend, dtype, schedule):
    options = options_of(backend, dtype, **SCHEDULES[schedule])
    verify(options, dtype, vocab=VOCAB, outputs=OUTPUTS, differentiated=(), **FEATURES["softcap"])


@dtypes
@pytest.mark.parametrize("below", [0.1, 1.0])
@pytest.mark.parametrize("schedule", ["keep", "kept in part", "least tile", "direct"])
def test_targets_far_below_the_maximum(backend, dtype, schedule, below):
    """100 to 1000 nats: exponentials anchored at the target would overflow every dtype."""
    options = options_of(backend, dtype, **SCHEDULES.get(schedule, {"schedule": schedule}))
    needs = ("hidden",) if schedule == "direct" else INPUTS
    verify(options, dtype, vocab=VOCAB, below=below, ignored=0.1, needs=needs)


@dtypes
@pytest.mark.parametrize("schedule", ["keep", "least tile"])
def test_all_outputs_far_below_the_maximum(backend, dtype, schedule):
    verify(
        options_of(backend, dtype, **SCHEDULES[schedule]),
        dtype,
        vocab=VOCAB,
        below=0.5,
        outputs=OUTPUTS,
        differentiated=("logp", "entropy", "mean_logits", "lse"),
    )


@dtypes
@pytest.mark.parametrize("schedule", ["keep", "least tile"])
def test_sharp_rows(backend, dtype, schedule):
    """Logits of standard deviation 60: the maximum lies anywhere up to 500 above the target."""
    options = options_of(backend, dtype, **SCHEDULES[schedule])
    verify(options, dtype, vocab=VOCAB, spread=60.0)


@dtypes
@pytest.mark.parametrize(
    "rows, hidden, vocab",
    [(1, 48, 257), (65, 1, 1023), (63, 48, 1025), (1, 1, 1), (2, 7, 2), (129, 7, 3001)],
)
@pytest.mark.parametrize("schedule", ["auto", "least tile"])
def test_odd_sizes(backend, dtype, schedule, rows, hidden, vocab):
    options = options_of(backend, dtype, **SCHEDULES[schedule])
    verify(options, dtype, rows=rows, hidden=hidden, vocab=vocab, bias=True)


@dtypes
def test_certain_targets_keep_relative_precision(backend, dtype):
    """Where p is 1 - 1e-9, logp is -1e-9, not 0: S enters through log1p."""
    hidden = torch.eye(8, dtype=dtype)[:4]
    weight = torch.zeros(300, 8, dtype=dtype)
    target = torch.arange(4)
    weight[target, target] = torch.tensor([20.0, 25.0, 30.0, 40.0]).to(dtype)
    logp = linear_logprob(hidden, weight, target, options=ScoringOptions(backend=backend)).logp
    exact = -torch.log1p(299 * torch.exp(-torch.tensor([20.0, 25.0, 30.0, 40.0]).double()))
    torch.testing.assert_close(logp.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_logp_is_never_positive(backend, dtype):
    case = make_case(rows=140, vocab=257, spread=40.0, dtype=dtype)
    logits = case.hidden.double() @ case.weight.double().t()
    case = replace(case, target=logits.argmax(-1))
    for outputs in (("logp",), OUTPUTS):
        assert (
            run(case, options=ScoringOptions(backend=backend), outputs=outputs)["logp"].max() <= 0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_chunk_size_changes_rounding_only(backend, dtype):
    one, other = (
        ScoringOptions(backend=backend, schedule="recompute", chunk_rows=rows) for rows in (140, 9)
    )
    case = make_case(dtype=dtype, vocab=VOCAB, bias=True)
    upstream = upstream_of(case, ("logp",))
    a, b = (run(case, options=options, upstream=upstream) for options in (one, other))
    unit = torch.finfo(dtype).eps
    for name in a:
        scale = a[name].abs().max()
        torch.testing.assert_close(
            a[name], b[name], rtol=0, atol=float(4 * unit * max(scale, 10)), msg=name
        )
