# SPDX-License-Identifier: Apache-2.0
"""The compiled operators of squared errors by themselves: arguments, schemas, every instruction
set, and nothing beside their tensors touched."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from fastpref import _extension
from tests import guard

WHY_NOT = _extension.ops_unavailable_reason()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
ops = torch.ops.fastpref
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")

ONE = torch.ones(2, 3, 8)
KEPT = torch.ones(2, 3, 8, dtype=torch.bool)
FACTOR = torch.ones(2)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": torch.ones(2, 8)}, r"model must be \(B, S, R\).*got 2 dimensions"),
    ({"model": ONE.int()}, "model must be float64, float32, bfloat16 or float16"),
    ({"model": ONE.transpose(1, 2)}, "contiguous pieces|shaped like model"),
    ({"target": torch.ones(2, 3, 7)}, "target must be .* shaped like model"),
    (
        {"target": torch.ones(2, 3, 16)[..., ::2]},
        "target must have contiguous pieces.* stride of 2",
    ),
    ({"mask": KEPT.int()}, "mask must be bool"),
    ({"mask": KEPT[:, :1]}, "mask must be .* shaped like model"),
]
OF_REFERENCE = [({"reference": torch.ones(2, 3, 7)}, "reference must be .* shaped like model")]
OF_GRADIENT = [
    ({"out": ONE.double()}, "out must have the dtype of model"),
    ({"out": torch.empty(2, 2, 8)}, "out must be .* shaped like model"),
    ({"factor": torch.ones(3)}, r"factor must be contiguous, of shape \(2,\)"),
    ({"factor": torch.ones(4)[::2]}, r"factor must be contiguous, of shape \(2,\)"),
    ({"factor": FACTOR.half()}, "factor must be float32 or float64"),
    ({"target": ONE.double()}, "factor must be float64 where a prediction is"),
]


def name_of(one: dict[str, Any] | str) -> str:
    """The same in every process: a tensor's numbers are not."""
    return one[:30] if isinstance(one, str) else "-".join(one)


@pytest.mark.parametrize("given, message", [*BAD, *OF_REFERENCE], ids=name_of)
def test_arguments_of_squared_errors(given: dict[str, Any], message: str) -> None:
    arguments = {"model": ONE, "reference": ONE, "target": ONE, "mask": KEPT, "divisor": 1.0}
    with pytest.raises(RuntimeError, match=message):
        ops.squared_errors(**arguments | given)


@pytest.mark.parametrize("given, message", [*BAD, *OF_GRADIENT], ids=name_of)
def test_arguments_of_error_gradient(given: dict[str, Any], message: str) -> None:
    out = torch.empty_like(ONE)
    arguments = {"out": out, "model": ONE, "target": ONE, "mask": KEPT, "factor": FACTOR}
    with pytest.raises(RuntimeError, match=message):
        ops.error_gradient_(**arguments | given)


@pytest.mark.heavy
@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_opcheck(alone: bool) -> None:
    model, target = torch.randn(2, 1, 3, 8).bfloat16()[:, 0], torch.randn(2, 3, 8)
    reference = None if alone else torch.randn(2, 3, 8).half()
    given = (model, reference, target, KEPT, 24.0)
    torch.library.opcheck(ops.squared_errors.default, given, test_utils=CHECKS)
    out = torch.empty_like(model)
    given = (out, model, target, KEPT, FACTOR)
    torch.library.opcheck(ops.error_gradient_.default, given, test_utils=CHECKS)


CODE = """
import json, torch
from fastpref import _extension
from fastpref.diffusion.backends import cpp, plain
from tests import guard

_extension.ops_unavailable_reason()
torch.manual_seed(0)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
worst = 0.0

def far(found, expected):
    return float(((found.double() - expected).abs() / expected.abs().clamp(min=1e-3)).max())

for side in guard.SIDES:
    for dtype in DTYPES:
        for pieces, length in ((1, 1), (1, 13), (1, 1025), (3, 16), (5, 333), (40, 4), (1, 17000)):
            # Apart, so that a piece is followed by what is not its own.
            drawn = [torch.randn(2, pieces, length + 3).to(dtype)[..., :length] for _ in range(4)]
            mask = torch.rand(2, pieces, length) < 0.5
            for kept in (None, mask, mask[:, :1, :1]):
                p, r, t, out = (guard.guarded(one, side) for one in drawn)
                if kept is not None:
                    kept = guard.guarded(kept, side).expand(mask.shape)
                given = p, r, t, kept
                exact = plain.squared_errors(*(one.double() for one in (p, r, t)), kept, 7)
                for one, other in zip(cpp.squared_errors(*given, 7), exact):
                    worst = max(worst, far(one, other))
                factor = guard.guarded(torch.tensor([1.5, -2.0]).to(exact[0].dtype), side)
                factor = factor if dtype == torch.float64 else guard.guarded(factor.float(), side)
                cpp.error_gradient(out, p, t, given[3], factor)
                expected = torch.empty_like(out)
                plain.error_gradient(expected, p, t, kept, factor)
                assert torch.equal(out, expected), (dtype, pieces, length)
print(json.dumps([torch.ops.fastpref.cpu_capability(), worst]))
"""


@pytest.mark.heavy
@pytest.mark.skipif(guard.unavailable_reason() is not None, reason=str(guard.unavailable_reason()))
@pytest.mark.parametrize(
    "capability",
    ["baseline", *(pytest.param(one, marks=pytest.mark.slow) for one in ("avx2", "avx512"))],
)
def test_instruction_sets(capability: str) -> None:
    """On tensors beside pages that nothing may touch."""
    level = ["baseline", "avx2", "avx512"].index(capability)
    if ops.cpu_capability() < level:
        pytest.skip(f"this processor has no {capability}")
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", CODE],
        env={**os.environ, "FASTPREF_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    used, worst = json.loads(done.stdout)
    # Of a gap, which is a small sum of large terms.
    assert used == level and worst < 5e-4


def test_pieces_beyond_an_int32() -> None:
    """Of one block of memory that is walked again and again, in every other piece of a sample."""
    block = torch.randn(1, 1, 1 << 16).bfloat16()
    pieces = (1 << 15) + 1
    model, target = block.expand(1, pieces, -1), torch.zeros_like(block).expand(1, pieces, -1)
    mask = torch.zeros(1, pieces, 1, dtype=torch.bool)
    mask[:, -1] = True
    found = ops.squared_errors(model, None, target, mask.expand(model.shape), 1.0)[1]
    torch.testing.assert_close(
        found.double(), block.double().square().sum((1, 2)), rtol=5e-7, atol=0
    )
