# SPDX-License-Identifier: Apache-2.0
"""How many launches a scoring call makes: Triton's as its interpreter runs them, torch's by its
operators, on CPU tensors that stand for a GPU's packed rows.

A program of its own, because Triton's interpreter is chosen when it is imported: ``python -m
fastpref.bench.launches`` prints, by tier and call, Triton's kernels and torch's operators.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from ..scoring.types import Schedule

# Of torch's operators none of these starts work on a device.
FREE = (
    *("empty", "view", "detach", "slice", "select", "unbind", "promote", "alias", "t.default"),
    *("split", "as_strided", "expand", "unsqueeze", "_local_scalar", "set_.source"),
)
TRL_OUTPUTS = ("logp", "entropy", "mean_logits", "is_top1")


class Call(NamedTuple):
    outputs: tuple[str, ...] = ("logp",)
    gradient: bool = True
    schedule: Schedule = "auto"
    backward: bool = False  # that pass alone is counted, else the forward pass


CALLS = {
    "no gradient": Call(gradient=False),
    "no gradient, TRL's outputs": Call(TRL_OUTPUTS, gradient=False),
    "exponentials kept": Call(),
    "exponentials kept, TRL's outputs": Call(TRL_OUTPUTS),
    "exponentials kept, backward": Call(backward=True),
    "recomputed, backward": Call(schedule="recompute", backward=True),
}

Counts = dict[str, dict[str, tuple[int, int]]]


def measured() -> Counts:
    """In a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"counting launches failed: {done.stderr.strip().splitlines()[-1:]}")
    found: Counts = json.loads(done.stdout)
    return found


def count(call: Callable[[], object]) -> tuple[int, int]:
    """Triton's launches of ``call``, and torch's; to be used where Triton's interpreter is on."""
    import triton.runtime.interpreter as interpreter
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

    kernels = operators = 0
    launch = interpreter.GridExecutor.__call__

    def counted(self: Any, *given: Any, **named: Any) -> Any:
        nonlocal kernels
        kernels += 1
        with _disable_current_modes():
            return launch(self, *given, **named)

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal operators
            # What is made on the host stays there.
            on_host = str((kwargs or {}).get("device")) == "cpu" and "zeros" in str(operation)
            operators += not (on_host or any(name in str(operation) for name in FREE))
            return operation(*args, **(kwargs or {}))

    with mock.patch.object(interpreter.GridExecutor, "__call__", counted), Counting():  # type: ignore[no-untyped-call]
        call()
    return kernels, operators


def of_call(backend: Any, which: Call) -> tuple[int, int]:
    """Of a pass of ``linear_logprob`` on packed rows."""
    import torch

    from .. import ScoringOptions, linear_logprob
    from ..scoring import backward, request
    from ..scoring.packing import Packing

    hidden, weight = (
        torch.randn(n, 32, dtype=torch.float32, device="cpu").requires_grad_(which.gradient)
        for n in (64, 96)
    )
    target = torch.randint(96, (64,), dtype=torch.int64, device="cpu")

    def packed(target: Any, ignore_index: int, *_: Any, **__: Any) -> Packing:
        return Packing(len(target), len(target), None, target != ignore_index, None)

    def forward() -> Tensor:
        options = ScoringOptions(backend=backend, schedule=which.schedule)
        logp = linear_logprob(hidden, weight, target, outputs=which.outputs, options=options).logp
        if logp is None:
            raise RuntimeError("logp was asked for")
        return logp

    with (
        mock.patch.object(request, "pack", packed),
        # As on a GPU, which does not look for rows without a gradient.
        mock.patch.object(backward, "_indices_of_active", lambda upstream: None),
    ):
        logp = forward()  # tries the kernels
        if not which.backward:
            return count(forward)
        grad = torch.ones_like(logp)
        logp.backward(grad)
        logp = forward()
        return count(lambda: logp.backward(grad))


if __name__ == "__main__":
    tiers = {
        tier: {name: of_call(tier, call) for name, call in CALLS.items()}
        for tier in ("rows", "triton")
    }
    print(json.dumps(tiers))
