# SPDX-License-Identifier: Apache-2.0
"""Sums over the rows of a tile against float64, by the kernel in Triton's interpreter and by what
serves without it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref.kernels import column_sums as kernels
from fastpref.scoring.backends import column_sums, glue
from fastpref.scoring.backends import triton as triton_backend
from fastpref.scoring.workspace import lease

pytestmark = pytest.mark.skipif(not triton_backend.INTERPRETED, reason="on a GPU: pytest -m gpu")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
WAYS = {
    "kernel": glue.add_column_sums,
    "products": column_sums._by_products,
    "blocks": column_sums._by_blocks,
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def sums_of(way, matrix, weights):
    total = torch.linspace(-1, 1, matrix.shape[1], dtype=torch.float64)
    way(total, matrix, weights)
    return total - torch.linspace(-1, 1, matrix.shape[1], dtype=torch.float64)


@dtypes
@ways
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "rows, cols", [(1, 1), (31, 130), (33, 128), (300, 257), (1100, 70), (5, 2000)]
)
def test_sums(way, dtype, weighted: bool, rows: int, cols: int) -> None:
    """Of rows that lie apart, as those of a padded tile or of a slab of kept rows."""
    matrix = torch.randn(rows, cols + 3).to(dtype)[:, 1 : cols + 1]
    weights = torch.randn(rows) if weighted else None
    exact = matrix.double() if weights is None else matrix.double() * weights.double()[:, None]
    error = (sums_of(way, matrix, weights) - exact.sum(0)).abs()
    assert (error <= 2e-7 * exact.abs().sum(0) + 1e-15).all()


@ways
def test_tiny_terms_are_not_lost_on_a_large_one(way) -> None:
    """A probability is 1e-9 in each of thousands of rows, and a target's term -1 in one."""
    rows = 8192
    matrix = torch.full((rows, 5), 1e-9)
    matrix[7] = -1
    got = sums_of(way, matrix, None)
    exact = matrix.double().sum(0)
    # At most those that are added together with the large one.
    assert ((got - exact).abs() < 32e-9).all()
    # A single sum in float32, one row after the other, is off by all of the tiny ones.
    total = torch.tensor(-1.0)
    for _ in range(rows - 1):
        total += 1e-9
    assert abs(float(total) - exact[0]) > 8e-6


@ways
def test_bits_are_the_same_every_time_and_nan_stays_in_its_column(way) -> None:
    matrix, weights = torch.randn(700, 200).bfloat16(), torch.randn(700)
    first = sums_of(way, matrix, weights)
    assert torch.equal(first, sums_of(way, matrix, weights))
    matrix[3, 10], matrix[5, 20] = torch.nan, torch.inf
    again = sums_of(way, matrix, weights)
    others = torch.ones(200, dtype=torch.bool)
    others[[10, 20]] = False
    assert torch.equal(again[others], first[others]) and again[10].isnan()
    assert again[20].isinf()


@pytest.mark.parametrize(
    "rows, cols, parts", [(8192, 128256, 1), (8192, 1024, 16), (1, 5, 1), (600, 5, 3)]
)
def test_parts_fill_a_gpu(rows: int, cols: int, parts: int) -> None:
    assert glue.column_parts(rows, cols) == parts <= kernels.MOST_PARTS


# Of these none starts work on a device; of the tests' own is fill_, NaN in uninitialised memory.
FREE = ("empty", "view", "slice", "unsqueeze", "select", "fill_")


class Launches(TorchDispatchMode):
    """Counts operations, and the bytes of what they make."""

    count = nbytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        self.count += not any(name in str(operation) for name in FREE)
        given = {one.untyped_storage()._cdata for one in args if isinstance(one, torch.Tensor)}
        if found.untyped_storage()._cdata not in given:
            self.nbytes += found.untyped_storage().nbytes()
        return found


@pytest.mark.heavy
def test_a_gpu_is_launched_on_twice_and_not_once_for_32_rows(monkeypatch) -> None:
    """The kernel, and the total added; the sum over the parts where there are several."""
    from triton.runtime.interpreter import GridExecutor

    calls = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: calls.append(self))
    monkeypatch.setattr(column_sums, "launches", lambda device_type, dtype: True)
    total = torch.zeros(4000, dtype=torch.float64)
    matrix, weights = lease((4096, 4000), torch.bfloat16, torch.device("cpu")), torch.ones(4096)
    with Launches() as mode:
        column_sums.add_column_sums(total, matrix, weights)
    assert len(calls) == 1 and mode.count == 2
    assert mode.nbytes <= column_sums.temporary_bytes(4096, 4000, "cuda", torch.bfloat16)


@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_are_of_many_rows_and_as_large_as_they_say(weighted: bool) -> None:
    """Without Triton: 8192 rows in two blocks, and not in 256."""
    matrix, total = torch.zeros(8192, 8192).bfloat16(), torch.zeros(8192, dtype=torch.float64)
    with Launches() as mode:
        column_sums._by_blocks(total, matrix, torch.ones(8192) if weighted else None)
    assert mode.count <= 2 * 8
    most = 3 * column_sums._BLOCK * 4
    assert mode.nbytes / 2 <= most and column_sums._block_rows(8192) == 4096
