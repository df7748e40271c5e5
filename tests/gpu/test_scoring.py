# SPDX-License-Identifier: Apache-2.0
"""linear_logprob on a GPU: every backend against float64, its bits, its host reads, its memory."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from fastpref import ScoringOptions, explain, linear_logprob
from fastpref.bench.scorers import why_not
from fastpref.scoring.statistics import OUTPUTS
from tests.scoring.cases import INPUTS, check_scores, make_case, run, upstream_of
from tests.scoring.test_numbers import FEATURES, SCHEDULES, dtype_name, options_of

pytestmark = pytest.mark.gpu
GPU = torch.cuda.is_available()
REASONS = {
    name: why_not(name, "cuda") if GPU else "no NVIDIA GPU"
    for name in ("rows", "triton", "cuda", "torch")
}
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for name, reason in REASONS.items()
]
backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float32, torch.float64],
    ids=dtype_name,
)
# Three row tiles, columns that no tile divides, rows of the weight that TMA takes; and what it does
# not take.
SIZES = {
    "aligned": {"rows": 300, "hidden": 136, "vocab": 2056},
    "ragged": {"rows": 300, "hidden": 133, "vocab": 2051},
}
# Rows that the pass in place shares among a cluster of blocks.
LONG = {"rows": 40, "hidden": 64, "vocab": 70001}


def verify(backend, dtype, schedule, *, outputs=("logp",), differentiated=("logp",), **arguments):
    needs = arguments.pop("needs", INPUTS)
    case = make_case(dtype=dtype, **arguments).on("cuda")
    upstream = upstream_of(case, differentiated) if differentiated else None
    given = options_of(backend, dtype, **SCHEDULES[schedule], vocab=arguments["vocab"])
    actual = run(case, options=given, outputs=outputs, upstream=upstream, needs=needs)
    eager, exact = (
        run(case.to(d), outputs=outputs, upstream=upstream, reference=True)
        for d in (dtype, torch.float64)
    )
    check_scores(case, actual, eager, exact)


@backends
@dtypes
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("schedule", ["auto", "recompute", "slabs", "kept in part"])
def test_logp(backend, dtype, schedule, feature, sizes):
    verify(backend, dtype, schedule, **SIZES[sizes], **FEATURES[feature])


@backends
@dtypes
@pytest.mark.parametrize("cap", [{}, {"softcap": 5.0, "bias": True}], ids=["plain", "softcap"])
@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_temperatures(backend, dtype, schedule, cap):
    """One for each row; 0 where it is not scored."""
    given = SIZES["ragged"] | {"uneven": True, "ignored": 0.2} | cap
    verify(backend, dtype, schedule, **given)
    outputs = {"outputs": OUTPUTS, "differentiated": ("logp", "entropy", "mean_logits", "lse")}
    verify(backend, dtype, schedule, **outputs, **given)


@backends
def test_a_temperature_out_of_range_gives_nan_in_its_row(backend):
    case = make_case(dtype=torch.float32, uneven=True, **SIZES["aligned"]).on("cuda")
    temperature = case.map["temperature"].clone()
    temperature[:4] = torch.tensor([0.0, -1.0, torch.nan, torch.inf])
    given = case.hidden, case.weight, case.target
    logp = linear_logprob(*given, temperature=temperature, options=ScoringOptions(backend=backend))
    assert logp.logp[:4].isnan().all() and logp.logp[4:].isfinite().all()


@backends
@dtypes
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("feature", ["plain", "softcap"])
def test_frozen_head(backend, dtype, feature, sizes):
    verify(backend, dtype, "auto", needs=("hidden",), **SIZES[sizes], **FEATURES[feature])


@backends
@dtypes
@pytest.mark.parametrize("feature", ["plain", "softcap"])
@pytest.mark.parametrize("schedule", ["auto", "slabs"])
def test_all_outputs(backend, dtype, schedule, feature):
    differentiated = ("logp", "entropy", "mean_logits", "lse")
    arguments = SIZES["aligned"] | FEATURES[feature]
    verify(backend, dtype, schedule, outputs=OUTPUTS, differentiated=differentiated, **arguments)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("feature", ["plain", "softcap", "bias"])
@pytest.mark.parametrize("statistics", [False, True])
def test_long_rows(backend, dtype, feature, statistics):
    outputs = OUTPUTS if statistics else ("logp",)
    verify(backend, dtype, "auto", outputs=outputs, **LONG, **FEATURES[feature])


@backends
@dtypes
@pytest.mark.parametrize("below", [0.05, 1.0])
@pytest.mark.parametrize("schedule", ["auto", "recompute"])
def test_targets_far_below_the_maximum(backend, dtype, schedule, below):
    verify(backend, dtype, schedule, below=below, ignored=0.1, **SIZES["aligned"])


def step(case, options, outputs=("logp",)):
    """A forward and backward pass of packed rows, and what it gives."""
    hidden, weight = (one.clone().requires_grad_() for one in (case.hidden, case.weight))
    scores = linear_logprob(hidden, weight, case.target, outputs=outputs, options=options)
    scores.logp.sum().backward()
    return scores.logp.detach(), hidden.grad, weight.grad


@backends
@pytest.mark.parametrize("schedule", ["auto", "recompute"])
def test_the_same_bits_fifty_times(backend, schedule):
    case = make_case(dtype=torch.bfloat16, below=0.05, rows=700, hidden=256, vocab=5003).on("cuda")
    options = ScoringOptions(backend=backend, schedule=schedule)
    first = step(case, options)
    for _ in range(50):
        assert all(map(torch.equal, step(case, options), first))


@backends
@pytest.mark.parametrize("schedule", ["auto", "recompute", "direct"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_host_never_waits(backend, schedule, packed):
    case = make_case(dtype=torch.bfloat16, below=0.05, ignored=0.3, **SIZES["aligned"]).on("cuda")
    hidden, target = case.hidden, case.target
    options = ScoringOptions(backend=backend, schedule=schedule)
    if not packed:  # in a (B, T) batch with ignored targets a bound on their number is given
        hidden, target = hidden.view(10, 30, -1), target.view(10, 30)
        options = ScoringOptions(backend=backend, schedule=schedule, max_scored=290)

    def one():
        leaf = hidden.clone().requires_grad_()
        weight = case.weight.clone().requires_grad_(schedule != "direct")
        logp = linear_logprob(leaf, weight, target, options=options).logp
        logp.sum().backward()
        return leaf.grad

    expected = one()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = one()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, expected)


@backends
def test_a_captured_graph_replays(backend):
    case = make_case(dtype=torch.bfloat16, below=0.05, **SIZES["aligned"]).on("cuda")
    options = ScoringOptions(backend=backend)
    hidden, weight = (one.clone().requires_grad_() for one in (case.hidden, case.weight))

    def one():
        hidden.grad = weight.grad = None
        logp = linear_logprob(hidden, weight, case.target, options=options).logp
        logp.sum().backward()
        return logp

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            one()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logp = one()
    with torch.no_grad():
        hidden.copy_(hidden.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    flipped = step(
        make_case(dtype=torch.bfloat16, below=0.05, **SIZES["aligned"])
        .on("cuda")
        .__class__(hidden.detach(), case.weight, case.target),
        options,
    )
    assert torch.equal(logp, flipped[0])
    assert torch.equal(hidden.grad, flipped[1]) and torch.equal(weight.grad, flipped[2])


@backends
def test_more_than_two_to_the_31_logits(backend):
    rows, vocab = 20000, 128256
    case = make_case(dtype=torch.bfloat16, rows=rows, hidden=64, vocab=vocab).on("cuda")
    options = ScoringOptions(backend=backend, schedule="keep", memory_budget=16 << 30)
    leaf = case.hidden.detach().requires_grad_()
    plan = explain(leaf, case.weight, case.target, options=options)
    assert plan.kept_rows * vocab > 2**31
    logp, d_hidden, d_weight = step(case, options)
    small = ScoringOptions(backend="torch", schedule="recompute", memory_budget=1 << 30)
    for got, expected in zip((logp, d_hidden, d_weight), step(case, small), strict=True):
        assert (got - expected).norm() <= 1e-2 * expected.norm()
    last = slice(rows - 4, rows)
    logits = case.hidden[last].double() @ case.weight.double().t()
    exact = logits.log_softmax(-1).gather(1, case.target[last, None])[:, 0]
    assert (logp[last] - exact).abs().max() < 2e-2


@backends
@pytest.mark.parametrize("schedule", ["auto", "recompute"])
def test_memory_stays_within_the_plan(backend, schedule):
    case = make_case(dtype=torch.bfloat16, rows=4096, hidden=512, vocab=32000).on("cuda")
    options = ScoringOptions(backend=backend, schedule=schedule, memory_budget=64 << 20)
    step(case, options)
    hidden, weight = (one.requires_grad_() for one in (case.hidden, case.weight))
    plan = explain(hidden, weight, case.target, options=options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    linear_logprob(hidden, weight, case.target, options=options).logp.sum().backward()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    gradients = hidden.nbytes + weight.nbytes
    assert peak <= plan.workspace_bytes + gradients + (1 << 20)


@backends
def test_another_stream_and_the_current_one_agree(backend):
    case = make_case(dtype=torch.bfloat16, below=0.05, **SIZES["aligned"]).on("cuda")
    options = ScoringOptions(backend=backend)
    expected = step(case, options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step(case, options)
    stream.synchronize()
    assert all(map(torch.equal, got, expected))


@backends
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one(backend):
    case = make_case(dtype=torch.bfloat16, below=0.05, **SIZES["aligned"])
    options = ScoringOptions(backend=backend)
    expected = step(case.on("cuda:0"), options)
    got = step(case.on("cuda:1"), options)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True))


SANITIZED = """
import torch
from fastpref import ScoringOptions, linear_logprob
for dtype in (torch.bfloat16, torch.float32):
    for rows, width, vocab in ((70, 40, 520), (33, 37, 515), (9, 40, 70001)):
        hidden = torch.randn(rows, width, device="cuda", dtype=dtype, requires_grad=True)
        weight = torch.randn(vocab, width, device="cuda", dtype=dtype, requires_grad=True)
        target = torch.randint(vocab, (rows,), device="cuda")
        for outputs in (("logp",), ("logp", "entropy", "is_top1")):
            options = ScoringOptions(backend=BACKEND)
            scores = linear_logprob(
                hidden * 30, weight, target, outputs=outputs, options=options
            )
            sum(one.sum() for one in scores if one is not None and one.requires_grad).backward()
torch.cuda.synchronize()
"""


@backends
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
def test_no_access_out_of_bounds(backend):
    done = subprocess.run(
        [
            "compute-sanitizer",
            "--error-exitcode=9",
            "--report-api-errors=no",  # torch asks for symbols that a driver may not have
            sys.executable,
            "-c",
            f"BACKEND = {backend!r}\n{SANITIZED}",
        ],
        capture_output=True,
        text=True,
        timeout=240,
        # Inside one of torch's large blocks nothing is out of bounds.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not work on this machine")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
