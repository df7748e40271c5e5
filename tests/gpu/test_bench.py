# SPDX-License-Identifier: Apache-2.0
"""The benchmark's suites on a GPU: every candidate against float64, objectives as one graph, the
pair head as one launch, and the clock."""

from __future__ import annotations

import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastpref import objectives
from fastpref._extension import cuda_ops_unavailable_reason
from fastpref.bench import memory
from fastpref.bench.cases import LIMIT, measure
from fastpref.bench.experiment import Case, Mode
from fastpref.bench.suites import SUITES
from fastpref.bench.timing import Clock
from fastpref.bench.work import Shape
from fastpref.units import pair_head
from tests.units.test_pair_head import make_pairs

pytestmark = pytest.mark.gpu

SHAPE = Shape(8, 64, 128, 2000)
NO_OPERATORS = cuda_ops_unavailable_reason() if torch.cuda.is_available() else "no NVIDIA GPU"


def case(what: str, mode: Mode) -> Case:
    return Case(what, mode, "bfloat16", SHAPE, device="cuda")


@pytest.mark.parametrize(
    "what, mode", [(w, mode) for w, suite in SUITES.items() for mode in suite.modes]
)
def test_candidates_of_a_suite(what: str, mode: Mode) -> None:
    if SUITES[what].unavailable is not None:
        pytest.skip(str(SUITES[what].unavailable))
    given = case(what, mode)
    row = measure(given, 1, lambda text: None, compiling=False)
    timings = row["timings"]
    # What is not there, and nothing that is there and failed.
    there = {one.name for one in SUITES[what].experiment(given).candidates if not one.unavailable}
    assert [one for one in row["skipped"] if one.startswith("fastpref") and one in there] == []
    assert len(timings) > 2 and timings[LIMIT]["peak"] > 0
    assert all(
        one["seconds"] > 0 and one["error"] is not None for one in list(timings.values())[1:]
    )


def test_every_objective_is_one_graph() -> None:
    row = measure(case("heads", "trainable head"), 1, lambda text: None)
    assert row["skipped"] == {}
    assert list(row["timings"])[1:] == list(objectives.names())


@pytest.mark.skipif(NO_OPERATORS is not None, reason=str(NO_OPERATORS))
def test_the_pair_head_is_one_launch() -> None:
    objective = objectives.get("dpo")
    logps, _ = make_pairs(objective, 64)
    there = [None if one is None else one.detach().float().cuda() for one in logps]
    pair_head.pair_head(objective, *there)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        pair_head.pair_head(objective, *there)
        torch.cuda.synchronize()
    kernels = [
        one.name
        for one in traced.events()
        if one.device_type == torch.autograd.DeviceType.CUDA and "memset" not in one.name.lower()
    ]
    assert len(kernels) == 1, kernels


def test_the_clock_times_the_device_and_not_the_host() -> None:
    clock = Clock("cuda")
    a = torch.randn(4096, 4096, device="cuda")
    products = [torch.empty_like(a)]
    clock.warm(lambda: torch.mm(a, a, out=products[0]))
    # Other tests may use the device at the same time.
    short = min(clock(lambda: torch.mm(a, a, out=products[0])) for _ in range(5))

    def long() -> None:
        for _ in range(10):
            torch.mm(a, a, out=products[0])

    begin = time.perf_counter()
    found = clock(long)
    assert 5 * short < found < time.perf_counter() - begin
    assert clock.peak(lambda: torch.empty(1 << 20, device="cuda")) == pytest.approx(4.0)


def test_peak_memory() -> None:
    row = memory.measure(case("score", "trainable head"), "plain torch", 4)
    assert row["peak"] > row["gradients"] and row["workspace"] is None
