# SPDX-License-Identifier: Apache-2.0
"""Work in a process of its own: after an error a CUDA device answers nothing more to the process
that made it, and a kernel that hangs never returns. Neither must cost what comes after."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

Say = Callable[[str], None]
STARTING = 180.0  # seconds within which a process has imported torch, from a slow disk


class Lost(RuntimeError):
    """A request that was not answered."""

    def __init__(self, doing: str, reason: str) -> None:
        super().__init__(f"{doing or 'setting up'}: {reason}")
        self.doing, self.reason = doing, reason  # what it said last, empty before it said anything


def serve(connection: Connection, answer: Callable[[Any, Say], Any]) -> None:
    """In the process: answers each request; meanwhile ``answer`` says what it is doing."""
    connection.send(("ready", ""))

    def say(text: str) -> None:
        connection.send(("doing", text))

    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("done", answer(request, say)))
        except Exception as error:
            connection.send(("failed", f"{type(error).__name__}: {error}"))


class Isolated:
    """A process in which ``target`` serves; it ends when it fails or is silent for ``patience``
    seconds once it has begun, and is started again for the next request."""

    def __init__(self, target: Callable[[Connection], None], patience: float) -> None:
        self.target, self.patience = target, patience
        self.process: BaseProcess | None = None
        self.connection: Connection | None = None
        self.begun = False

    def ask(self, request: object, progress: Say, until: float | None = None) -> Any:
        """The answer.

        Args:
            until: of ``time.monotonic``.

        Raises:
            Lost: there is none.
            TimeoutError: there was none by ``until``.
        """
        doing, reason = "", f"no answer for {self.patience:.0f} s"
        try:
            connection = self._connection()
            connection.send(request)
            while connection.poll(self._patience(until)):
                kind, said = connection.recv()
                self.begun = True
                if kind == "ready":
                    continue
                if kind == "done":
                    return said
                if kind == "failed":
                    reason = str(said)
                    break
                doing = said
                progress(said)
        except (EOFError, OSError):
            reason = "its process died"
        self.close()
        if until is not None and time.monotonic() >= until:
            raise TimeoutError(f"cut short while {doing or 'setting up'}")
        raise Lost(doing, reason)

    def _patience(self, until: float | None) -> float:
        patience = self.patience if self.begun else STARTING
        return patience if until is None else max(0.0, min(patience, until - time.monotonic()))

    def _connection(self) -> Connection:
        if self.connection is None:
            # A forked process cannot use CUDA.
            context = multiprocessing.get_context("spawn")
            self.connection, there = context.Pipe()
            self.process = context.Process(target=self.target, args=(there,), daemon=True)
            with _blocked_interrupts():  # a terminal's go to all of its processes; close() ends it
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
        self.begun = False


@contextlib.contextmanager
def _blocked_interrupts() -> Iterator[None]:
    """Processes that start within it never see one."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Which lets them through again when it starts, as it would within.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
