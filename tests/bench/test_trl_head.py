# SPDX-License-Identifier: Apache-2.0
"""TRL's one file, without TRL."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastpref.bench import machine, trl_head

ALONE = """
import sys
sys.modules["trl"] = None  # any import of it fails
import torch
from fastpref.bench import trl_head

torch.manual_seed(0)
hidden = torch.randn(5, 8, requires_grad=True)
weight = torch.randn(300, 8, requires_grad=True)
target = torch.randint(300, (5,))
outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
found = trl_head.function().apply(hidden, weight, None, target, 1.0, 64, None, 1.0, outputs)
logits = hidden @ weight.t()
want = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
torch.testing.assert_close(found[0], want)
torch.testing.assert_close(found[3], logits.mean(-1))
got = torch.autograd.grad(found[0].sum(), [hidden, weight])
for one, other in zip(got, torch.autograd.grad(want.sum(), [hidden, weight]), strict=True):
    torch.testing.assert_close(one, other)
assert not [name for name, one in sys.modules.items() if one and name.split(".")[0] == "trl"]
print("alone")
"""


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ALONE],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.heavy
def test_forward_and_backward_from_a_copy(tmp_path: Path) -> None:
    found = trl_head.find()
    if found is None:
        pytest.skip("trl is not installed")
    copy = tmp_path / "trl-1.16.0.py"
    shutil.copy(found, copy)
    done = run(**{trl_head.VARIABLE: str(copy)})
    assert done.stdout == "alone\n", done.stderr


@pytest.mark.heavy
def test_without_a_copy_it_says_what_is_missing() -> None:
    done = run(**{trl_head.VARIABLE: ""})
    assert "trl is not installed, and TRL_KERNEL names no copy" in done.stderr


def test_a_copy_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(trl_head.VARIABLE, str(tmp_path / "none.py"))
    assert "TRL_KERNEL must name a copy of TRL's" in str(trl_head.unavailable())
    assert machine.describe("cpu")["trl"] == "from none.py alone"
