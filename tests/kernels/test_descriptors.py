# SPDX-License-Identifier: Apache-2.0
"""The kernels through tensor descriptors, as on chips that have them, against the same through
pointers: the same bits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastpref import linear_logprob
from fastpref.kernels import tiles
from fastpref.scoring.backends import triton as triton_backend
from fastpref.scoring.statistics import OUTPUTS
from tests.scoring.cases import make_case
from tests.scoring.test_numbers import SCHEDULES, dtype_name, options_of

pytestmark = pytest.mark.skipif(not triton_backend.INTERPRETED, reason="on a GPU: pytest -m gpu")


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The matrices that were described since."""
    seen: list[Tensor] = []
    describe = triton_backend.TensorDescriptor.from_tensor

    def from_tensor(matrix: Tensor, block: list[int]) -> object:
        seen.append(matrix)
        return describe(matrix, block)

    monkeypatch.setattr(triton_backend.TensorDescriptor, "from_tensor", from_tensor)
    return seen


@pytest.mark.heavy
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)],
    ids=dtype_name,
)
@pytest.mark.parametrize("vocab", [520, 515])
@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_the_same_bits(dtype, vocab, schedule, described, monkeypatch):
    """Two rows in ten overflow and are projected again. A tile that a GPU would align is one of 515
    columns too."""
    case = make_case(rows=70, hidden=40, vocab=vocab, dtype=dtype, bias=True, below=0.2)
    options = options_of("triton", dtype, **SCHEDULES[schedule], vocab=vocab)
    align_tiles(monkeypatch)

    def results() -> dict[str, Tensor]:
        leaves = [one.clone().requires_grad_() for one in (case.hidden, case.weight)]
        scores = linear_logprob(
            *leaves, case.target, bias=case.bias, outputs=OUTPUTS, options=options
        )
        weights = torch.linspace(-1.0, 1.0, 70)
        upstream = scores.logp if schedule == "keep" else scores.logp + scores.entropy
        (upstream * weights).sum().backward()
        gradients = dict(zip(("d hidden", "d weight"), (one.grad for one in leaves), strict=True))
        return scores._asdict() | gradients

    through_pointers = results()
    assert not described
    monkeypatch.setattr(tiles, "INTERPRETED", replace(tiles.INTERPRETED, descriptors=True))
    for name, value in results().items():
        assert torch.equal(value, through_pointers[name]), name
    assert {one.shape[1] for one in described} >= {40, vocab}


def align_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of tiles start at multiples of 16 bytes, as on a GPU."""
    from fastpref.scoring import backward, forward, workspace

    def row_stride(cols: int, dtype: torch.dtype, device: torch.device) -> int:
        aligned = 16 // dtype.itemsize
        return -(-cols // aligned) * aligned

    def lease(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        *rows, cols = shape
        return torch.empty((*rows, row_stride(cols, dtype, device)), dtype=dtype)[..., :cols]

    for module in (forward, backward):
        monkeypatch.setattr(module, "lease", lease)
    for module in (backward, workspace):
        monkeypatch.setattr(module, "row_stride", row_stride)
