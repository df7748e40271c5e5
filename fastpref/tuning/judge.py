# SPDX-License-Identifier: Apache-2.0
"""The verdict: which tiers are right, and whether the fused kernels are worth taking."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from ..bench.timing import Timing
from ..isolation import Lost, Say
from ..scoring.backends.verdict_files import Verdict
from .checks import CHECKS, Error, Setting
from .child import Answer, CheckRequest, TimeRequest
from .timings import MODES

MARGIN = 1.03  # by which a tier must be faster than the first in everything that is timed


class Runner(Protocol):
    """An ``Isolated``, or what stands for it."""

    def ask(self, request: object, progress: Say) -> Any:
        """An Answer; raises Lost."""

    def close(self) -> None:
        """Start afresh at the next request."""


class Undecided(Exception):
    """The card could not be measured; not for any fault of a tier's."""


@dataclass
class Findings:
    """Of one setting."""

    setting: Setting
    tiers: tuple[str, ...]  # that were tried, the one that serves by default first
    errors: dict[str, dict[str, Error]] = field(default_factory=dict)  # by case and tier
    times: dict[bool, dict[str, dict[str, Timing]]] = field(default_factory=dict)  # heavy, mode
    left_out: dict[str, str] = field(default_factory=dict)  # the reason, by tier
    failed_in: dict[str, str] = field(default_factory=dict)  # a case or what was timed, by tier
    peak: int = 0  # bytes of the device

    @property
    def left(self) -> tuple[str, ...]:
        return tuple(one for one in self.tiers if one not in self.left_out)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Plain and with statistics; none where no tier is left."""
        if not self.left:
            return ()
        return tuple(
            Verdict(
                dtype=self.setting.dtype,
                heavy=heavy,
                hidden_size=self.setting.hidden_size,
                vocab_size=self.setting.vocab_size,
                tier=self._best(times),
                milliseconds={
                    mode: {tier: row[tier].seconds * 1e3 for tier in self.left if tier in row}
                    for mode, row in times.items()
                },
            )
            for heavy, times in self.times.items()
        )

    @property
    def subjects(self) -> list[tuple[Any, ...]]:
        """On which there is a verdict now, or none any more."""
        dtype, *head = self.setting[1:]
        return [(dtype, heavy, *head) for heavy in (False, True)]

    def _best(self, times: dict[str, dict[str, Timing]]) -> str:
        first, *others = self.left
        better = {tier: min(1 / row[tier].ratio for row in times.values()) for tier in others}
        best = max(better, key=better.__getitem__, default=first)
        return best if better.get(best, 0.0) >= MARGIN else first


def judge(setting: Setting, tiers: tuple[str, ...], runner: Runner, say: Say) -> Findings:
    """Every tier through every case until it fails one, then those left against the clock.

    Raises:
        Undecided: the device has no memory left, say.
    """
    findings = Findings(setting, tiers)
    for name in CHECKS:
        for tier in findings.left:
            _check(findings, CheckRequest(setting, name, tier), runner, say)
    while findings.left and not _time(findings, runner, say):
        findings.times.clear()
    return findings


def _check(findings: Findings, request: CheckRequest, runner: Runner, say: Say) -> None:
    say(f"{request.name}, {request.tier}")
    try:
        answer: Answer = runner.ask(request, _silent)
    except Lost as lost:
        _leave_out(findings, request.tier, request.name, lost)
        return
    findings.peak = max(findings.peak, answer.peak)
    error: Error = answer.found
    findings.errors.setdefault(request.name, {})[request.tier] = error
    if not error.fine:
        findings.left_out[request.tier] = f"wrong {error}"
        findings.failed_in[request.tier] = request.name
        # It may have written where it should not.
        runner.close()


def _time(findings: Findings, runner: Runner, say: Say) -> bool:
    """Whether all tiers that were left came through; otherwise one more is left out."""
    for heavy in (False, True):
        for mode in MODES:
            what = f"{mode}{', with statistics' if heavy else ''}"
            say(what)
            request = TimeRequest(findings.setting, mode, heavy, findings.left)
            running = [findings.left[0]]
            try:
                answer: Answer = runner.ask(request, running.append)
            except Lost as lost:
                _leave_out(findings, running[-1], what, lost)
                return False
            findings.peak = max(findings.peak, answer.peak)
            findings.times.setdefault(heavy, {})[mode] = answer.found
    return True


def _leave_out(findings: Findings, tier: str, what: str, lost: Lost) -> None:
    if "OutOfMemoryError" in lost.reason:
        raise Undecided(
            f"the device ran out of memory in {what!r} of {tier}: free it of other processes and "
            f"run this again ({lost.reason.splitlines()[0][:200]})"
        )
    reason = (lost.reason.splitlines() or [""])[0]
    findings.left_out[tier] = reason[:200]
    findings.failed_in[tier] = what


def _silent(text: str) -> None:
    return None
