# SPDX-License-Identifier: Apache-2.0
"""What commands check of their options before any work. All of it raises DemoError."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from ..demo import DemoError

# Of what is counted; more is a slip, which torch would answer with an overflow.
MOST = 2**31 - 1
SEEDS = 2**32 - 1  # numpy's, which TRL sets too


def writable(out: Path) -> None:
    """Results can be written to the folder ``out``, which is left as it was, or not made yet.

    It is tried: what the permissions say is not all that decides.
    """
    missing: list[Path] = []
    try:
        missing += [path for path in (out, *out.parents) if not path.exists()]
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise DemoError(
            f"--out must be a folder that can be written to, got {out}: {error.strerror}"
        ) from None
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def whole(option: str, value: int, least: int, most: int = MOST) -> None:
    """A whole number is within its limits."""
    if value < least:
        raise DemoError(f"{option} must be at least {least}, got {value}")
    if value > most:
        raise DemoError(f"{option} must be at most {most}, got {value}")
