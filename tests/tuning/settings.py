# SPDX-License-Identifier: Apache-2.0
"""A setting that a CPU is done with at once, and small cases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastpref.tuning import checks, timings
from fastpref.tuning.checks import Setting
from tests.scoring.cases import BACKENDS

TIERS = tuple(BACKENDS)
SETTING = Setting("cpu", "bfloat16", 16, 300)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        name: replace(case, rows=min(case.rows, 72), vocab=case.vocab // 20)
        for name, case in checks.CHECKS.items()
    }
    monkeypatch.setattr(checks, "CHECKS", small)
    monkeypatch.setattr(timings, "ROWS", 16)
    monkeypatch.setattr(timings, "ROUNDS", 3)
    checks._expected.cache_clear()
