# SPDX-License-Identifier: Apache-2.0
"""The tile that the triton backend's ``project`` leaves for backward, against float64: what lies in
it is exp(t - anchor - offset) times the slope, 0 at the target, to the last bit or two of its
dtype. Halves take kernels/probabilities.py on the way."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastpref.kernels import probabilities
from fastpref.scoring import slab as slabs
from fastpref.scoring.backends import triton as triton_backend
from fastpref.scoring.statistics import RowSums
from fastpref.scoring.types import LogitMap
from tests.scoring.cases import make_case
from tests.scoring.test_numbers import dtype_name

pytestmark = pytest.mark.skipif(not triton_backend.INTERPRETED, reason="on a GPU: pytest -m gpu")
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
INF, NAN = float("inf"), float("nan")
PLAIN, CAPPED = LogitMap(1.3, 0.0), LogitMap(0.8, 3.0)
maps = pytest.mark.parametrize("map", [PLAIN, CAPPED], ids=["plain", "capped"])


@dataclass
class Projection:
    """Arguments of ``project``, and its float64 logits and slopes."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    map: LogitMap = PLAIN

    @property
    def raw(self) -> Tensor:
        raw = self.hidden.double() @ self.weight.double().t()
        return raw if self.bias is None else raw + self.bias.double()

    @property
    def here(self) -> Tensor:
        return (self.target >= 0) & (self.target < len(self.weight))

    @property
    def target_logit(self) -> Tensor:
        """0 where it is elsewhere."""
        column = torch.where(self.here, self.target, 0)[:, None]
        own = self.map.logit(self.raw).gather(1, column)[:, 0]
        return torch.where(self.here, own, 0.0).float()

    def run(
        self,
        tile: Tensor | None = None,
        anchor: Tensor | None = None,
        write: bool = True,
        statistics: bool = False,
    ) -> tuple[Tensor, RowSums]:
        if tile is None:
            tile = self.hidden.new_empty(len(self.hidden), len(self.weight))
        anchor = self.target_logit if anchor is None else anchor
        slab = slabs.Slab(self.weight, self.bias, self.map)
        given = slabs.Projection(self.hidden, slab, tile, self.target)
        return tile, triton_backend.project(given, anchor, write, statistics)

    def check(self, tile: Tensor, sums: RowSums, rows: slice = slice(None)) -> None:
        """``rows`` of the tile and of the sums that were made with it."""
        logits, slope = self.map.logit(self.raw)[rows], self.map.slope(self.raw)[rows]
        about = logits - sums.anchor.double()[rows, None]
        others = torch.arange(tile.shape[1]) != self.target[rows, None]
        torch.testing.assert_close(
            sums.sum[rows].double(),
            torch.where(others, about.exp(), 0.0).sum(1),
            rtol=1e-5,
            atol=0.0,
        )
        p = torch.where(others, (about - sums.offset.double()[rows, None]).exp(), 0.0)
        error = (tile[rows].double() - p * slope).abs()
        if tile.dtype == torch.float16:
            # A code is off by a 2048th, and so is a half.
            allowed = 1.02 * p * slope / 1024 + 2.0**-25
        else:
            allowed = p * slope * (1.02 * torch.finfo(tile.dtype).eps + 1e-5) + 1e-35
        assert (error <= allowed).all(), (error - allowed).max().item()


def make_projection(dtype: torch.dtype, map: LogitMap = PLAIN, **sizes: int) -> Projection:
    """The inputs of ``make_case``, copied."""
    sizes = {"rows": 70, "hidden": 40, "vocab": 315} | sizes
    case = make_case(dtype=dtype, bias=True, **sizes)
    tensors = (case.hidden, case.weight, case.target, case.bias.float())
    return Projection(*(one.clone() for one in tensors), map)


