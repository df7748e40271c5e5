# SPDX-License-Identifier: Apache-2.0
"""A check on the kernels that a verdict of ``python -m fastpref tune`` chose.

In their first calls some rows are scored by plain torch as well. The comparison stays on the
device; its result is read at a later call, once it has arrived, so that the host never waits.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .head import Projector
from .request import Call
from .rules import Heads

CALLS = 8  # in each dtype, with statistics or without
ROWS = 64
SLAB = 1 << 23  # elements of the weight in float32 at a time
# Of the target's logit and of lse, whichever is larger. By the error contract: twice what rounding
# the target's logit and the largest one to that dtype may cost. The kernels, which round neither,
# lie far below.
TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-11}


class Check(NamedTuple):
    excess: Tensor  # 0-dim on the host: the largest error over what is allowed
    arrived: torch.cuda.Event | None

    @property
    def readable(self) -> bool:
        return self.arrived is None or self.arrived.query()


@dataclass
class Watch:
    """Of a process."""

    calls: Counter[tuple[torch.dtype, bool]] = field(default_factory=Counter)
    pending: deque[Check] = field(default_factory=deque)


WATCH = Watch()


def watch(
    call: Call, heads: Heads, rows: Tensor, target: Tensor, outputs: Sequence[Tensor | None]
) -> None:
    """Compare some of the log-probabilities (N,) among ``outputs`` of ``rows`` (N, H) with plain
    torch; say what was found before.

    Raises:
        RuntimeError: log-probabilities of an earlier call were wrong.
    """
    if torch.compiler.is_compiling() or _capturing(rows):
        return
    _read()
    head, logp = heads.projectors[0], outputs[call.rule.output_names.index("logp")]
    kind = call.plan.dtype, call.rule.statistics or head.map.cap != 0
    if WATCH.calls[kind] >= CALLS or logp is None or not rows.shape[0]:
        return
    WATCH.calls[kind] += 1
    # For want of room for the check a call must not fail.
    with contextlib.suppress(torch.OutOfMemoryError):
        WATCH.pending.append(_check(head, rows, target, logp))


def _capturing(rows: Tensor) -> bool:
    return rows.is_cuda and torch.cuda.is_current_stream_capturing()


def _read() -> None:
    while WATCH.pending and WATCH.pending[0].readable:
        excess = float(WATCH.pending[0].excess)
        if not excess <= 1:
            # It stays, and every later call raises too.
            raise RuntimeError(
                "the kernels that `python -m fastpref tune` had chosen gave log-probabilities "
                f"{excess:.2g} times further from plain torch's than rounding explains. Results "
                "since then may be wrong. Run `python -m fastpref tune --forget`, or pass "
                "ScoringOptions(backend='rows') or backend='torch', and report it"
            )
        WATCH.pending.popleft()


def _check(head: Projector, rows: Tensor, target: Tensor, logp: Tensor) -> Check:
    some = slice(None, None, -(-rows.shape[0] // ROWS))
    excess = _excess(head, rows[some], target[some], logp[some])
    if not excess.is_cuda:
        return Check(excess, None)
    # Reading a number on the device would wait for all that is queued.
    host = torch.empty((), dtype=excess.dtype, device="cpu", pin_memory=True)
    host.copy_(excess, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return Check(host, arrived)


def _excess(head: Projector, rows: Tensor, target: Tensor, logp: Tensor) -> Tensor:
    """The largest error of ``logp`` over what is allowed, 0-dim float32."""
    column, vocab = target - head.start, head.weight.shape[0]
    scored = (column >= 0) & (column < vocab)
    # 16-bit numbers multiply exactly in TF32 too.
    wide, column = rows.float(), column.clamp(0, vocab - 1)
    own = lse = wide.new_full(target.shape, -torch.inf)
    step = max(1, SLAB // head.weight.shape[1])
    for start in range(0, vocab, step):
        slab = slice(start, start + step)
        raw = wide @ head.weight[slab].float().t()
        if head.bias is not None:
            raw += head.bias[slab]
        logits = head.map.logit(raw)
        lse = torch.logaddexp(lse, logits.logsumexp(-1))
        here = (column >= start) & (column < start + logits.shape[1])
        index = (column - start).clamp(0, logits.shape[1] - 1)[:, None]
        own = torch.where(here, logits.gather(-1, index)[:, 0], own)
    expected = own - lse
    # Rows that hold no finite number have nothing to compare.
    compared = scored & expected.isfinite()
    size = torch.maximum(own.abs(), lse.abs()).clamp(min=1)
    excess = (logp - expected).abs() / (TOLERANCE[rows.dtype] * size)
    return torch.where(compared, excess, 0.0).amax()
