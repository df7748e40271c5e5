# SPDX-License-Identifier: Apache-2.0
"""Cases in a process of their own: after an error a CUDA device answers nothing more to the process
that made it, and a kernel that hangs never returns. Neither must cost the cases after it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from .cases import measure
from .experiment import Case

# Of silence; the longest step is a peer's first run, which compiles.
PATIENCE = 120.0


def serve(connection: Connection) -> None:
    """Answers each request with what it is doing, until it is done or failed."""
    while True:
        try:
            case, rounds, only, compiling, left_out = connection.recv()
        except EOFError:
            return
        try:
            row = measure(
                case,
                rounds,
                lambda text: connection.send(("doing", text)),
                only,
                compiling,
                left_out,
            )
            if case.device != "cpu":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            connection.send(("done", row))
        except Exception as error:
            connection.send(("failed", f"{type(error).__name__}: {error}"))


class Worker:
    """``measure`` of cases.py, in a process that is started again after a failure."""

    def __init__(
        self, patience: float = PATIENCE, target: Callable[[Connection], None] = serve
    ) -> None:
        self.patience, self.target = patience, target
        self.process: BaseProcess | None = None
        self.connection: Connection | None = None

    def measure(
        self,
        case: Case,
        rounds: int,
        progress: Callable[[str], None],
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
            connection = self._connection()
            connection.send((case, rounds, tuple(only), compiling, left_out))
            doing, reason = "", f"no answer for {self.patience:.0f} s"
            while connection.poll(self.patience):
                try:
                    kind, said = connection.recv()
                except EOFError:
                    reason = "its process died"
                    break
                if kind == "done":
                    return dict(said)
                if kind == "failed":
                    reason = said
                    break
                doing = said
                progress(said)
            self.close()
            name = doing.removeprefix("checking ")
            if name == doing or name in left_out:
                raise RuntimeError(f"{doing or 'setting up'}: {reason}")
            left_out[name] = reason

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
