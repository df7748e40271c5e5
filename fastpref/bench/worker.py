# SPDX-License-Identifier: Apache-2.0
"""Cases in a process of their own, which may die without costing those after it."""

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
    isolation.serve(connection, _measured)


def _measured(request: Any, say: Say) -> dict[str, Any]:
    case, rounds, only, compiling, left_out = request
    row = measure(case, rounds, say, only, compiling, left_out)
    if case.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return row


class Worker(Isolated):
    """``measure`` of cases.py, in a process that is started again after a failure."""

    def __init__(
        self, patience: float = PATIENCE, target: Callable[[Connection], None] = serve
    ) -> None:
        super().__init__(target, patience)

    def measure(
        self,
        case: Case,
        rounds: int,
        progress: Say,
        only: Collection[str] = (),
        compiling: bool = True,
    ) -> dict[str, Any]:
        """As ``cases.measure``. A candidate that takes the process down is left out, with the
        reason.

        Raises:
            RuntimeError: the case failed by itself.
        """
        left_out: dict[str, str] = {}
        while True:
            try:
                return dict(self.ask((case, rounds, tuple(only), compiling, left_out), progress))
            except Lost as lost:
                name = lost.doing.removeprefix("checking ")
                if name == lost.doing or name in left_out:
                    raise RuntimeError(str(lost)) from lost
                left_out[name] = lost.reason
