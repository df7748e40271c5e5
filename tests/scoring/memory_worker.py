# SPDX-License-Identifier: Apache-2.0
"""What calls take of memory, each in a process of its own, forked before torch starts a thread: its
peak is its own. ``python memory_worker.py CALLS`` prints a line of JSON for each."""

import json
import os
import sys
from pathlib import Path

import torch

from fastpref import (
    ScoringOptions,
    explain,
    explain_divergence,
    linear_divergence,
    linear_logprob,
    preference_loss,
)
from fastpref.optim import DCTAdamW
from fastpref.scoring import workspace

RESET_PEAK = Path("/proc/self/clear_refs")  # 5: VmHWM is VmRSS again


def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def leaves(call, rows, columns):
    dtype = getattr(torch, call["dtype"])
    hidden, weight = (torch.randn(n, call["hidden"]).to(dtype) for n in (rows, columns))
    hidden.requires_grad_("hidden" in call["needs"])
    return hidden, weight.requires_grad_("weight" in call["needs"])


def score(call, rows, columns):
    hidden, weight = leaves(call, rows, columns)
    outputs = tuple(call["outputs"])
    arguments = {"outputs": outputs, "options": ScoringOptions(**call["options"])}
    target = torch.randint(0, columns, (rows,))
    plan = explain(hidden, weight, target, **arguments)
    gradient = torch.randn(rows)
    gradient[torch.rand(rows) < call["zero"]] = 0

    def step():
        scores = linear_logprob(hidden, weight, target, **arguments)
        if call["needs"]:
            tensors = [getattr(scores, name) for name in outputs]
            torch.autograd.backward(tensors, [gradient] * len(outputs))

    return step, plan, (hidden, weight)


def prefer(call, rows, columns):
    """Pairs, with a live reference."""
    hidden, weight = leaves(call, rows, columns)
    pairs = max(1, rows // (2 * call["length"]))
    length = rows // (2 * pairs)
    states = hidden[: 2 * pairs * length].view(2 * pairs, length, -1)
    target = torch.randint(0, columns, (2 * pairs, length))
    arguments = {
        "ref_hidden": states.detach(),
        "ref_weight": weight.detach(),
        "options": ScoringOptions(**call["options"]),
    }
    plan = explain(states, weight, target, call["objective"], **arguments)

    def step():
        preference_loss(states, weight, target, call["objective"], **arguments).loss.backward()

    return step, plan, (hidden, weight)


def diverge(call, rows, columns):
    hidden, weight = leaves(call, rows, columns)
    teacher = [torch.randn(n, call["hidden"]).to(hidden.dtype) for n in (rows, columns)]
    options = ScoringOptions(**call["options"])
    plan = explain_divergence(hidden, weight, *teacher, options=options)

    def step():
        value = linear_divergence(hidden, weight, *teacher, options=options)
        if call["needs"]:
            value.sum().backward()

    return step, plan, (hidden, weight)


def project(call, rows, columns):
    """A head's step on its gradient's projection, which measures the columns of the transform."""
    hidden, weight = leaves(call, rows, columns)
    optimizer = DCTAdamW(weight, rank=8, update_every=1)
    target = torch.randint(0, columns, (rows,))
    options = ScoringOptions(**call["options"])

    def arguments():
        return {"weight_grad_basis": optimizer.basis, "options": options}

    def step():
        linear_logprob(hidden, weight, target, **arguments()).logp.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, explain(hidden, weight, target, **arguments()), (hidden, weight)


CALLS = {"score": score, "preference": prefer, "divergence": diverge, "project": project}


def measure(call):
    torch.set_num_threads(2)
    step, plan, inputs = CALLS[call["what"]](call, call["rows"], call["vocab"])
    # Threads, code, and what the matrix library keeps for each shape of a product: half a mebibyte
    # of machine code where it makes that for bfloat16.
    step()
    for one in inputs:
        one.grad = None
    workspace.release_workspace()
    RESET_PEAK.write_text("5")
    before = status("VmRSS")
    step()
    return {
        "grown": status("VmHWM") - before,
        "workspace": plan.workspace_bytes,
        "grads": sum(one.grad.nbytes for one in inputs if one.grad is not None),
        "plan": str(plan),
        "schedule": plan.schedule,
    }


def main():
    for call in json.loads(sys.argv[1]):
        if os.fork() == 0:
            print(json.dumps(measure(call)), flush=True)
            os._exit(0)
        if os.wait()[1] != 0:
            sys.exit("a measurement failed")


if __name__ == "__main__":
    main()
