# SPDX-License-Identifier: Apache-2.0
"""A reference that moves lets the policy go farther, in as many steps."""

import pytest

from tests.examples.loading import load, printed


@pytest.mark.heavy
def test_it_goes_farther(capsys: pytest.CaptureFixture[str]) -> None:
    load("moving_reference").main()
    said = capsys.readouterr().out
    fixed, soft, hard = printed(said, "policy")
    stayed, follows, copied = printed(said, "reference")
    assert min(soft, hard) > fixed + 0.2 and fixed > 3
    # The last step is one of those after which it moves.
    assert stayed == 0 and fixed < follows < soft and copied == hard
