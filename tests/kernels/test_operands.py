# SPDX-License-Identifier: Apache-2.0
"""Which operands the triton backend's kernels take, in which precision, and where the others go."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from fastpref import ScoringOptions, linear_logprob
from fastpref.kernels import products, tiles
from fastpref.scoring.backends import tiled
from fastpref.scoring.backends import triton as triton_backend
from fastpref.scoring.slab import Projection, Slab
from fastpref.scoring.statistics import OUTPUTS
from fastpref.scoring.types import LogitMap
from tests.kernels.conftest import _dot
from tests.scoring.cases import verify

interpreted = pytest.mark.skipif(not triton_backend.INTERPRETED, reason="on a GPU: pytest -m gpu")
GIVEN = ScoringOptions(backend="triton")


class Launched(Exception):
    pass


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product of the fused kernels."""

    class Kernel:
        def __getitem__(self, grid: object) -> None:
            raise Launched

    monkeypatch.setattr(triton_backend.linear_exp, "linear_exp_kernel", Kernel())
    monkeypatch.setattr(triton_backend.linear_grad, "linear_grad_kernel", Kernel())


@pytest.mark.heavy
@interpreted
@pytest.mark.parametrize(
    "dtype, width, schedule",
    [
        pytest.param(dtype, width, schedule, marks=[] if (row + at) % 5 == 0 else pytest.mark.slow)
        for row, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
        for at, width in enumerate((1, 7, 37, 44, 100))
        for schedule in ("keep", "recompute")
    ],
)
def test_rows_of_no_whole_16_bytes_go_in_place(dtype, width, schedule, no_kernels):
    options = ScoringOptions(backend="triton", schedule="auto" if schedule == "keep" else schedule)
    if width * dtype.itemsize % 16 == 0:
        with pytest.raises(Launched):
            verify(options, dtype, rows=40, hidden=width, vocab=130)
        return
    verify(
        options,
        dtype,
        rows=40,
        hidden=width,
        vocab=130,
        outputs=OUTPUTS,
        differentiated=("logp", "entropy") if schedule == "recompute" else ("logp",),
    )
    verify(options, dtype, rows=40, hidden=width, vocab=130, differentiated=())


@pytest.mark.heavy
@interpreted
@pytest.mark.parametrize("lies", ["transposed", "between others", "4 bytes on"])
@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_other_storage_goes_in_place(lies, which, no_kernels):
    given = {"hidden": torch.randn(40, 64), "weight": torch.randn(130, 64)}
    expected = given["hidden"].double() @ given["weight"].double().t()
    rows = len(given[which])
    if lies == "transposed":
        given[which] = given[which].t().contiguous().t()
    else:
        memory = torch.zeros(rows * 66)
        first = 1 if lies == "4 bytes on" else 0
        stride = 64 if first else 66
        place = memory[first : first + rows * stride].view(rows, stride)[:, :64]
        given[which] = place.copy_(given[which])
    target = torch.arange(40)
    scores = linear_logprob(**given, target=target, options=GIVEN)
    logp = expected.log_softmax(1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(scores.logp.double(), logp, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5, 12, 13])
def test_a_tile_that_the_plan_has_not_is_taken_in_parts(rows, statistics, monkeypatch):
    """And within the temporaries of the plan."""
    monkeypatch.setattr(tiled, "SPARE_ROWS", 6)
    leased = []

    def lease(shape, dtype, device):
        leased.append(shape)
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr(tiled, "lease", lease)
    hidden, weight = torch.randn(rows, 33), torch.randn(130, 33)
    target, anchor = torch.arange(rows), torch.randn(rows)
    one = Projection(hidden, Slab(weight, None, LogitMap(1.0, 0.0)), None, target)
    sums = triton_backend.project(one, anchor, False, statistics)
    with_tile = one._replace(tile=torch.empty(rows, 130))
    other = triton_backend._in_place("cpu").project(with_tile, anchor, False, statistics)
    for mine, its in zip(sums, other, strict=True):
        assert (mine is None) == (its is None)
        assert mine is None or torch.allclose(mine, its, rtol=1e-5, atol=1e-5)
    assert leased == [(min(rows, 6), 130)]
    beside = triton_backend.temporary_bytes(rows, 130, "cpu", torch.float32, statistics)
    plain = triton_backend._in_place("cpu").temporary_bytes(
        min(rows, 6), 130, "cpu", torch.float32, statistics
    )
    assert beside >= 4 * min(rows, 6) * 130 + plain


def test_temporaries_count_the_partial_sums(monkeypatch):
    """Of the narrower tile of a chip: whether there is a cap is not known."""
    monkeypatch.setattr(triton_backend, "_chip", lambda device: tiles.CHIPS[90])
    other = SimpleNamespace(temporary_bytes=lambda *sizes: 0)
    monkeypatch.setattr(triton_backend, "_in_place", lambda device_type: other)
    shape = (100_000, 128_256, "cuda", torch.bfloat16)
    sums = 4 * 100_000 * 128_256 // 128
    plain, heavy = (triton_backend.temporary_bytes(*shape, one) for one in (False, True))
    assert sums <= plain <= 1.02 * sums and 6 * sums <= heavy <= 6.02 * sums


@pytest.mark.parametrize(
    "capability, says",
    [
        ((7, 5), "8.0 or newer"),
        ((8, 0), None),
        ((8, 9), None),
        ((9, 0), None),
        ((10, 3), None),
        ((11, 0), None),
        ((12, 0), None),
        ((12, 1), None),
        ((13, 0), "not compiled for compute capability (13, 0) yet; use backend='auto'"),
    ],
)
def test_capabilities(capability, says, monkeypatch):
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reason = triton_backend.unavailable_reason("cuda")
    assert reason is None if says is None else says in reason


