# SPDX-License-Identifier: Apache-2.0
"""Two processes that train with a tied head end, and one that does not is reported."""

import pytest

from tests.parallel import endings

pytestmark = pytest.mark.slow


def test_both_end() -> None:
    seconds, (first, second) = endings.run()
    assert 0 < seconds < endings.BOUND
    ddp, fsdp2 = (line.split() for line in first.splitlines())
    assert first == second and ddp[1:] == fsdp2[1:] and len(set(ddp)) == 4


def test_one_that_does_not_end_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endings, "BOUND", 0.5)
    with pytest.raises(AssertionError, match=r"rank 0 did not end in 0 s"):
        endings.run()
