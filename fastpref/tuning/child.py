# SPDX-License-Identifier: Apache-2.0
"""What the process that may die does."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from .. import isolation
from ..bench.timing import Timing
from ..isolation import Say
from . import checks, timings
from .checks import Error, Setting


class CheckRequest(NamedTuple):
    setting: Setting
    name: str  # of checks.CHECKS
    tier: str


class TimeRequest(NamedTuple):
    setting: Setting
    mode: str  # of timings.MODES
    heavy: bool
    tiers: tuple[str, ...]


class Answer(NamedTuple):
    found: Any  # an Error; a Timing by tier
    peak: int  # bytes of the device at most, since the process began


def serve(connection: Connection) -> None:
    isolation.serve(connection, answer)


def answer(request: CheckRequest | TimeRequest, say: Say) -> Answer:
    say(request.tier if isinstance(request, CheckRequest) else request.tiers[0])
    found: Error | dict[str, Timing]
    if isinstance(request, CheckRequest):
        found = checks.check(*request)
    else:
        found = timings.time(*request, say)
    if request.setting.device == "cpu":
        return Answer(found, 0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return Answer(found, torch.cuda.max_memory_allocated())
