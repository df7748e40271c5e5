# SPDX-License-Identifier: Apache-2.0
"""What a comparison with float64 does not show of a backend: the same bits every time, no wait of
the host, more than 2^31 logits, and how many kernels a call launches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import ScoringOptions, explain, linear_logprob
from .exact_head import sample
from .lanes import Lane

TRL_OUTPUTS = ("logp", "entropy", "mean_logits", "is_top1")


class Sizes(NamedTuple):
    rows: int
    width: int
    vocab: int


USUAL, TRIED = Sizes(2048, 1024, 32000), Sizes(70, 32, 300)
# N V is over 2^31; the exponentials take 4.5 GB.
MANY, MANY_TRIED = Sizes(17000, 64, 131072), Sizes(300, 16, 500)
BUDGET = 6 << 30


def observe(name: str, lane: Lane, device: str, say: Callable[[str], None]) -> dict[str, Any]:
    """A row of the report. ``passed`` is None, with the reason, where it cannot be seen here."""
    begin = time.perf_counter()
    with lane.tiles():
        passed, reason = PROPERTIES[name](lane, device)
    row = {"lane": lane.name, "case": name, "passed": passed, "reason": reason}
    return row | {"seconds": time.perf_counter() - begin}


Seen = tuple[bool | None, str | None]


def _the_same_bits(lane: Lane, device: str) -> Seen:
    given = _tensors(USUAL if device != "cpu" else TRIED, device)
    for schedule in ("keep", "recompute"):
        options = lane.options(schedule=schedule)
        first = _step(given, options)
        for _ in range(10):
            again = _step(given, options)
            for name, want in first.items():
                if not torch.equal(again[name], want):
                    return False, f"{name} differs from run to run, schedule={schedule!r}"
    return True, None


def _no_wait(lane: Lane, device: str) -> Seen:
    if device == "cpu":
        return None, "needs CUDA"
    given = _tensors(USUAL, device)
    options = lane.options()
    for outputs in (("logp",), TRL_OUTPUTS):
        _step(given, options, outputs)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            _step(given, options, outputs)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            first = str(error).splitlines()[0]
            return False, f"the host waited, outputs={outputs}: {first}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return True, None


def _many(lane: Lane, device: str) -> Seen:
    """The last rows among them: those beyond 2^31."""
    sizes = MANY if device != "cpu" else MANY_TRIED
    given = _tensors(sizes, device)
    exact = sample(*given)
    options = lane.options(schedule="keep", memory_budget=BUDGET)
    hidden, weight = (one.detach().requires_grad_() for one in given[:2])
    plan = explain(hidden, weight, given[2], options=options)
    if device != "cpu" and not plan.kept_rows * sizes.vocab > 2**31:
        return None, f"too little memory to keep them: {plan}"
    kept = _step(given, options, mean=True)
    with torch.no_grad():
        read = linear_logprob(*given, options=options).logp
    if read is None:
        raise RuntimeError("logp was asked for")
    pairs = {
        "logp, read only": (read[exact.rows], exact.scores[0]),
        "logp": (kept["logp"][exact.rows], exact.scores[0]),
        "d hidden": (kept["d hidden"][exact.rows], exact.d_hidden),
        "d weight": (kept["d weight"][exact.columns], exact.d_weight),
    }
    errors = {
        name: float((got.double() - want).norm() / want.norm())
        for name, (got, want) in pairs.items()
    }
    wrong = {name: error for name, error in errors.items() if not error < 2e-2}
    said = ", ".join(f"{name} {error:.1e}" for name, error in (wrong or errors).items())
    return not wrong, f"relative error: {said}"


def _launches(lane: Lane, device: str) -> Seen:
    """Of a call without a gradient, and of a step."""
    if device == "cpu":
        return None, "needs CUDA"
    from torch.profiler import ProfilerActivity, profile

    given = _tensors(USUAL, device)
    options = lane.options()

    def read() -> None:
        with torch.no_grad():
            linear_logprob(*given, outputs=("logp",), options=options)

    counts = []
    for run in (read, lambda: _step(given, options)):
        run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as traced:
            run()
            torch.cuda.synchronize()
        counts.append(sum(str(one.device_type).endswith("CUDA") for one in traced.events() or ()))
    return True, f"{counts[0]} kernels and copies without a gradient, {counts[1]} with both"


PROPERTIES: dict[str, Callable[[Lane, str], Seen]] = {
    "the same bits in ten runs": _the_same_bits,
    "no wait of the host": _no_wait,
    "more than 2^31 logits": _many,
    "launches": _launches,
}


def _tensors(sizes: Sizes, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=torch.float32)

    hidden = normal(sizes.rows, sizes.width)
    weight = normal(sizes.vocab, sizes.width) * (3 / sizes.width**0.5)
    target = torch.randint(
        sizes.vocab, (sizes.rows,), generator=generator, device=device, dtype=torch.int64
    )
    return hidden.bfloat16(), weight.bfloat16(), target


def _step(
    given: tuple[Tensor, Tensor, Tensor],
    options: ScoringOptions,
    outputs: tuple[str, ...] = ("logp",),
    mean: bool = False,
) -> dict[str, Tensor]:
    hidden, weight = (one.detach().requires_grad_() for one in given[:2])
    scores = linear_logprob(hidden, weight, given[2], outputs=outputs, options=options)
    if scores.logp is None:
        raise RuntimeError("logp was asked for")
    (-scores.logp.mean() if mean else scores.logp.sum()).backward()
    found = {name: getattr(scores, name).detach() for name in outputs}
    return found | {"d hidden": cast(Tensor, hidden.grad), "d weight": cast(Tensor, weight.grad)}
