# SPDX-License-Identifier: Apache-2.0
"""What a command is doing, on one line that rewrites itself on a terminal; nothing into a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(before: str = "") -> Callable[[str], None]:
    """Says ``before`` and what runs."""

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{before}{text}", end="", file=sys.stderr, flush=True)

    return say


def clear() -> None:
    progress()("")


def counted(parts: Iterable[T], total: int, doing: str) -> Iterator[T]:
    """``parts`` as they come, saying how many of ``total`` there are and how long the rest will
    take at the same pace."""
    say, begin = progress(f"{doing} "), time.monotonic()
    say(f"0 of {total}")
    for count, part in enumerate(parts, 1):
        left = (time.monotonic() - begin) / count * (total - count)
        say(f"{count} of {total}, about {duration(left)} left")
        yield part
    clear()


def duration(seconds: float) -> str:
    """To the minute, or below two of them to ten seconds."""
    if seconds >= 120:
        return f"{seconds / 60:.0f} minutes"
    return f"{max(10, round(seconds, -1)):.0f} s"
