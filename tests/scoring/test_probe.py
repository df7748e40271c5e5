# SPDX-License-Identifier: Apache-2.0
"""A kernel that does not compute what it should does not serve: the next tier does, and one warning
says why."""

import logging

import pytest
import torch

from fastpref import ScoringOptions, linear_divergence, linear_logprob
from fastpref.scoring import backends
from fastpref.scoring.backends import (
    column_sums,
    divergence_launch,
    glue,
    probe,
    rows,
)
from fastpref.scoring.backends import torch as torch_backend
from fastpref.scoring.backends import triton as triton_backend
from fastpref.scoring.slab import Projection, Slab
from fastpref.scoring.statistics import OUTPUTS
from fastpref.scoring.types import LogitMap
from tests.scoring.cases import verify

pytestmark = pytest.mark.skipif(not rows.INTERPRETED, reason="a GPU is here: see pytest -m gpu")
SIZES = {"rows": 9, "hidden": 20, "vocab": 150}
# Launches by name: where they are, the tier they belong to, and which of their numbers are spoiled.
LAUNCHES = {
    "exp_rows": (rows, "rows", lambda arguments, result: result.sum),
    "logit_grad": (rows, "rows", lambda arguments, result: arguments[0].tile),
    "project": (triton_backend, "triton", lambda arguments, result: result.sum),
    "project_gradient": (triton_backend, "triton", lambda arguments, result: arguments[0].tile),
    "target_logits": (rows, "rows", lambda arguments, result: result.raw),
    "settle": (rows, "rows", lambda arguments, result: result[0].logp),
    "scale_rows": (rows, "rows", lambda arguments, result: result),
}


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(probe, "_reasons", {})
    # A backend holds the functions that it was loaded with.
    backends.load.cache_clear()
    yield
    backends.load.cache_clear()


def fail(*_, **__):
    raise RuntimeError("no kernel image is available for execution on the device")


def spoil(launch, numbers):
    """The launch, its first number off by a tenth and more."""

    def spoiled(*arguments):
        result = launch(*arguments)
        numbers(arguments, result)[:1].mul_(1.1).add_(0.1)
        return result

    return spoiled


@pytest.mark.heavy
@pytest.mark.parametrize("broken", ["raises", "wrong number"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("exp_rows", "settle") else name
        for name in LAUNCHES
    ],
)
def test_a_broken_kernel_does_not_serve(monkeypatch, caplog, name, broken):
    module, tier, numbers = LAUNCHES[name]
    right = getattr(module, name)
    monkeypatch.setattr(module, name, fail if broken == "raises" else spoil(right, numbers))
    with caplog.at_level(logging.WARNING, "fastpref"):
        for _ in range(2):
            for needs in (("hidden", "weight"), ("hidden",)):
                schedule = "recompute" if "grad" in name else "auto"
                options = ScoringOptions(backend=tier, schedule=schedule)
                verify(options, torch.float32, outputs=OUTPUTS[:1], needs=needs, **SIZES)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"{tier} kernels do not serve cpu" in warning
    assert ("no kernel image" if broken == "raises" else "differ from torch's") in warning
    assert f"the {'rows' if tier == 'triton' else 'torch'} backend does instead" in warning
    assert list(probe.failures()) == [f"{tier} on cpu"]


@pytest.mark.parametrize("broken", ["raises", "wrong number"])
def test_a_broken_divergence_does_not_serve(monkeypatch, caplog, broken):
    launch = divergence_launch.divergence_rows
    spoiled = spoil(launch, lambda arguments, result: result)
    monkeypatch.setattr(
        divergence_launch, "divergence_rows", fail if broken == "raises" else spoiled
    )
    tensors = torch.randn(5, 8), torch.randn(70, 8), torch.randn(5, 8), torch.randn(70, 8)
    own, right = (
        linear_divergence(*tensors, options=ScoringOptions(backend=name))
        for name in ("rows", "torch")
    )
    torch.testing.assert_close(own, right, rtol=1e-6, atol=1e-6)
    assert len(caplog.records) == 1


@pytest.mark.slow
@pytest.mark.heavy
def test_kernels_that_are_right_serve(monkeypatch, caplog):
    verify(ScoringOptions(backend="triton"), torch.float32, outputs=OUTPUTS, **SIZES)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        verify(ScoringOptions(backend="rows"), dtype, outputs=OUTPUTS, **SIZES)
    again = ScoringOptions(backend="rows", schedule="recompute")
    verify(again, torch.float32, **SIZES)
    for dtype in (torch.float32, torch.float16):
        verify(ScoringOptions(backend="rows"), dtype, uneven=True, softcap=5.0, **SIZES)
    verify(again, torch.float32, uneven=True, **SIZES)
    assert probe.failures() == {} and not caplog.records
    for name in ("exp_rows", "logit_grad"):
        monkeypatch.setattr(torch_backend, name, fail)
    verify(again, torch.float32, **SIZES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [40, 48])
