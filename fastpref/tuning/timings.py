# SPDX-License-Identifier: Apache-2.0
"""How long each tier takes: scores alone, with a frozen head, with a trainable one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..bench.timing import Clock, Timing, interleave
from ..isolation import Say
from ..scoring import ScoringOptions, linear_logprob
from .checks import Setting

ROWS = 2048  # N
# Of inputs, gradients and kept exponentials, to which the vocabulary is cut. Where there are waves
# enough of tiles, more columns only take more time.
BYTES = 600 << 20
COLUMNS = 256  # a multiple of it, as vocabularies are
ROUNDS = 12
# Whether the hidden states and the weight need a gradient.
MODES = {
    "1u, scores": (False, False),
    "2u, frozen head": (True, False),
    "3u, trainable": (True, True),
}
# What TRL's trainers ask for.
OUTPUTS = {False: ("logp",), True: ("logp", "entropy", "mean_logits", "is_top1")}


def columns(setting: Setting) -> int:
    """V of what is timed."""
    itemsize: int = getattr(torch, setting.dtype).itemsize
    # A column of the weight, of its gradient, of a copy while either is made, and of exponentials.
    each = itemsize * (3 * setting.hidden_size + ROWS)
    most = BYTES // each
    return min(setting.vocab_size, max(COLUMNS, most - most % COLUMNS))


def time(
    setting: Setting, mode: str, heavy: bool, tiers: tuple[str, ...], say: Say
) -> dict[str, Timing]:
    """Interleaved, against the first of ``tiers``; what runs is said before it does."""
    needs_hidden, needs_weight = MODES[mode]
    generator = torch.Generator(setting.device).manual_seed(0)
    dtype: torch.dtype = getattr(torch, setting.dtype)
    vocab, width = columns(setting), setting.hidden_size
    normal = functools.partial(torch.randn, generator=generator, device=setting.device, dtype=dtype)
    hidden = normal(ROWS, width).requires_grad_(needs_hidden)
    weight = normal(vocab, width).mul_(width**-0.5).requires_grad_(needs_weight)
    target = torch.randint(
        vocab, (ROWS,), generator=generator, device=setting.device, dtype=torch.int64
    )
    upstream = torch.ones(ROWS, device=setting.device, dtype=torch.float32)

    def step(tier: str) -> None:
        say(tier)
        _step(tier, hidden, weight, target, upstream, OUTPUTS[heavy])

    calls: dict[str, Callable[[], object]] = {tier: functools.partial(step, tier) for tier in tiers}
    for call in calls.values():
        call()
        if setting.device != "cpu":
            torch.cuda.synchronize()
    clock = Clock(setting.device)
    return interleave(calls, tiers[0], ROUNDS, clock, lambda text: None)


def _step(
    tier: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    upstream: Tensor,
    outputs: tuple[str, ...],
) -> None:
    # The budget is named, so that a small card keeps what a large one keeps.
    kept = 2 * ROWS * weight.shape[0] * weight.element_size()
    options = ScoringOptions(backend=tier, memory_budget=kept)  # type: ignore[arg-type]
    logp = linear_logprob(hidden, weight, target, outputs=outputs, options=options).logp
    leaves = [one for one in (hidden, weight) if one.requires_grad]
    if leaves and logp is not None:
        torch.autograd.grad(logp, leaves, upstream)
