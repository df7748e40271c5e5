# SPDX-License-Identifier: Apache-2.0
"""What a command is doing and how much is left, on one line that rewrites itself on a terminal;
nothing into a file."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def say(text: str) -> None:
    if sys.stderr.isatty():
        # What runs on into a second line would stay there.
        text = text[: shutil.get_terminal_size().columns - 1]
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def clear() -> None:
    say("")


class Parts:
    """Says how many of ``total`` parts are done, how long the rest will take at the same pace, and
    what runs.

    Args:
        doing: what comes before all that.
    """

    def __init__(self, total: int, doing: str = "") -> None:
        self.total, self.doing = total, doing
        self.begun, self.start, self.line = 0, time.monotonic(), ""

    def begin(self, name: str = "") -> None:
        """The next part, which ends the one before."""
        done = min(self.begun, self.total)
        self.begun += 1
        self.line = f"{self.doing}{done} of {self.total}"
        if 0 < done < self.total:
            pace = (time.monotonic() - self.start) / done
            self.line += f", about {duration(pace * (self.total - done))} left"
        self.line += f": {name}" if name else ""
        say(self.line)

    def detail(self, text: str) -> None:
        """What the part does."""
        say(f"{self.line}, {text}")


def counted(parts: Iterable[T], total: int, doing: str) -> Iterator[T]:
    """``parts`` as they come, of which there are ``total``."""
    count = Parts(total, f"{doing} ")
    count.begin()
    for part in parts:
        count.begin()
        yield part
    clear()


def duration(seconds: float) -> str:
    """To the minute, or below two of them to ten seconds."""
    if seconds >= 120:
        return f"{seconds / 60:.0f} minutes"
    return f"{max(10, round(seconds, -1)):.0f} s"