@pytest.mark.slow
@pytest.mark.heavy
def test_without_compiled_operators():
    """The reason is of the GPU, not an ImportError; and calls work in the interpreter."""
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from pathlib import Path\n"
        "exists = Path.exists\n"
        "Path.exists = lambda self: self.name != '_ops.so' and exists(self)\n"
        "import torch\n"
        "from fastpref import _extension\n"
        "from fastpref import ScoringOptions, linear_logprob\n"
        "from fastpref.scoring import backends\n"
        "assert _extension.ops_unavailable_reason() is not None\n"
        "print(backends.unavailable_reason('triton', 'cuda'))\n"
        "backends.load('triton'); backends.load('cpp'); backends.load('torch')\n"
        "given = ScoringOptions(backend='triton')\n"
        "for width in (16, 15):\n"
        "    x = torch.randn(3, width), torch.randn(9, width), torch.arange(3)\n"
        "    logp = linear_logprob(*x, options=given).logp\n"
        "    exact = (x[0] @ x[1].t()).log_softmax(1).gather(1, x[2][:, None])[:, 0]\n"
        "    assert torch.allclose(logp, exact, atol=1e-5), (logp, exact)\n"
    )
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "CPU tensors only" in done.stdout


SETTINGS = {
    "nothing": ("", False),
    "old": ("b.cuda.matmul.allow_tf32 = True", True),
    "precision": ("torch.set_float32_matmul_precision('high')", True),
    "exact": ("b.cuda.matmul.fp32_precision = 'ieee'", False),
    "matmul": ("b.cuda.matmul.fp32_precision = 'tf32'", True),
    "all": ("b.fp32_precision = 'tf32'", True),
    "all but products": (
        "b.fp32_precision = 'tf32'; b.cuda.matmul.fp32_precision = 'ieee'",
        False,
    ),
    "products alone": ("b.fp32_precision = 'ieee'; b.cuda.matmul.fp32_precision = 'tf32'", True),
    "taken back": ("b.fp32_precision = 'tf32'; b.fp32_precision = 'ieee'", False),
}


@pytest.mark.heavy
def test_precision_follows_torch():
    """Whichever of its settings said it, each in a process of its own."""
    code = (
        "import os, sys, torch\n"
        "from fastpref.scoring.backends import triton as triton_backend\n"
        "for setting in sys.argv[1:]:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        exec(setting, {'torch': torch, 'b': torch.backends})\n"
        "        print(triton_backend._tf32_allowed(), flush=True)\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
    )
    known = hasattr(torch.backends, "fp32_precision")
    cases = [one for one in SETTINGS.values() if known or "fp32_precision" not in one[0]]
    command = [sys.executable, "-c", code, *(setting for setting, _ in cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(expected) for _, expected in cases], done.stderr


def nearest(x: np.ndarray) -> np.ndarray:
    """Of numbers of 10 mantissa bits, by arithmetic in float64; of two the one further from 0."""
    mantissa, exponent = np.frexp(np.abs(x.astype(np.float64)))
    return np.copysign(np.ldexp(np.floor(mantissa * 2**11 + 0.5), exponent) / 2**11, x)


@pytest.mark.heavy
@interpreted
@pytest.mark.parametrize("schedule", ["auto", "recompute"])
def test_operands_in_tf32_are_rounded_to_the_nearest(monkeypatch, schedule):
    seen: list[np.ndarray] = []

    def dot(self, a, b, total, precision, imprecise):
        seen.extend((a.data.copy(), b.data.copy()))
        return _dot(self, a, b, total, precision, imprecise)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(triton_backend, "_tf32_allowed", lambda: True)
    hidden, weight = (torch.randn(n, 40).requires_grad_() for n in (33, 70))
    # One row overflows and is projected again, through pointers.
    with torch.no_grad():
        hidden[3] *= 1000
    given = ScoringOptions(backend="triton", schedule=schedule)
    linear_logprob(hidden, weight, torch.arange(33), options=given).logp.sum().backward()
    values = np.concatenate([one.ravel() for one in seen])
    assert not (values.view(np.int32) & 0x1FFF).any()
    rounded = {float(one) for one in nearest(hidden.detach().numpy()).ravel()}
    rounded |= {float(one) for one in nearest(weight.detach().numpy()).ravel()} | {0.0}
    assert set(values.astype(np.float64).tolist()) <= rounded
    monkeypatch.setattr(triton_backend, "_tf32_allowed", lambda: False)
    seen.clear()
    linear_logprob(hidden, weight, torch.arange(33), options=given)
    assert (np.concatenate([one.ravel() for one in seen]).view(np.int32) & 0x1FFF).any()


def round_all(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, products.round_to_tf32(tl.load(x + at)))


@pytest.mark.heavy
@interpreted
def test_what_is_not_finite_stays_so_in_tf32():
    bits = np.array([0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001], dtype=np.uint32)
    special = torch.from_numpy(np.concatenate([bits, bits | 0x80000000]).view(np.float32).copy())
    out = torch.empty_like(special)
    InterpretedFunction(round_all)[(1,)](special, out, SIZE=8)
    assert torch.equal(out.isnan(), special.isnan())
    assert torch.equal(out[special.isinf()], special[special.isinf()])
