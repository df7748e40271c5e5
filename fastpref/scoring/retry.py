# SPDX-License-Identifier: Apache-2.0
"""Calls that run out of memory run again with less.

A plan is a pure function of shapes and options, and from there of how often memory ran out in this
call. What a failed attempt has made is gone before the next one starts: attempts return results and
change nothing that outlives them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from . import workspace

logger = logging.getLogger("fastpref")

P = TypeVar("P")
T = TypeVar("T")

_said = threading.Event()


def nothing_less(plan: Any) -> None:
    """Of what has one way to run."""
    return None


def with_less(
    attempt: Callable[[P], T],
    plan: P,
    less: Callable[[P], P | None],
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    failed: torch.OutOfMemoryError | None = None,
) -> T:
    """What ``attempt(plan)`` returns, or where memory runs out ``attempt(less(plan))``, and so on.

    Args:
        attempt: may be called several times; must leave nothing half-written.
        less: the plan to try after one that failed, None after the least; may give back what is
            kept. A plan that is the least from the start is tried once more, with what was given
            back.
        device: of the tensors.
        group: ranks that must run alike; then nothing runs again.
        failed: what ``plan`` ran into already, in a way that has no other plan.

    Raises:
        torch.OutOfMemoryError: what the first one said, and the last attempt's plan; caused by the
            last one.
    """
    planned = plan
    first: torch.OutOfMemoryError | None = None
    caught, failed = failed, None
    try:
        while True:
            if caught is None:
                try:
                    found = attempt(plan)
                except torch.OutOfMemoryError as error:
                    caught = error
                else:
                    if first is not None:
                        _say(planned, plan)
                    return found
            if group is not None or _capturing(device):
                raise _not_again(caught, plan, group is not None) from caught
            smaller = less(plan)
            if smaller is None and first is not None:
                raise _exhausted(first, plan) from caught
            _forget_frames(caught)
            first, caught = first or caught, None
            plan = plan if smaller is None else smaller
            workspace.release_workspace()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        # Its traceback holds this frame, and the frame all that the attempts were given.
        first = caught = None


def random_state(device: torch.device) -> Callable[[], None]:
    """Puts the random state of the CPU and of ``device`` back to what it is now."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return restore


def _forget_frames(error: BaseException | None) -> None:
    """The frames of a failed attempt hold its tensors, as do those of what ran out inside it."""
    while isinstance(error, torch.OutOfMemoryError):
        error.__traceback__ = None
        error = error.__cause__


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _say(planned: object, taken: object) -> None:
    if _said.is_set():
        return
    _said.set()
    logger.warning(
        "out of memory: %s did not fit, and the call ran again as %s, with the same result to "
        "rounding. A smaller ScoringOptions(memory_budget=...) plans for less from the start. "
        "Further calls that do so are not reported",
        planned,
        taken,
    )


def _exhausted(first: BaseException, least: object) -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(
        f"{first}\nfastpref ran the call again with less, and memory ran out in the last attempt "
        f"too: {least}. Free memory, or score fewer tokens at a time"
    )


def _not_again(error: BaseException, plan: object, sharded: bool) -> torch.OutOfMemoryError:
    why = (
        "under tp_group all ranks must run alike"
        if sharded
        else "a CUDA graph is being captured, which replays what ran"
    )
    return torch.OutOfMemoryError(
        f"{error}\nfastpref did not run the call again with less: {why}. What did not fit: {plan}. "
        "Pass a smaller ScoringOptions(memory_budget=...)" + (" on every rank" if sharded else "")
    )
