# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a process that scores, against what explain promises."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fastpref.scoring.workspace import lease, row_stride
from tests.scoring.cases import BACKENDS

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
MIB = 1 << 20
H, V, N = 64, 8192, 768
LOGITS = N * V * 4  # 24 MiB
BUDGET = 3 * MIB

# One process a call, forked before torch starts a thread: its peak is its own.
_CHILD = """
import json, os, sys, torch
from fastpref import ScoringOptions, explain, linear_logprob

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024

def step(call, n, h, v):
    hidden = torch.randn(n, h).requires_grad_("hidden" in call["needs"])
    weight = torch.randn(v, h).requires_grad_("weight" in call["needs"])
    target = torch.randint(0, v, (n,))
    outputs = tuple(call["outputs"])
    arguments = dict(outputs=outputs, options=ScoringOptions(**call["options"]))
    plan = explain(hidden, weight, target, **arguments)
    gradient = torch.randn(n)
    gradient[torch.rand(n) < call["zero"]] = 0
    before = status("VmRSS")
    scores = linear_logprob(hidden, weight, target, **arguments)
    if call["needs"]:
        tensors = [getattr(scores, name) for name in outputs]
        torch.autograd.backward(tensors, [gradient] * len(outputs))
    grads = sum(t.grad.nbytes for t in (hidden, weight) if t.grad is not None)
    return {"grown": status("VmHWM") - before, "workspace": plan.workspace_bytes, "grads": grads,
            "plan": str(plan)}

def measure(call):
    torch.set_num_threads(2)
    # Threads, code and the libraries' own buffers.
    step(call, 100, call["hidden"], 1100)
    from fastpref.scoring import workspace
    workspace.release()
    return step(call, call["rows"], call["hidden"], call["vocab"])

for call in json.loads(sys.argv[1]):
    if os.fork() == 0:
        print(json.dumps(measure(call)), flush=True)
        os._exit(0)
    if os.wait()[1] != 0:
        sys.exit("a measurement failed")
"""


def call(backend="cpp", needs=("hidden", "weight"), outputs=("logp",), zero=0.0, rows=N, **options):
    return {
        "rows": rows,
        "hidden": H,
        "vocab": V,
        "needs": needs,
        "outputs": outputs,
        "zero": zero,
        "options": {"backend": backend, "memory_budget": BUDGET, **options},
    }


ENTROPY = ("logp", "entropy")
CALLS = {
    "recomputed": {"schedule": "recompute"},
    "kept in part": {"schedule": "keep", "memory_budget": LOGITS // 2},
    "kept": {"schedule": "keep", "memory_budget": 2 * LOGITS},
    "direct": {"needs": ("hidden",)},
    "no gradient": {"needs": ()},
    "entropy": {"outputs": ENTROPY},
    "entropy, kept": {"outputs": ENTROPY, "schedule": "keep", "memory_budget": 2 * LOGITS},
    "kept, half without gradient": {"memory_budget": 2 * LOGITS, "zero": 0.5},
    "twice the rows": {"schedule": "recompute", "rows": 2 * N},
}


KEYS = [
    (backend, name)
    for backend in BACKENDS
    for name in CALLS
    if backend == "cpp" or name in ("recomputed", "kept", "entropy, kept", "twice the rows")
]


@pytest.fixture(scope="module")
def measured():
    """What each call took, by backend and name."""
    calls = [call(backend=backend, **CALLS[name]) for backend, name in KEYS]
    # Freed blocks go back to the system at once: what is measured is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(calls)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(KEYS, map(json.loads, lines), strict=True))


# What the allocator and the matrix library take beside the tensors.
SLACK = 6 * MIB


@pytest.mark.parametrize("backend, name", KEYS)
def test_peak_is_within_what_explain_promises(measured, backend, name):
    result = measured[backend, name]
    assert result["grown"] <= result["workspace"] + result["grads"] + SLACK, result


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_rows_take_no_larger_tiles(measured, backend):
    """Beyond terms in N H: a few matrices of (N, H), and a few numbers a row."""
    one, two = measured[backend, "recomputed"], measured[backend, "twice the rows"]
    more_rows = N * (6 * H + 16) * 4
    assert two["workspace"] - one["workspace"] <= more_rows
    assert two["grown"] - one["grown"] <= more_rows + SLACK


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the operators are not built")
@pytest.mark.parametrize("name", ["recomputed", "kept in part", "entropy"])
def test_the_budget_is_what_tiles_and_kept_rows_take(measured, name):
    budget = CALLS[name].get("memory_budget", BUDGET)
    rows = N * (6 * H + 16) * 4
    result = measured["cpp", name]
    assert result["grown"] <= budget + result["grads"] + rows + SLACK, result
    assert result["grown"] < LOGITS


@pytest.mark.parametrize("cols, stride", [(1, 8), (8, 8), (2051, 2056)])
def test_rows_of_a_tile_start_at_16_bytes_off_the_cpu(cols, stride):
    meta = torch.device("meta")
    assert row_stride(cols, torch.bfloat16, meta) == stride
    tile = lease((3, cols), torch.bfloat16, meta)
    assert tile.shape == (3, cols) and tile.stride() == (stride, 1)
    cpu = torch.device("cpu")
    assert row_stride(cols, torch.bfloat16, cpu) == cols
    assert lease((3, cols), torch.bfloat16, cpu).is_contiguous()
