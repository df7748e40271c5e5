# SPDX-License-Identifier: Apache-2.0
"""The example's monitor sees what the training is made to do."""

from pathlib import Path

import pytest

from tests.examples.loading import load, printed


@pytest.mark.heavy
def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for library in ("transformers", "accelerate", "datasets", "matplotlib"):
        pytest.importorskip(library)
    load("diagnostics").main(tmp_path)
    said = capsys.readouterr().out
    margins, drops = printed(said, "margin"), printed(said, "rejected_drop")
    assert len(margins) == 4 and margins[-1] > margins[0] and drops[-1] > 0
    assert "transport by layer" in said
    assert {one.name for one in tmp_path.glob("credit.*")} == {"credit.html", "credit.png"}
