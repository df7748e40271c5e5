# SPDX-License-Identifier: Apache-2.0
"""Calls in a process of their own, which may die without costing those after it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from typing import Any

import torch

from .. import isolation
from ..isolation import Isolated, Lost, Say
from .cases import measure
from .experiment import Case

# Of silence; the longest step is a peer's first run, which compiles.
PATIENCE = 120.0


def serve(connection: Connection) -> None:
    isolation.serve(connection, _call)


def _call(request: tuple[Callable[..., Any], tuple[Any, ...]], say: Say) -> Any:
    function, given = request
    found = function(*given, say)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return found


def measured(
    case: Case,
    rounds: int,
    only: Collection[str],
    compiling: bool,
    left_out: dict[str, str],
    say: Say,
) -> dict[str, Any]:
    return measure(case, rounds, say, only, compiling, left_out)


class Worker(Isolated):
    """A process for calls, started again after a failure.

    Args:
        patience: seconds of silence after which a call is taken for hung.
    """

    def __init__(
        self, patience: float = PATIENCE, target: Callable[[Connection], None] = serve
    ) -> None:
        super().__init__(target, patience)
        # By suite: candidates that took the process down once are not tried again.
        self.left_out: dict[str, dict[str, str]] = {}

    def call(
        self,
        function: Callable[..., Any],
        *given: Any,
        progress: Say = lambda text: None,
        until: float | None = None,
    ) -> Any:
        """What ``function(*given, say)`` returns there. All three must be picklable.

        Raises:
            Lost, TimeoutError: as ``ask``.
        """
        return self.ask((function, given), progress, until)

    def measure(
        self,
        case: Case,
        rounds: int,
        progress: Say,
        only: Collection[str] = (),
        compiling: bool = True,
        until: float | None = None,
    ) -> dict[str, Any]:
        """As ``cases.measure``. A candidate that takes the process down is left out of this case
        and of later ones of its suite, with the reason.

        Raises:
            Lost: the case failed by itself.
            TimeoutError: as ``ask``.
        """
        left_out = self.left_out.setdefault(case.what, {})
        while True:
            given = case, rounds, tuple(only), compiling, left_out
            try:
                return dict(self.call(measured, *given, progress=progress, until=until))
            except Lost as lost:
                name = lost.doing.removeprefix("checking ")
                if name == lost.doing or name in left_out:
                    raise
                left_out[name] = lost.reason
