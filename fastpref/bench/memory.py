# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one step above its inputs, measured as resident memory in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .. import ScoringOptions, explain, linear_logprob, preference_loss
from ..scoring import Plan
from ..scoring.batches import BatchedPlan
from .work import Shape, make_work

MEBIBYTE = 1 << 20


def measure(shape: Shape, dtype: str, schedule: str, budget: int | None) -> dict[str, Any]:
    """Peak in MiB beside what the plan promises; starts a process."""
    call = json.dumps([shape.sequences, shape.length, shape.hidden_size, shape.vocab_size])
    done = subprocess.run(
        [sys.executable, "-m", __name__, call, dtype, schedule, str(budget or 0)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the memory measurement failed:\n{done.stderr.strip()}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _main(sizes: str, dtype: str, schedule: str, budget: str) -> None:
    work = make_work(Shape(*json.loads(sizes)), getattr(torch, dtype))
    hidden, weight = work.leaves(trainable=True)
    options = ScoringOptions(schedule=schedule, memory_budget=int(budget) or None)  # type: ignore[arg-type]
    # A small call first: thread pools and library workspaces are not the step's.
    small = work.target[:1, :8].clamp(min=0)
    first = linear_logprob(hidden[:1, :8], weight[:64], small % 64).logp
    if first is not None:
        first.sum().backward()
    hidden.grad = weight.grad = None
    del first
    call = (hidden, weight, work.target)
    reference = {"ref_logps": torch.zeros(work.target.shape[0])}
    if schedule == "batches":
        plan: Plan | BatchedPlan = explain(*call, "dpo", **reference, options=options).policy
    else:
        plan = explain(*call, options=options)
    # Writing 5 sets the high-water mark back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    if schedule == "batches":
        preference_loss(
            *call, "dpo", ref_logps=reference["ref_logps"], options=options
        ).loss.backward()
    else:
        logp = linear_logprob(*call, options=options).logp
        if logp is not None:
            work.dpo(logp).backward()
    gradients = hidden.nbytes + weight.nbytes
    print(
        json.dumps(
            {
                "schedule": plan.schedule,
                "scored": plan.scored,
                "units": plan.units,
                "peak": (_resident("VmHWM") - before) / MEBIBYTE,
                "gradients": gradients / MEBIBYTE,
                "workspace": plan.workspace_bytes / MEBIBYTE,
                "logits": plan.scored * weight.shape[0] * weight.itemsize / MEBIBYTE,
            }
        )
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])