def test_column_sums_that_are_right_serve(dtype, columns):
    matrix = torch.ones(3, columns, dtype=dtype)
    for weights in (None, torch.ones(3)):
        assert column_sums._serves(matrix, weights)
    assert probe.failures() == {} and len(probe._reasons) == 2


def test_a_probe_runs_once(monkeypatch):
    runs = []
    check = probe._check_project
    monkeypatch.setattr(probe, "_check_project", lambda *a: runs.append(a) or check(*a))
    hidden, weight, target = torch.randn(4, 8), torch.randn(30, 8), torch.arange(4)
    for _ in range(3):
        linear_logprob(hidden, weight, target, options=ScoringOptions(backend="rows"))
    assert len(runs) == 1


def test_other_remainders_are_other_kernels(monkeypatch):
    runs = []
    check = probe._check_project
    monkeypatch.setattr(probe, "_check_project", lambda *a: runs.append(a) or check(*a))
    for width, columns in ((8, 30), (16, 30), (24, 46), (16, 32), (48, 64)):
        hidden, weight = torch.randn(4, width), torch.randn(columns, width)
        linear_logprob(hidden, weight, torch.arange(4), options=ScoringOptions(backend="rows"))
    assert len(runs) == 3


def test_a_probe_without_memory_runs_again(monkeypatch, caplog):
    """With less, as the call does; the kernel is not to blame."""
    check, runs = probe._check_project, []

    def short_of_memory(*arguments):
        runs.append(arguments)
        if len(runs) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return check(*arguments)

    monkeypatch.setattr(probe, "_check_project", short_of_memory)
    verify(ScoringOptions(backend="rows"), torch.float32, outputs=OUTPUTS[:1], **SIZES)
    assert len(runs) > 1 and probe.failures() == {}
    assert not any("do not serve" in one.getMessage() for one in caplog.records)


def test_a_triton_that_cannot_be_imported(monkeypatch):
    module = backends._module

    def imported(name):
        if name in ("cpp", "cuda"):
            return module(name)
        raise AttributeError("module 'triton' has no attribute 'knobs'")

    monkeypatch.setattr(backends, "_module", imported)
    backends.import_failure.cache_clear()
    try:
        size = backends.choice.Size(torch.bfloat16, 4, 8, 30, static=True)
        assert backends.choose("auto", torch.device("cuda"), size) == "torch"
        assert "knobs" in backends.unavailable_reason("rows", "cuda")
        assert not column_sums.launches.__wrapped__("cuda", torch.bfloat16)
    finally:
        backends.import_failure.cache_clear()


def test_choosing_launches_nothing(monkeypatch):
    for module, name in ((rows, "exp_rows"), (glue, "target_logits"), (triton_backend, "project")):
        monkeypatch.setattr(module, name, fail)
    size = backends.choice.Size(torch.float32, 4, 8, 30)
    for name in ("rows", "triton", "torch"):
        assert backends.choose(name, torch.device("cpu"), size) == name
    assert probe.failures() == {}


def test_the_order_of_tiers(monkeypatch):
    """On a GPU: rows, CUDA C++ where Triton is missing, torch where both are."""
    reasons = {}
    monkeypatch.setattr(backends, "unavailable_reason", lambda name, device: reasons.get(name))
    size = backends.choice.Size(torch.bfloat16, 4, 8, 30, static=True)
    chosen = []
    for missing in ("rows", "cuda", "torch"):
        chosen.append(backends.choose("auto", torch.device("cuda"), size))
        reasons[missing] = "missing"
    assert chosen == ["rows", "cuda", "torch"]


@pytest.mark.parametrize("backend", [triton_backend, rows], ids=["triton", "rows"])
@pytest.mark.parametrize("hip, says", [("6.4", "this torch is for ROCm"), (None, "no NVIDIA GPU")])
def test_where_no_kernel_runs_the_reason_and_the_remedy_are_named(monkeypatch, backend, hip, says):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = backend.unavailable_reason("cuda")
    assert says in reason and reason.endswith("use backend='auto'")


@pytest.mark.parametrize("tier", ["rows", "triton"])
def test_a_probe_takes_no_default_device_or_dtype(tier, caplog):
    """Else a process that sets one would lose the kernels."""
    hidden, weight, bias = torch.randn(4, 8), torch.randn(30, 8), torch.randn(30)
    target, vector, tile = torch.arange(4), torch.rand(4), torch.zeros(4, 30)
    kernels, slab = backends.load(tier), Slab(weight, bias, LogitMap(1.0, 2.0))
    upstream = backends.UpstreamGradient(*[vector] * 4, None, None, None)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            own = kernels.target_logits(hidden, slab, target)
            projection = Projection(hidden, slab, tile, target)
            sums = kernels.project(projection, own.logit, True, True)
            kernels.settle(sums, own, tile, slab.map)
            kernels.project_gradient(projection, upstream)
            kernels.scale_rows(tile, vector, tile)
            both = [slab.products(tile)] * 2
            assert divergence_launch.serves(tier, *both, 0, True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert probe.failures() == {} and not caplog.records
