# SPDX-License-Identifier: Apache-2.0
"""A case measured: every candidate checked against float64, then timed beside the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch

from .experiment import Candidate, Case, Errors, errors
from .heard import warnings
from .suites import SUITES
from .timing import Clock, interleave

LIMIT = "bare products"
# What errs by more is wrong, and how long it takes says nothing.
ALLOWED = {
    "float32": Errors(loss=1e-4, gradient=1e-4),
    "bfloat16": Errors(loss=5e-2, gradient=0.1),
    "float16": Errors(loss=5e-2, gradient=0.1),
}


def measure(
    case: Case,
    rounds: int,
    progress: Callable[[str], None],
    only: Collection[str] = (),
    compiling: bool = True,
    left_out: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Plain data: ``case``'s own fields, ``timings`` by candidate with the bare products first, and
    ``skipped``, the reason by candidate, and ``warnings``, fastpref's of this process so far.

    Args:
        only: names of candidates; empty: all.
        compiling: whether to run candidates that compile themselves first, for seconds.
        left_out: reasons by candidate.
    """
    said = warnings()
    # Beyond its limit of recompilations torch.compile runs a function as it is, and says nothing.
    torch.compiler.reset()
    experiment = SUITES[case.what].experiment(case)
    clock = Clock(case.device)
    experiment.limit()
    calls: dict[str, Callable[[], object]] = {LIMIT: experiment.limit}
    found: dict[str, dict[str, float | None]] = {
        LIMIT: {"error": None, "peak": clock.peak(experiment.limit)}
    }
    skipped: dict[str, str] = {}
    for one in experiment.candidates:
        if only and one.name not in only:
            continue
        progress(f"checking {one.name}")
        reason = one.unavailable or left_out.get(one.name)
        if reason is None and one.compiles and not compiling:
            reason = "compiles for seconds first, which --quick leaves out"
        if reason is None:
            reason, found[one.name] = _checked(case, one, clock)
        if reason is None:
            calls[one.name] = one.run
        else:
            skipped[one.name] = reason
    timings = interleave(calls, LIMIT, rounds, clock, progress)
    return {
        "what": case.what,
        "mode": case.mode,
        "dtype": case.dtype,
        "shape": vars(case.shape),
        "logits": case.logits,
        "entropy": experiment.entropy,
        "device": case.device,
        "timings": {name: vars(timing) | found[name] for name, timing in timings.items()},
        "skipped": skipped,
        "warnings": list(said),
    }


def _checked(
    case: Case, one: Candidate, clock: Clock
) -> tuple[str | None, dict[str, float | None]]:
    """Why the candidate cannot be timed, or None; its error and peak memory."""
    exact = one.exact()
    # A peer's compiler or kernel may fail on this machine; its row then says why.
    try:
        found = errors(one.sampled(one.run()), exact)
        peak = clock.peak(one.run)
        if case.device != "cpu":
            torch.cuda.synchronize()
    except torch.AcceleratorError:
        # The device answers this process nothing more: worker.py starts another.
        raise
    except Exception as failure:
        first = (str(failure).splitlines() or [""])[0]
        return f"{type(failure).__name__}: {first[:200]}", {}
    allowed = ALLOWED[SUITES[case.what].computes_in or case.dtype]
    if not (found.loss <= allowed.loss and found.gradient <= allowed.gradient):
        return f"wrong: its error against float64 is {found.largest:.1e}", {}
    return None, {"error": found.largest, "peak": peak}
