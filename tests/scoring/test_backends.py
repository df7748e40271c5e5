# SPDX-License-Identifier: Apache-2.0
"""The two CPU backends against each other, and every instruction set against the torch backend."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fastpref import ScoringOptions
from fastpref.scoring import backends
from fastpref.scoring.backends.choice import Size
from fastpref.scoring.statistics import OUTPUTS
from tests.scoring.cases import BACKENDS, DTYPES, make_case, run, upstream_of

compiled = pytest.mark.skipif("cpp" not in BACKENDS, reason="the operators are not built")
V = 2051
SIZE = Size(torch.float32, 100, 16, V)
CASES = {
    "plain": {},
    "everything": {"softcap": 5.0, "temperature": 1.5, "bias": True, "ignored": 0.3},
    "overflow": {"below": 0.5, "bias": True, "logit_scale": 0.7},
}
PLANS = {
    "keep": {"schedule": "keep"},
    "recompute": {"schedule": "recompute"},
    "least tile": {"memory_budget": 1},
}


def results(backend, case, differentiated, **options):
    upstream = upstream_of(case, differentiated)
    options = ScoringOptions(backend=backend, **options)
    return run(case, options=options, outputs=OUTPUTS, upstream=upstream)


def distance(a, b):
    """Largest difference in units of the last place of the largest value."""
    if a.dtype == torch.bool:
        return float((a != b).sum())
    # The products are the same bits: what differs is the order of sums in float32 (or float64).
    scale = b.double().abs().max().clamp(min=1)
    unit = torch.finfo(a.dtype).eps
    return float((a.double() - b.double()).abs().max() / (scale * unit))


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("plan", PLANS)
def test_cpp_agrees_with_torch(dtype, name, plan):
    case = make_case(vocab=V, dtype=dtype, **CASES[name])
    differentiated = ("logp",) if plan == "keep" else ("logp", "entropy", "lse")
    one, other = (results(b, case, differentiated, **PLANS[plan]) for b in ("torch", "cpp"))
    assert one.keys() == other.keys()
    far = {key: distance(one[key], other[key]) for key in one}
    assert {key: value for key, value in far.items() if not value <= 16} == {}


_CHILD = """
import json, sys, torch
from tests.scoring.test_backends import CASES, DTYPES, PLANS, V, distance, make_case, results
torch.set_num_threads(1)
far = {}
for dtype in DTYPES:
    for name in ("everything", "overflow"):
        for plan in ("keep", "recompute"):
            case = make_case(vocab=V, rows=40, dtype=dtype, **CASES[name])
            differentiated = ("logp",) if plan == "keep" else ("logp", "entropy", "lse")
            a, b = (results(x, case, differentiated, **PLANS[plan]) for x in ("torch", "cpp"))
            for key in a:
                far[f"{dtype} {name} {plan} {key}"] = distance(a[key], b[key])
print(json.dumps([torch.ops.fastpref.cpu_capability(), far]))
"""


@pytest.mark.heavy
@compiled
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_instruction_sets(capability):
    level = ["baseline", "avx2", "avx512"].index(capability)
    if torch.ops.fastpref.cpu_capability() < level:
        pytest.skip(f"this processor has no {capability}")
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        env={**os.environ, "FASTPREF_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    used, far = json.loads(done.stdout)
    assert used == level
    assert len(far) == 4 * 2 * 2 * 9
    assert {key: value for key, value in far.items() if not value <= 16} == {}


def test_choice(monkeypatch):
    monkeypatch.setattr("fastpref.scoring.backends.triton.INTERPRETED", False)
    cpu = torch.device("cpu")
    assert backends.choose("torch", cpu, SIZE) == "torch"
    assert backends.choose("auto", cpu, SIZE) == BACKENDS[-1]
    assert backends.choose("auto", torch.device("meta"), SIZE) == "torch"
    assert backends.unavailable_reason("torch", "cuda") is None
    assert "no backend" in backends.unavailable_reason("numpy", "cpu")
    with pytest.raises(ValueError, match=r"backend='cpp'.*CPU.*meta.*backend='auto'"):
        backends.choose("cpp", torch.device("meta"), SIZE)
    for name in ("triton", "cuda"):
        assert backends.unavailable_reason(name, "cpu")
        with pytest.raises(ValueError, match=name):
            backends.choose(name, cpu, SIZE)


def test_without_compiled_operators(monkeypatch):
    """The torch backend serves, and the cpp backend says why it cannot."""
    from fastpref import _extension

    reason = "_ops.so is not built; run `pip install -e .`"
    monkeypatch.setattr(_extension, "ops_unavailable_reason", lambda: reason)
    assert backends.choose("auto", torch.device("cpu"), SIZE) == "torch"
    with pytest.raises(ValueError, match=r"backend='cpp'.*not built; run"):
        backends.choose("cpp", torch.device("cpu"), SIZE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_rows(backend, monkeypatch):
    """The torch backend works through a tile in blocks; their size does not show."""
    from fastpref.scoring.backends import torch as torch_backend

    case = make_case(vocab=257, rows=50)
    whole = results(backend, case, ("logp", "entropy", "lse"))
    monkeypatch.setattr(torch_backend, "_BLOCK_CPU", 257 * 7)
    for key, value in results(backend, case, ("logp", "entropy", "lse")).items():
        torch.testing.assert_close(value, whole[key], msg=key)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_change_nothing(backend):
    case = replace(make_case(vocab=257, rows=64), map={"softcap": 3.0})
    one, threads = {}, torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            one[count] = results(backend, case, ("logp", "entropy", "lse"))
    finally:
        torch.set_num_threads(threads)
    for key, value in one[1].items():
        torch.testing.assert_close(value, one[2][key], rtol=1e-13, atol=1e-13, msg=key)
