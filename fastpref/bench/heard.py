# SPDX-License-Identifier: Apache-2.0
"""What fastpref warns of in this process, such as that another backend stands in for the one that
was asked for."""

from __future__ import annotations

import functools
import logging


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@functools.cache
def warnings() -> list[str]:
    """Since the first call, and from then on: it says a thing once."""
    heard = _Heard()
    logging.getLogger("fastpref").addHandler(heard)
    return heard.said
