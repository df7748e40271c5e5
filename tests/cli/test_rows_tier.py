# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref kernels --rows``, as it compiles and counts here."""

import json
import os
import subprocess
import sys

import pytest

from fastpref.bench import predictions
from fastpref.cli.rows_tier import MOST_LAUNCHES, table
from tests.bench.counted import COMPILED, LAUNCHED

pytest.importorskip("triton")
# Instructions a logit, 16 bits on sm_90: what was counted, and one tenth.
MOST_INSTRUCTIONS = {
    "no gradient": 10.8,
    "no gradient, with statistics": 19.4,
    "exponentials kept": 13.5,
    "exponentials kept, with statistics": 22.0,
    "recomputed gradient": 22.4,
}


@pytest.mark.slow
def test_counted_here() -> None:
    command = [sys.executable, "-m", "fastpref", "kernels", "--rows", "--json"]
    command += ["--capability", "90", "--element", "bf16"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kernels"] == []
    calls = {one["call"]: one for one in found["rows tier"]}
    assert calls.keys() == MOST_INSTRUCTIONS.keys()
    for name, one in calls.items():
        assert 7 < sum(one["instructions"]) <= MOST_INSTRUCTIONS[name]
        # Nothing from Triton's cache, which an earlier run filled; the rest is up to the machine.
        assert one["compile_seconds"] > 0.3
        assert one["problems"] == []
    assert calls["no gradient"]["forward_launches"] <= MOST_LAUNCHES
    assert calls["exponentials kept"]["forward_launches"] <= MOST_LAUNCHES
    assert [calls["no gradient"][one] for one in ("read", "written")] == [2, 0]


def test_table() -> None:
    def said(capability: int, element: str) -> str:
        found = [
            predictions.counts(call, element, COMPILED, LAUNCHED) for call in predictions.CALLS
        ]
        return table(capability, element, found)

    lines = said(90, "bf16").splitlines()
    assert lines[0].startswith("sm_90, bf16, rows tier")
    assert lines[2].split() == ["no", "gradient", "41", "11.0", "2", "0", "10", "10", "2.0"]
    assert any("predicted, not measured" in line for line in lines)
    (line,) = (one for one in lines if one.startswith("  3u, H200"))
    assert "of 1.05" in line and "of 1.09" in line and "of 1.18" in line
    assert sum("times TRL" in one or " of 1.45" in one for one in lines) == 3
    for other in ((80, "bf16"), (90, "fp32")):
        assert "predicted" not in said(*other)
