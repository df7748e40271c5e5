# SPDX-License-Identifier: Apache-2.0
"""Bytes that the plain torch backend moves for each logit, counted by operator, and takes."""

import functools
import itertools
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastpref.scoring.backends import UpstreamGradient, divergence_formulas, divergences
from fastpref.scoring.backends import torch as torch_backend
from fastpref.scoring.slab import Products
from fastpref.scoring.types import LogitMap, statistics_dtype
from tests.scoring.cases import DTYPES
from tests.scoring.divergences import DIVERGENCES, random_tiles, with_bias
from tests.scoring.traffic import Traffic

ROWS, COLS = 96, 8192
LOGITS = ROWS * COLS
MAP = LogitMap(0.7, 0.0)
# Beside the passes, numbers of each row: indices, maxima, sums, in 4 and 8 bytes.
ROW_BYTES = 2048
low = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    for module in (torch_backend, divergence_formulas):
        monkeypatch.setattr(module, "_BLOCK_CPU", LOGITS // 3)


def counted(call, name) -> float:
    """Bytes a logit of the passes; those of the rows' numbers are checked."""
    with Traffic(matrix=LOGITS // 256) as traffic:
        call()
    each = traffic.of_matrices / LOGITS
    print(f"{name}: {each:.2f} bytes a logit, {traffic.of_rows / ROWS:.0f} more a row")
    assert traffic.of_rows <= ROW_BYTES * ROWS
    return each


def tile_and_targets(dtype):
    tile = (3 * torch.randn(ROWS, COLS)).to(dtype)
    target = torch.randint(0, COLS, (ROWS,))
    return tile, target, MAP.logit(tile.gather(1, target[:, None])[:, 0].float())


@low
@pytest.mark.parametrize(
    "write, statistics, bound",
    [(False, False, 18), (True, False, 24), (False, True, 42), (True, True, 48)],
)
def test_forward(dtype, write, statistics, bound):
    tile, *given = tile_and_targets(dtype)
    arguments = (Products(tile, None, MAP), *given, write, statistics)
    name = f"forward of {dtype}, write={write}, statistics={statistics}"
    assert counted(lambda: torch_backend.exp_rows(*arguments), name) <= bound


@low
@pytest.mark.parametrize("entropy, bound", [(False, 20), (True, 32)])
def test_logit_gradient(dtype, entropy, bound):
    tile, target, own = tile_and_targets(dtype)
    g, h, k = torch.randn(3, ROWS)
    score = own, torch.full_like(own, 50.0), torch.full_like(own, -3.9), g, h
    upstream = UpstreamGradient(*score, *((k, torch.rand(ROWS)) if entropy else (None, None)))
    name = f"gradient of {dtype}, entropy={entropy}"
    products = Products(tile, None, MAP)
    assert counted(lambda: torch_backend.logit_grad(products, target, upstream), name) <= bound


# Of a pair of logits: the value, and with the gradient in place.
BYTES_OF_PAIRS = {
    "forward_kl": (64, 90),
    "reverse_kl": (64, 98),
    "jsd": (128, 146),
    "tv": (44.4, 86.4),
    "bhattacharyya": (64, 90),
    "cosine": (36.8, 62.8),
}


@low
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("write", [False, True])
def test_divergences(dtype, kind, write):
    tiles = random_tiles(ROWS, COLS).to(dtype)._replace(map=MAP)
    name = f"{kind} of {dtype}, write={write}"
    rest = (kind, 0.3, write, "torch")
    each = counted(lambda: divergences.divergence_rows(*tiles.products, *rest), name)
    assert each <= BYTES_OF_PAIRS[kind][write]


def peak_bytes(call) -> int:
    """Of memory taken beside what there was, with the copies that operators make of operands."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    assert changes
    return max(itertools.accumulate(nbytes for _, nbytes in changes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("biased", [False, True])
def test_temporaries(dtype, cap, biased):
    tile, target, own = tile_and_targets(dtype)
    exact, map = statistics_dtype(dtype), MAP._replace(cap=cap)
    own, bias = own.to(exact), torch.randn(COLS, dtype=exact) if biased else None
    g, score = torch.rand(ROWS, dtype=exact), (own, own.exp(), -own.abs())
    products = Products(tile, bias, map)
    calls = [
        lambda: torch_backend.exp_rows(products, target, own, True, True),
        lambda: torch_backend.logit_grad(products, target, UpstreamGradient(*score, g, g, g, g)),
    ]
    promised = torch_backend.temporary_bytes(ROWS, COLS, "cpu", dtype, True)
    for call in calls:
        assert peak_bytes(call) <= promised + ROW_BYTES * ROWS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_temporaries_of_divergences(dtype, kind):
    tiles = with_bias(random_tiles(ROWS, COLS)).to(dtype)._replace(map=LogitMap(0.7, 5.0))
    rest = (kind, 0.3, True, "torch")
    call = functools.partial(divergences.divergence_rows, *tiles.products, *rest)
    promised = divergences.temporary_bytes(ROWS, COLS, "cpu", dtype, "torch")
    assert peak_bytes(call) <= promised + ROW_BYTES * ROWS


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_exponentials_of_divergences(dtype, one_thread):
    """In C++ a thread holds those of a row of both, in memory that torch does not see."""
    peak, cols = Path("/proc/self/clear_refs"), 1 << 21
    tiles = random_tiles(2, cols).to(dtype)
    rest = ("forward_kl", 0.5, True, "cpp")
    call = functools.partial(divergences.divergence_rows, *tiles.products, *rest)
    call()
    try:
        peak.write_text("5")  # from now on
    except OSError as error:
        pytest.skip(f"no peak of the resident memory: {error}")
    before = resident("VmRSS")
    call()
    promised = divergences.temporary_bytes(2, cols, "cpu", dtype, "cpp")
    assert resident("VmHWM") - before <= promised + (1 << 20)


def resident(which):
    """Bytes, by the name that /proc gives them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(which))


def test_what_is_counted():
    """By hand, of one operator each."""
    matrix, column = torch.zeros(8, 1000), torch.zeros(8, 1)
    index = torch.arange(8), torch.arange(8)
    cases = {
        "a result": (lambda: matrix.exp(), 64000),
        "in place": (lambda: matrix.exp_(), 64000),
        "a result in 16 bits": (
            lambda: torch.mul(matrix, column, out=matrix.new_empty(8, 1000).half()),
            32000 + 32 + 16000 + 32000 + 16000,  # the cast of out, too
        ),
        "twice the same": (lambda: matrix * matrix, 64000),
        "unknown": (lambda: matrix.cumsum(1), None),
        "broadcast": (lambda: matrix.mul_(column.expand(8, 1000)), 64032),
        "a sum": (lambda: matrix.sum(1), 32032),
        "views": (lambda: matrix.t()[:7].unflatten(0, (7, 1)), 0),
        "a column": (lambda: matrix[index], 2 * 64 + 2 * 32),
        "into a column": (lambda: matrix.index_put_(index, column[:, 0]), 2 * 64 + 2 * 32),
        "logsumexp": (lambda: matrix.logsumexp(1), None),
    }
    for name, (call, expected) in cases.items():
        traffic = Traffic(matrix=1000)
        if expected is None:
            with pytest.raises(AssertionError, match="how often"), traffic:
                call()
            continue
        with traffic:
            call()
        assert traffic.total == expected, name
