# SPDX-License-Identifier: Apache-2.0
"""How often the CUDA exp_rows reads and writes each element of a row, counted on the host in the
16-bit dtypes; float32 and float64 go the way of bfloat16."""

import ctypes

import pytest
import torch

from fastpref.scoring.slab import Products
from fastpref.scoring.types import LogitMap
from tests.cuda_on_host.kernels import Kernels, compile_library, unavailable_reason
from tests.rows import make_rows

pytestmark = pytest.mark.heavy

# Reads and writes of an element, at most, by what becomes of a row's anchor.
BFLOAT16 = {"kept": (1, 1), "moved": (2, 2), "missing": (2, 1)}
# Halves are written at the end alone.
HALF = {"kept": (2, 1), "moved": (3, 1), "missing": (3, 1)}
# In a cluster the row is copied, and the copy copied back.
COPIED = dict.fromkeys(BFLOAT16, (1, 1))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("host")
    flags = ("-DFASTPREF_COUNT_ACCESSES",)
    return Kernels(compile_library(directory, "row_kernels", flags=flags))


@pytest.mark.parametrize("cols", [13, 1001, 9001])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_exp_rows_reads_and_writes_little(
    kernels: Kernels, dtype: torch.dtype, blocks: int, write: bool, statistics: bool, cols: int
) -> None:
    map = LogitMap(1.0, 0.0)
    rows = make_rows(dtype, cols, map)
    counts = torch.zeros((2, *rows.guarded.shape), dtype=torch.int32)
    kernels.library.count_accesses(
        ctypes.c_void_p(rows.guarded.data_ptr()),
        ctypes.c_int64(rows.guarded.numel()),
        *(ctypes.c_void_p(one.data_ptr()) for one in counts),
    )
    products = Products(rows.tile, None, map)
    arguments = (products, rows.target, rows.anchor, write, statistics)
    sums = kernels.exp_rows(*arguments, blocks=blocks)
    reads, writes = counts[:, :, 1 : cols + 1]
    assert not counts[:, :, 0].any() and not counts[:, :, cols + 1 :].any()
    allowed = COPIED if blocks > 1 else BFLOAT16 if dtype == torch.bfloat16 else HALF
    seen = set()
    for row, (given, used) in enumerate(
        zip(rows.anchor.tolist(), sums.anchor.tolist(), strict=True)
    ):
        kind = "kept" if used == given else "moved" if abs(given) < torch.inf else "missing"
        most_reads, most_writes = allowed[kind]
        if not write and blocks == 1 and dtype == torch.float16:
            most_reads -= 1  # no probabilities to write
        assert reads[row].max() == most_reads, f"row {row}, anchor {kind}"
        assert reads[row].min() >= 1
        assert writes[row].max() == (most_writes if write else 0), f"row {row}, anchor {kind}"
        assert writes[row].min() >= write
        seen.add(kind)
    assert seen == set(allowed)
