# SPDX-License-Identifier: Apache-2.0
"""Work in a process of its own that fails, dies or hangs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from fastpref import isolation
from fastpref.isolation import Isolated, Lost, Say

pytestmark = pytest.mark.heavy


def answer(request: str, say: Say) -> str:
    say(f"at {request}")
    if request == "fails":
        raise ValueError("of no use")
    if request == "dies":
        os._exit(3)
    if request == "interrupts":
        return str(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    if request == "hangs":
        time.sleep(60)
    return f"{request}, by {os.getpid()}"


def serve(connection: Connection) -> None:
    isolation.serve(connection, answer)


def dies_at_once(connection: Connection) -> None:
    os._exit(3)


@pytest.fixture(scope="module")
def process() -> Iterator[Isolated]:
    made = Isolated(serve, patience=2)
    yield made
    made.close()


def test_answers_and_what_it_said_meanwhile(process: Isolated) -> None:
    said: list[str] = []
    first, second = (process.ask(request, said.append) for request in "ab")
    assert first.startswith("a, by") and second.startswith("b, by")
    assert first.split()[-1] == second.split()[-1] != str(os.getpid())
    assert said == ["at a", "at b"]


def test_a_request_that_is_lost_costs_that_request(process: Isolated) -> None:
    for request, reason in (("fails", "ValueError: of no use"), ("dies", "its process died")):
        with pytest.raises(Lost) as lost:
            process.ask(request, lambda text: None)
        assert (lost.value.doing, lost.value.reason) == (f"at {request}", reason)
        assert process.process is None
    process.ask("works", lambda text: None)
    pid = process.process and process.process.pid
    with pytest.raises(Lost, match="at hangs: no answer for 2 s"):
        process.ask("hangs", lambda text: None)
    assert isinstance(pid, int)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no such masks here")
def test_an_interrupt_of_the_terminal_is_none_of_its_own(process: Isolated) -> None:
    """Whoever asks hears it, and closes."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert process.ask("interrupts", lambda text: None) == "True"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked and signal.SIGINT not in blocked


def test_a_process_that_never_begins() -> None:
    made = Isolated(dies_at_once, patience=20)
    with pytest.raises(Lost, match="setting up: its process died"):
        made.ask("anything", lambda text: None)


def test_a_process_that_died_between_two_requests(process: Isolated) -> None:
    process.ask("works", lambda text: None)
    assert process.process is not None
    process.process.kill()
    process.process.join()
    with pytest.raises(Lost, match="its process died"):
        process.ask("works", lambda text: None)
    assert process.ask("works", lambda text: None)
