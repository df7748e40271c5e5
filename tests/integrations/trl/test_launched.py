# SPDX-License-Identifier: Apache-2.0
"""``accelerate launch`` with two processes against one; a process killed in mid-step ends the
other, and the training that is resumed is the one that was not interrupted, to the bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integrations.trl.launched import SAVED, STEPS
from tests.integrations.trl.runs import RELEASE

pytest.importorskip("trl", reason='TRL is not installed (pip install "fastpref[trl]")')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(RELEASE < (1, 16), reason="stock runs on GPUs only, or has other heads"),
]
ROOT = Path(__file__).resolve().parents[3]


def launched(
    folder: Path, processes: int, batch: int, *how: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision=no"]
    command += ["--dynamo_backend=no", "--num_machines=1", f"--num_processes={processes}"]
    # With --cpu accelerate starts one process, whatever the number; with this flag it starts them
    # as torchrun does, and the training asks for the CPU. Port 0 is any that is free.
    command += ["--multi_gpu", "--main_process_port=0"] if processes > 1 else ["--cpu"]
    command += ["-m", "tests.integrations.trl.launched", str(folder), str(batch), *how]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900
    )


def losses(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
    return found


def test_two_processes_and_a_crash(tmp_path: Path) -> None:
    one, two, crashed = (tmp_path / name for name in ("one", "two", "crashed"))
    for folder, processes, batch in ((one, 1, 4), (two, 2, 2)):
        ran = launched(folder, processes, batch)
        assert ran.returncode == 0, ran.stderr
    assert len(losses(one)) == STEPS
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)

    killed = launched(crashed, 2, 2, "kill", str(SAVED + 2))
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr + killed.stdout
    checkpoint = crashed / f"checkpoint-{SAVED}"
    assert checkpoint.is_dir() and not (crashed / "losses.json").exists()

    resumed = launched(crashed, 2, 2, "resume", str(checkpoint))
    assert resumed.returncode == 0, resumed.stderr
    assert losses(crashed) == losses(two)
    weights, uninterrupted = (torch.load(folder / "weights.pt") for folder in (crashed, two))
    assert all(torch.equal(weights[name], value) for name, value in uninterrupted.items())