def offset_of(sums: RowSums, target_logit: Tensor, here: Tensor) -> Tensor:
    """The offset of halves, in float64."""
    own = torch.where(here, (target_logit.double() - sums.anchor.double()).exp(), 0.0)
    return (sums.sum.double() + own).log()


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
@maps
@pytest.mark.parametrize("statistics", [False, True])
def test_exponentials(dtype, map, statistics):
    one = make_projection(dtype, map)
    tile, sums = one.run(statistics=statistics)
    one.check(tile, sums)
    assert torch.equal(sums.anchor, one.target_logit)
    expected = torch.zeros_like(sums.offset)
    if dtype == torch.float16:
        expected = offset_of(sums, one.target_logit, one.here).float()
    torch.testing.assert_close(sums.offset, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize("statistics", [False, True])
def test_sums_do_not_depend_on_what_is_kept(dtype, statistics):
    one = make_projection(dtype)
    _, sums = one.run(statistics=statistics)
    _, scored = one.run(write=False, statistics=statistics)
    assert not scored.offset.any()
    for name, value in sums._replace(offset=scored.offset)._asdict().items():
        other = getattr(scored, name)
        assert (value is None) == (other is None)
        assert value is None or torch.equal(value, other), name


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize("rows, hidden, vocab", [(1, 8, 1), (3, 16, 7), (2, 24, 8), (33, 32, 64)])
@maps
def test_odd_sizes(dtype, rows, hidden, vocab, map):
    one = make_projection(dtype, map, rows=rows, hidden=hidden, vocab=vocab)
    one.check(*one.run())


@pytest.mark.heavy
@maps
@pytest.mark.parametrize("more", [0, 8, 13])
def test_rows_of_several_pieces(map, more):
    """One program of the pass over halves takes a piece of a row; the last one ends anywhere."""
    one = make_projection(torch.float16, map, rows=3, hidden=8, vocab=probabilities.COLS + more)
    one.check(*one.run())


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize("first, stride", [(0, 315), (1, 317), (0, 320), (1, 320)])
def test_nothing_beside_the_tile_is_touched(dtype, first, stride):
    one = make_projection(dtype)
    memory = torch.full((71 * stride,), 77.0, dtype=dtype)
    tile = memory[first : first + 70 * stride].view(70, stride)[:, :315]
    one.check(*one.run(tile))
    tile.fill_(77.0)
    assert (memory == 77.0).all()


@dtypes
def test_no_rows(dtype):
    tile, sums = make_projection(dtype, rows=0).run()
    assert tile.shape == (0, 315) and sums.offset.shape == sums.sum.shape == (0,)


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize(
    "above",
    [11, 39, 88, 69632, *(pytest.param(one, marks=pytest.mark.slow) for one in (17, 41, 300))],
)
@pytest.mark.parametrize("statistics", [False, True])
def test_one_logit_far_above_all_others(dtype, above, statistics):
    """In every third row. Up to 40 nats above the target the anchor stays there, and the tile holds
    all of it; beyond, the row is projected again about its largest logit."""
    one = make_projection(dtype, LogitMap(1.0, 0.0))
    one.weight *= 0.125
    # Exact in every dtype.
    one.weight[:, 0], one.weight[7, 1:], one.bias[7] = 0, 0, 0
    one.weight[7, 0], one.hidden[:, 0], one.hidden[::3, 0] = 64, 0, above / 64
    one.target[one.target == 7] = 8
    tile, sums = one.run(statistics=statistics)
    one.check(tile, sums)
    moved = sums.anchor != one.target_logit
    logits = one.map.logit(one.raw)[:, 7]
    assert torch.equal(moved, logits - one.target_logit > 40)
    assert (sums.anchor[moved] == above).all()
    assert moved.any() == (above > 17) and moved[::3].all() == (above > 41)
    if dtype == torch.float16:
        expected = offset_of(sums, one.target_logit, one.here).float()
        torch.testing.assert_close(sums.offset, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.heavy
@dtypes
@maps
def test_columns_of_minus_infinity(dtype, map):
    """Half the columns, some targets among them. A cap makes them finite logits without slope."""
    one = make_projection(dtype, map)
    masked = torch.rand(315, generator=torch.Generator().manual_seed(3)) < 0.5
    one.bias[masked] = -INF
    assert 10 < masked[one.target].sum() < 60
    tile, sums = one.run()
    assert sums.anchor.isfinite().all()
    one.check(tile, sums)
    assert not tile[:, masked].any()


@pytest.mark.heavy
@dtypes
def test_rows_of_nothing_but_minus_infinity(dtype):
    """Among the others, whatever the target is: there is nothing to scale."""
    one = make_projection(dtype)
    one.target[::2], one.target[1::2] = 0, 9
    one.bias[:] = -INF
    tile, sums = one.run()
    assert not tile.any() and not sums.sum.any() and not sums.offset.any()
    one.bias[9] = 0
    tile, sums = one.run()
    one.check(tile, sums)
    assert not tile[1::2].any() and not sums.offset[1::2].any()
    # Rounded, by the interpreter towards 0.
    assert ((tile[::2, 9] - 1).abs() <= torch.finfo(dtype).eps).all()


@pytest.mark.heavy
@dtypes
@maps
@pytest.mark.parametrize("below", [0, 30, 60])
def test_shards(dtype, map, below):
    """Two parts of the vocabulary, one of which has the target; the logits of the first lie
    ``below`` those of the second. In halves a part far below the target is 0."""
    whole = make_projection(dtype, map._replace(cap=map.cap and 40.0))
    whole.bias[:200] -= below
    logits, slopes = whole.map.logit(whole.raw), whole.map.slope(whole.raw)
    lse = logits.logsumexp(1, keepdim=True)
    others = torch.arange(315) != whole.target[:, None]
    p = torch.where(others, (logits - lse).exp(), 0.0)
    elsewhere = 0
    for part in (slice(0, 200), slice(200, 315)):
        target = whole.target - part.start
        one = Projection(whole.hidden, whole.weight[part], target, whole.bias[part], whole.map)
        tile, sums = one.run(anchor=whole.target_logit)
        elsewhere += (~one.here).sum()
        moved = (sums.anchor.double() + sums.offset.double())[:, None] - lse
        allowed = 2 * p * slopes * torch.finfo(dtype).eps + 2.0**-25
        error = (tile.double() * moved.exp() - (p * slopes)[:, part]).abs()
        assert (error <= allowed[:, part]).all()
        if dtype == torch.float16:
            expected = offset_of(sums, whole.target_logit, one.here).float()
            torch.testing.assert_close(sums.offset, expected, rtol=1e-6, atol=1e-6)
    assert elsewhere == 70


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:All-NaN slice")
@dtypes
@maps
@pytest.mark.parametrize("value", [NAN, INF])
def test_rows_that_are_not_finite_stay_alone(dtype, map, value):
    """A hidden state, or only the target's logit, in rows 3 and 40."""
    clean = make_projection(dtype, map)
    expected, _ = clean.run()
    others = torch.tensor([row not in (3, 40) for row in range(70)])
    hidden = clean.hidden.clone()
    hidden[3] = hidden[40] = value
    broken = Projection(hidden, clean.weight, clean.target, clean.bias, map)
    anchor = torch.where(others, clean.target_logit, value)
    tiles = [broken.run(anchor=anchor)]
    if value != value:
        tiles.append(clean.run(anchor=anchor))
    for tile, sums in tiles:
        assert torch.equal(tile[others], expected[others])
        assert sums.offset[others].isfinite().all()
        if dtype == torch.float16:
            lost = sums.offset.isnan() | sums.sum.isinf()
            assert torch.equal(lost, ~others)
            assert not tile[~others].isfinite().any()
