# SPDX-License-Identifier: Apache-2.0
"""What ``make gpu`` does on a GPU, the most valuable first, each part within a share of the time:
correctness, the head alone against its peers, what else a backend promises, the tests, memory,
trainings in TRL, losses and steps. On a CPU the same flow runs on tiny sizes, to try it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from ..isolation import Lost
from . import memory, pytests, worker
from . import report as reporting
from .checks import CHECKS, check
from .drive import Drive, Item, Part
from .experiment import MODES, Case, Mode
from .lanes import Lane, lanes
from .properties import PROPERTIES, observe
from .suites import SUITES
from .trainers import runs as trainings
from .work import MODELS, Shape
from .worker import Worker

# Of a whole call and of the one that runs what it left, from the start of Python to its end.
SECONDS, MORE_SECONDS = 470.0, 290.0
# Of them, what a part may take.
CHECKS_SECONDS, TIMINGS_SECONDS, PROPERTIES_SECONDS = 60.0, 250.0, 45.0
TESTS_SECONDS, MEMORY_SECONDS, TRAININGS_SECONDS, CASES_SECONDS = 90.0, 40.0, 80.0, 240.0
PATIENCE = 50.0  # of silence of a process, which may be compiling
ROUNDS = {"cpu": 1, "cuda": 10}

HEADS = ("llama-3-8b", "llama-3.2-1b", "qwen2.5-0.5b")
BELOW: tuple[Mode, ...] = ("frozen head", "forward")
TOKENS = (8192, 4096, 2048)  # of the memory curve
MEMORY_BUDGET = 32  # MiB
TINY = Shape(4, 16, 32, 300)
LOG = "tests.txt"


class Found(NamedTuple):
    reasons: dict[str, str | None]  # why a lane cannot serve, by its name
    memory: list[str]  # of what is there to measure the memory of


def _look(device: str, say: Callable[[str], None]) -> Found:
    reasons = {lane.name: lane.unavailable(device) for lane in lanes(device)}
    first = next(memory_cases(device))
    return Found(reasons, memory.names(first, MEMORY_BUDGET, compiling=False))


class Run:
    """The parts of a run on ``device``, whose rows go to ``drive``."""

    def __init__(
        self, drive: Drive, device: str, rounds: int, progress: Callable[[str], None]
    ) -> None:
        self.drive, self.device, self.rounds, self.progress = drive, device, rounds, progress
        self.tiny = device == "cpu"

    def parts(self) -> list[Part]:
        reasons, of_memory = self._found()
        serving = self._serving(reasons)
        first, rest = serving[:1], serving[1:]
        found = [
            self._by_lane("check", check, CHECKS, one, CHECKS_SECONDS) for one in (first, rest)
        ]
        found.append(self._cases("time", timings(self.device), TIMINGS_SECONDS))
        # One lane after the other: what they are asked for takes gigabytes.
        for one in serving:
            share = PROPERTIES_SECONDS / len(serving)
            found.append(self._by_lane("observe", observe, PROPERTIES, (one,), share))
        found += [self._tests(), self._memory(of_memory), self._trainings()]
        # Among their peers are some that compile themselves for a minute.
        given = cases(self.device), CASES_SECONDS, worker.PATIENCE
        found.append(self._cases("measure", *given))
        return found

    def _found(self) -> Found:
        """Asked in a process of its own: a library that crashes when it is loaded costs no more
        than that. Where it does, everything is tried."""
        process = Worker(PATIENCE)
        try:
            return Found(*process.call(_look, self.device))
        except Lost as failure:
            print(f"what there is to measure: {failure}")
            return Found({lane.name: None for lane in lanes(self.device)}, [])
        finally:
            process.close()

    def _serving(self, reasons: dict[str, str | None]) -> tuple[Lane, ...]:
        away = {name: reason for name, reason in reasons.items() if reason is not None}
        self.drive.report["unavailable"] = away
        for name, reason in away.items():
            print(f"fastpref, {name}: not measured, {reason}")
        return tuple(lane for lane in lanes(self.device) if lane.name not in away)

    def _by_lane(
        self,
        verb: str,
        function: Callable[..., dict[str, Any]],
        names: dict[str, Any],
        chosen: tuple[Lane, ...],
        seconds: float,
    ) -> Part:
        """Each of ``names`` on each of the lanes, which have a process each."""
        processes = [Worker(PATIENCE) for _ in chosen]

        def close() -> None:
            for process in processes:
                process.close()

        def do(process: Worker, lane: Lane, name: str, until: float) -> None:
            try:
                row = process.call(function, name, lane, self.device, until=until)
            except Lost as failure:
                row = {"lane": lane.name, "case": name, "passed": False, "seconds": None}
                row["reason"] = failure.reason
            self.drive.add("checks", row, reporting.terminal_check(row))

        items = [
            [
                Item(f"{verb} {lane.name}: {name}", functools.partial(do, process, lane, name))
                for name in names
            ]
            for process, lane in zip(processes, chosen, strict=True)
        ]
        return Part(seconds, items, close)

    def _cases(
        self,
        verb: str,
        chosen: Iterator[tuple[Case, bool]],
        seconds: float,
        patience: float = PATIENCE,
    ) -> Part:
        process = Worker(patience)

        def do(case: Case, compiling: bool, until: float) -> None:
            reason = SUITES[case.what].unavailable
            if reason is not None:
                raise RuntimeError(reason)
            given = case, self.rounds, self.progress, (), compiling, until
            row = process.measure(*given)
            self.drive.add("cases", row, "\n" + reporting.terminal_case(row))

        items = [
            Item(f"{verb} {_name(case)}", functools.partial(do, case, compiling))
            for case, compiling in chosen
        ]
        return Part(seconds, [items], process.close)

    def _memory(self, names: list[str]) -> Part:
        process = Worker(PATIENCE)

        def do(case: Case, name: str, until: float) -> None:
            row = process.call(_memory_row, case, name, until=until)
            self.drive.add("memory", row, reporting.terminal_memory([row]).splitlines()[-1])

        items = []
        for case in memory_cases(self.device):
            for name in names[:1] if self.tiny else names:
                said = f"memory {name}, N={case.shape.scored}"
                items.append(Item(said, functools.partial(do, case, name)))
        return Part(MEMORY_SECONDS, [items], process.close)

    def _trainings(self) -> Part:
        def do(training: trainings.Training, until: float) -> None:
            reason = trainings.unavailable()
            if reason is not None:
                raise RuntimeError(reason)
            seconds = until - self.drive.clock()
            row = trainings.measure(training, seconds=seconds)
            self.drive.add("trainings", row, "\n" + reporting.terminal_trainings([row]))

        items = [
            Item(f"train {one.name}", functools.partial(do, one))
            for one in trainings_of(self.device)
        ]
        return Part(TRAININGS_SECONDS, [items])

    def _tests(self) -> Part:
        log = None if self.drive.folder is None else self.drive.folder / LOG

        def do(name: str, until: float) -> None:
            reason = pytests.unavailable()
            if reason is not None:
                raise RuntimeError(reason)
            seconds = until - self.drive.clock() - pytests.GRACE
            given = pytests.command(name, collect=self.tiny)
            row, finished = pytests.run(given, log, seconds)
            row = {"tests": name, "finished": finished} | row
            self.drive.add("tests", row, reporting.terminal_tests(row))
            if not finished:
                raise TimeoutError(f"cut short after {row['seconds']:.0f} s")

        names = list(pytests.TESTS)[: 1 if self.tiny else None]
        items = [Item(f"test {name}", functools.partial(do, name)) for name in names]
        return Part(TESTS_SECONDS, [items])


def _name(case: Case) -> str:
    shape = case.shape
    sizes = f"N={shape.scored} H={shape.hidden_size} V={shape.vocab_size}"
    logits = "" if case.logits == "trained" else f", {case.logits} logits"
    return f"{case.what}, {case.mode}, {sizes}{logits}"


def _memory_row(case: Case, name: str, say: Callable[[str], None]) -> dict[str, Any]:
    return memory.measure(case, name, MEMORY_BUDGET)


def timings(device: str) -> Iterator[tuple[Case, bool]]:
    """The head alone, and TRL's call, of every head; and that nothing compiles itself first."""
    for model in HEADS:
        for mode in reversed(MODES):
            yield _case("head", mode, _shape(model, 0.0, device), device), False
        for mode in reversed(MODES):
            if mode != "forward":
                yield _case("call", mode, _shape(model, 0.0, device), device), False
        if device == "cpu":
            return


