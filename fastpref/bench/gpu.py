# SPDX-License-Identifier: Apache-2.0
"""The head on a GPU: log-probabilities without gradient, with a frozen and with a trainable head,
in ratio to the same matrix products by torch, beside the peers.

Every case runs on the same packed rows, all of them scored.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ScoringOptions, linear_logprob
from ..scoring.backends import unavailable_reason
from .implementations import Implementation, implementations
from .work import Shape, Work, make_work

# Sequences, length, H, V: models of 8B, 1B and 0.5B parameters.
SHAPES = (
    Shape(8, 1024, 4096, 128256, masked=0),
    Shape(8, 1024, 2048, 128256, masked=0),
    Shape(8, 1024, 896, 151936, masked=0),
)
UNITS = {"no grad": 1, "frozen head": 2, "trainable head": 3}
CHECKED_ROWS = 64
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Measured:
    milliseconds: float  # median
    ratio: float  # median over rounds of the time over that of the bare products in that round
    low: float  # 20th percentile of that ratio
    high: float  # 80th percentile
    peak: float  # MiB above what was allocated before, gradients included
    error: float | None  # relative, of logp and of the gradient of hidden, in the checked rows


def candidates() -> Iterator[Implementation]:
    """fastpref by each backend, then the peers."""
    for name in ("triton", "cuda", "torch"):
        options = ScoringOptions(backend=name)
        yield Implementation(
            f"fastpref, {name}", _fastpref(options), unavailable_reason(name, "cuda")
        )
    for one in implementations():
        if not one.name.startswith("fastpref"):
            yield one
    missing = importlib.util.find_spec("cut_cross_entropy") is None
    reason = "cut_cross_entropy is not installed" if missing else None
    yield Implementation("Cut Cross-Entropy", _cut_cross_entropy, reason)


def _fastpref(options: ScoringOptions) -> Callable[[Work, Tensor, Tensor], Tensor]:
    def loss(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        # Packed, as a trainer without padding hands it over: no host read.
        scores = linear_logprob(
            hidden.flatten(0, 1), weight, work.target.flatten(), options=options
        )
        if scores.logp is None:
            raise RuntimeError("logp was asked for")
        return work.dpo(scores.logp.view(work.target.shape))

    return loss


def _cut_cross_entropy(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    nll = linear_cross_entropy(hidden, weight, work.target, reduction="none")
    return work.dpo(-nll.float())


def step(one: Implementation, work: Work, case: str) -> Tensor | None:
    """One step of the case; the gradient of hidden, where there is one."""
    hidden, weight = work.leaves(trainable=case == "trainable head")
    if case == "no grad":
        with torch.no_grad():
            one.loss(work, hidden, weight)
        return None
    one.loss(work, hidden, weight).backward()
    return hidden.grad


def bare_products(work: Work, case: str) -> None:
    rows = work.hidden.flatten(0, 1)
    logits = torch.mm(rows, work.weight.t())
    if case != "no grad":
        torch.mm(logits, work.weight)
    if case == "trainable head":
        torch.mm(logits.t(), rows)


def exact_gradient(work: Work) -> Tensor:
    """d loss / d hidden of the last checked rows in float64; the loss needs them all."""
    with torch.no_grad():
        logp = torch.cat([_exact_logp(work, rows) for rows in _row_blocks(work)])
    logp.requires_grad_()
    work.dpo(logp.view(work.target.shape)).backward()
    upstream = logp.grad
    if upstream is None:
        raise RuntimeError("the loss does not depend on the log-probabilities")
    rows = slice(-CHECKED_ROWS, None)
    hidden = work.hidden.flatten(0, 1)[rows].double().requires_grad_()
    logits = hidden @ work.weight.double().t()
    chosen = logits.log_softmax(-1).gather(1, work.target.flatten()[rows, None])[:, 0]
    chosen.backward(upstream[rows])
    if hidden.grad is None:
        raise RuntimeError("no gradient reached hidden")
    return hidden.grad


def _row_blocks(work: Work) -> list[slice]:
    return [slice(at, at + 256) for at in range(0, work.target.numel(), 256)]


def _exact_logp(work: Work, rows: slice) -> Tensor:
    logits = work.hidden.flatten(0, 1)[rows].double() @ work.weight.double().t()
    return logits.log_softmax(-1).gather(1, work.target.flatten()[rows, None])[:, 0]


class Clock:
    """Milliseconds of a call: by events on a GPU, by the wall on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, call: Callable[[], object]) -> float:
        if self.device != "cuda":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    def peak(self, call: Callable[[], object]) -> float:
        """MiB allocated at most during the call, above what was before."""
        if self.device != "cuda":
            call()
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE


def measure_case(
    work: Work, case: str, rounds: int, clock: Clock, exact: Tensor
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Every candidate by name, and why others were left out."""
    skipped, errors, peaks = {}, {}, {}
    limit = "bare products"
    calls: dict[str, Callable[[], object]] = {limit: lambda: bare_products(work, case)}
    peaks[limit] = clock.peak(calls[limit])
    for one in candidates():
        if one.unavailable is not None:
            skipped[one.name] = one.unavailable
            continue

        def call(one: Implementation = one) -> Tensor | None:
            return step(one, work, case)

        # A peer's compiler or kernel may fail on this machine; its row then says why.
        try:
            call()
            gradient = call()
            peaks[one.name] = clock.peak(call)
        except Exception as error:
            skipped[one.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        if gradient is not None:
            rows = gradient.flatten(0, 1)[-CHECKED_ROWS:].double()
            errors[one.name] = float((rows - exact).norm() / exact.norm())
        calls[one.name] = call
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            times[name].append(clock(calls[name]))
    measured = {}
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times[limit], strict=True))
        measured[name] = Measured(
            statistics.median(values),
            statistics.median(ratios),
            ratios[len(ratios) // 5],
            ratios[-1 - len(ratios) // 5],
            peaks[name],
            errors.get(name),
        )
    return measured, skipped


def suite(
    shapes: tuple[Shape, ...], device: str, rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """All cases of all shapes in bfloat16, said line by line as they come."""
    report = []
    clock = Clock(device)
    for shape in shapes:
        work = make_work(shape, torch.bfloat16).on(device)
        exact = exact_gradient(work)
        for case, units in UNITS.items():
            measured, skipped = measure_case(work, case, rounds, clock, exact)
            say(
                f"\nN={shape.positions}, H={shape.hidden_size}, V={shape.vocab_size}, "
                f"{case} ({units}u)"
            )
            say(
                f"  {'':32}{'time':>11}{'ratio':>8}{'p20':>7}{'p80':>7}{'peak MiB':>10}{'error':>9}"
            )
            for name, one in measured.items():
                error = "" if one.error is None else f"{one.error:.1e}"
                say(
                    f"  {name:32}{one.milliseconds:9.2f}ms{one.ratio:7.3f}x{one.low:6.3f}x"
                    f"{one.high:6.3f}x{one.peak:10.0f}{error:>9}"
                )
            for name, reason in skipped.items():
                say(f"  {name}: not measured, {reason}")
            rows = {name: vars(one) for name, one in measured.items()}
            report.append({"shape": vars(shape), "case": case, "timings": rows, "skipped": skipped})
    return report
