# SPDX-License-Identifier: Apache-2.0
"""What a command is doing, on one line that rewrites itself on a terminal; nothing into a file."""

from __future__ import annotations

import sys
from collections.abc import Callable


def progress(before: str = "") -> Callable[[str], None]:
    """Says ``before`` and what runs."""

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{before}{text}", end="", file=sys.stderr, flush=True)

    return say


def clear() -> None:
    progress()("")
