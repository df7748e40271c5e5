# SPDX-License-Identifier: Apache-2.0
"""Calls in a process of their own: after an error a CUDA device answers nothing more to the process
that made it, and a kernel that hangs never returns. Neither must cost what comes after it."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from .cases import measure
from .experiment import Case

# Of silence; the longest step is a peer's first run, which compiles.
PATIENCE = 120.0

Say = Callable[[str], None]


class Failed(RuntimeError):
    """A call failed, died or hung; ``doing`` is what it last said it was doing."""

    def __init__(self, doing: str, reason: str) -> None:
        super().__init__(f"{doing or 'setting up'}: {reason}")
        self.doing, self.reason = doing, reason


def serve(connection: Connection) -> None:
    """Calls the functions it receives, and answers with what each is doing, until it is done or
    failed."""
    while True:
        try:
            function, given = connection.recv()
        except EOFError:
            return
        try:
            found = function(*given, lambda text: connection.send(("doing", text)))
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            connection.send(("done", found))
        except Exception as error:
            connection.send(("failed", f"{type(error).__name__}: {error}"))


def measured(
    case: Case,
    rounds: int,
    only: Collection[str],
    compiling: bool,
    left_out: dict[str, str],
    say: Say,
) -> dict[str, Any]:
    return measure(case, rounds, say, only, compiling, left_out)


class Worker:
    """A process for calls, started again after a failure.

    Args:
        patience: seconds of silence after which a call is taken for hung.
    """

    def __init__(
        self, patience: float = PATIENCE, target: Callable[[Connection], None] = serve
    ) -> None:
        self.patience, self.target = patience, target
        self.process: BaseProcess | None = None
        self.connection: Connection | None = None
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

        Args:
            until: of ``time.monotonic``.

        Raises:
            Failed: it raised, its process died, or it was silent for too long.
            TimeoutError: it was not done by ``until``.
        """
        connection = self._connection()
        connection.send((function, given))
        doing = ""
        try:
            while True:
                patience = self.patience
                if until is not None:
                    patience = min(patience, until - time.monotonic())
                if not connection.poll(max(patience, 0.0)):
                    if patience < self.patience:
                        raise TimeoutError(f"cut short while {doing or 'setting up'}")
                    raise Failed(doing, f"no answer for {self.patience:.0f} s")
                kind, said = connection.recv()
                if kind == "done":
                    return said
                if kind == "failed":
                    raise Failed(doing, said)
                doing = said
                progress(said)
        except (EOFError, ConnectionError):
            self.close()
            raise Failed(doing, "its process died") from None
        except BaseException:
            self.close()
            raise

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
            Failed: the case failed by itself.
            TimeoutError: as ``call``.
        """
        left_out = self.left_out.setdefault(case.what, {})
        while True:
            given = case, rounds, tuple(only), compiling, left_out
            try:
                return dict(self.call(measured, *given, progress=progress, until=until))
            except Failed as failure:
                name = failure.doing.removeprefix("checking ")
                if name == failure.doing or name in left_out:
                    raise
                left_out[name] = failure.reason

    def _connection(self) -> Connection:
        if self.connection is None:
            # A forked process cannot use CUDA.
            context = multiprocessing.get_context("spawn")
            self.connection, there = context.Pipe()
            self.process = context.Process(target=self.target, args=(there,), daemon=True)
            self.process.start()
            there.close()
        return self.connection

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
        if self.connection is not None:
            self.connection.close()
        self.process = self.connection = None