def cases(device: str) -> Iterator[tuple[Case, bool]]:
    """Losses in one call on padded batches, other modes and heads; and whether peers that compile
    themselves for half a minute are worth it."""
    small = _shape(HEADS[1], 0.0, device)
    padded = _shape(HEADS[1], 0.5, device)
    compiling = device != "cpu"
    yield _case("dpo", "trainable head", padded, device), False
    yield _case("divergence", "trainable head", padded, device), False
    if device == "cpu":
        return
    yield _case("call", "forward", small, device), False
    for what in ("heads", "grpo", "step"):
        yield _case(what, "trainable head", padded, device), False
    yield _case("score", "trainable head", small, device), compiling
    for mode in BELOW:
        yield _case("score", mode, small, device), False
    for what in ("kto", "simpo", "orpo"):
        yield _case(what, "trainable head", padded, device), False
    yield replace(_case("head", "trainable head", small, device), logits="random"), False
    yield _case("denoising", "frozen head", small, device), False
    yield _case("low-rank", "trainable head", small, device), False
    yield _case("ddo", "trainable head", small, device), False


def memory_cases(device: str) -> Iterator[Case]:
    for scored in TOKENS[: 1 if device == "cpu" else None]:
        shape = _shape(HEADS[0], 0.0, device)
        if device != "cpu":
            shape = replace(shape, length=scored // 8)
        yield _case("score", "trainable head", shape, device)


def trainings_of(device: str) -> list[trainings.Training]:
    if device == "cpu":
        return list(trainings.trainings(trainings.QUICK | {"hidden": 32, "layers": 1}))[:1]
    return list(trainings.trainings(trainings.LARGE))


def _case(what: str, mode: Mode, shape: Shape, device: str) -> Case:
    return Case(what, mode, "bfloat16", shape, device=device)


def _shape(model: str, masked: float, device: str) -> Shape:
    """8192 scored tokens; on a CPU, few."""
    if device == "cpu":
        return replace(TINY, masked=masked)
    width, vocab = MODELS[model]
    return Shape(8, round(1024 / (1 - masked)), width, vocab, masked)


def passed(report: dict[str, Any]) -> bool:
    """Whether nothing that was checked was wrong."""
    wrong = any(row["passed"] is False for row in report.get("checks", ()))
    return not wrong and not any(
        row["failed"] or row["exit"] not in (0, None) for row in report.get("tests", ())
    )
