# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one step of DPO above its inputs: on a CPU the resident memory of a process of its
own, on a GPU what torch allocated."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ScoringOptions, explain, preference_loss
from ..integrations.trl import default_budget
from ..optim import dct_matrix
from ..scoring import workspace
from ..scoring.memory import total_memory
from .experiment import Case, Loss, Mode, step
from .losses import score_implementations
from .timing import MEBIBYTE, Clock
from .work import Shape, Work

MODE: Mode = "trainable head"
QUICK = ("fastpref", "plain torch", "TRL fused head")  # most of what each takes is its imports
RANK = 64
PROJECTED = f"fastpref, {RANK} columns of d weight"


def own_options(case: Case, budget: int) -> dict[str, ScoringOptions]:
    """fastpref by itself, within ``budget`` MiB, and within what its adapter in TRL takes on a GPU
    of this size; on a CPU it has the memory of the machine."""
    limit = budget * MEBIBYTE
    in_trl = default_budget(
        case.shape.scored,
        case.shape.hidden_size,
        case.shape.vocab_size,
        getattr(torch, case.dtype),
        getattr(torch, case.dtype),
        trains_weight=True,
        keeps=True,
        device_memory=total_memory(torch.device(case.device)),
    )
    return {
        "fastpref": ScoringOptions(),
        f"fastpref, recompute, {budget} MiB": ScoringOptions(
            schedule="recompute", memory_budget=limit
        ),
        f"fastpref, batches, {budget} MiB": ScoringOptions(schedule="batches", memory_budget=limit),
        # TRL has the loss: what runs there is two passes.
        "fastpref in TRL": ScoringOptions(schedule="keep", memory_budget=in_trl),
    }


def names(case: Case, budget: int, compiling: bool) -> list[str]:
    """Of what is installed; ``compiling``: also what compiles itself first, for seconds."""
    peers = [
        one.name
        for one in score_implementations(case)
        if not one.name.startswith("fastpref")
        and one.unavailable is None
        and (compiling or not one.compiles)
    ]
    return [*own_options(case, budget), PROJECTED, *peers]


def measure(case: Case, name: str, budget: int) -> dict[str, Any]:
    """A row of the report, in MiB: the measured peak, the gradients in it, what fastpref's plan
    allows for its workspace, and the logits that are not held."""
    if case.device != "cpu":
        return _measure(case, name, budget)
    given = json.dumps([dataclasses.asdict(case), name, budget, torch.get_num_threads()])
    done = subprocess.run(
        [sys.executable, "-m", __name__, given], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process that measures memory failed: {last}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _measure(case: Case, name: str, budget: int) -> dict[str, Any]:
    work = case.work()
    loss, promised = _implementation(case, work, name, budget)
    run = functools.partial(step, loss, work, MODE)
    # Thread pools, libraries' workspaces and compilation are not the step's.
    run()
    workspace.release_workspace()
    if case.device == "cpu":
        peak: float | None = _resident_peak(run)
    else:
        peak = Clock(case.device).peak(run)
    return {
        "implementation": name,
        "dtype": case.dtype,
        "device": case.device,
        "scored": case.shape.scored,
        "hidden_size": case.shape.hidden_size,
        "vocab_size": case.shape.vocab_size,
        "peak": peak,
        "gradients": (work.hidden.nbytes + work.weight.nbytes) / MEBIBYTE,
        "workspace": promised,
        "logits": case.shape.scored * case.shape.vocab_size * work.weight.itemsize / MEBIBYTE,
    }


def _implementation(case: Case, work: Work, name: str, budget: int) -> tuple[Loss, float | None]:
    """And the workspace that its plan allows, in MiB."""
    if name == PROJECTED:
        return _projected(work)
    options = own_options(case, budget).get(name)
    if options is None:
        peers = {one.name: one.loss for one in score_implementations(case)}
        return peers[name], None
    reference = torch.zeros(case.shape.sequences, device=case.device, dtype=torch.float32)

    def loss(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        return preference_loss(
            hidden, weight, work.target, "dpo", ref_logps=reference, options=options
        ).loss

    leaves = work.leaves(hidden=True, weight=True)
    plan = explain(*leaves, work.target, "dpo", ref_logps=reference, options=options)
    return loss, plan.policy.workspace_bytes / MEBIBYTE


def _projected(work: Work) -> tuple[Loss, float]:
    """The weight's gradient on some columns, which are part of the peak in its place."""
    reference = torch.zeros(work.hidden.shape[0], device=work.hidden.device, dtype=torch.float32)
    columns = dct_matrix(work.weight.shape[1], device=work.weight.device)[:, :RANK]

    def given(hidden: Tensor, weight: Tensor) -> dict[str, Any]:
        shape = weight.shape[0], columns.shape[1]
        out = torch.zeros(shape, device=weight.device, dtype=torch.float32)
        return {"ref_logps": reference, "weight_grad_basis": (columns, out)}

    def loss(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        weight = weight.detach()
        return preference_loss(hidden, weight, work.target, "dpo", **given(hidden, weight)).loss

    hidden, weight = work.leaves(hidden=True, weight=False)
    plan = explain(hidden, weight, work.target, "dpo", **given(hidden, weight))
    return loss, plan.policy.workspace_bytes / MEBIBYTE


def _resident_peak(run: functools.partial[Any]) -> float:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    # Writing 5 sets the high-water mark back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / MEBIBYTE


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    case, name, budget, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    case["shape"] = Shape(**case["shape"])
    print(json.dumps(_measure(Case(**case), name, budget)))
