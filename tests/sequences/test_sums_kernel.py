# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel that sums over sequences, on the host.

Not seen here: launches, streams, and speed.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastpref.scoring.types import statistics_dtype
from tests.cuda_on_host.kernels import ELEMENTS
from tests.cuda_on_host.sequence_sums import SequenceSums

pytestmark = pytest.mark.heavy
Kernel = Callable[..., tuple[Tensor, Tensor]]

# Odd lengths, several tokens a thread, empty sequences first, last and between.
LENGTHS = [0, 3, 517, 0, 1, 5000, 1027, 0]
B, N = len(LENGTHS), sum(LENGTHS)
BOUNDARIES = torch.tensor([0, *LENGTHS]).cumsum(0)
IDS = torch.arange(B).repeat_interleave(torch.tensor(LENGTHS))


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Negative values between cells that no kernel may read; rows begin at any address."""
    *rows, tokens = shape
    buffer = torch.full((*rows, tokens + 3), torch.nan, dtype=dtype)
    values = buffer[..., 1 : tokens + 1]
    return values.copy_(-5 * torch.rand(shape, dtype=torch.float64) - 0.1)


def check(
    actual: tuple[Tensor, Tensor],
    terms: list[tuple[Tensor, Tensor | None]],
    dtype: torch.dtype,
    mean: bool,
) -> None:
    """Against the scored tokens and weights of each sequence, in float64 and rounded once."""
    counts = torch.tensor([len(values) for values, _ in terms])
    exact = torch.stack(
        [
            (values.double() * (1 if weights is None else weights.double())).sum()
            for values, weights in terms
        ]
    )
    if mean:
        exact = exact / counts.clamp(min=1)
    sums, counted = actual
    assert counted.tolist() == counts.tolist()
    assert sums.dtype == statistics_dtype(dtype)
    # The sums are in another order, so a float may round to its other neighbour.
    digits = 1e-14 if dtype == torch.float64 else 2.0**-23
    torch.testing.assert_close(sums, exact.to(sums.dtype), rtol=digits, atol=0)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tokens", [1, 511, 5000])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_padded(
    kernel: Kernel, dtype: torch.dtype, tokens: int, weighted: bool, mean: bool
) -> None:
    logp = guarded((4, tokens), dtype)
    weights = guarded((4, tokens), dtype)[:, :tokens] if weighted else None
    mask = torch.zeros(4, tokens + 5, dtype=torch.bool)[:, 2 : tokens + 2]
    mask.copy_(torch.rand(4, tokens) < 0.6)
    mask[0], mask[1] = True, False
    for values in (logp, weights):
        if values is not None:
            values[~mask] = torch.nan
    terms = [(logp[b, mask[b]], None if weights is None else weights[b, mask[b]]) for b in range(4)]
    check(kernel(logp, weights, mask, None, None, mean), terms, dtype, mean)


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_padded_without_a_mask_takes_every_token(kernel: Kernel, dtype: torch.dtype) -> None:
    logp = guarded((3, 1500), dtype)
    check(kernel(logp, None, None, None, None, True), [(row, None) for row in logp], dtype, True)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_packed(kernel: Kernel, dtype: torch.dtype, weighted: bool, mean: bool) -> None:
    logp = guarded((N,), dtype)
    weights = guarded((N,), dtype) if weighted else None
    parts = logp.split(LENGTHS)
    factors = [None] * B if weights is None else weights.split(LENGTHS)
    terms = list(zip(parts, factors, strict=True))
    check(kernel(logp, weights, None, None, BOUNDARIES, mean), terms, dtype, mean)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_tokens_in_an_order(kernel: Kernel, dtype: torch.dtype, weighted: bool) -> None:
    """Some tokens come before the first boundary and after the last: they are not scored."""
    logp = guarded((N + 9,), dtype)
    weights = guarded((N + 9,), dtype) if weighted else None
    order = torch.randperm(N + 9)
    places = order[4 : N + 4].split(LENGTHS)
    unscored = torch.cat([order[:4], order[N + 4 :]])
    for values in (logp, weights):
        if values is not None:
            values[unscored] = torch.nan
    terms = [(logp[place], None if weights is None else weights[place]) for place in places]
    check(kernel(logp, weights, None, order, BOUNDARIES + 4, True), terms, dtype, True)


def test_boundaries_and_an_order_that_point_outside_read_nothing_there(
    kernel: Kernel,
) -> None:
    logp = torch.full((100,), torch.nan)[40:60]
    logp.copy_(-torch.rand(20))
    boundaries = torch.tensor([-40, 3, 2, 15, 40, 57, -1, 2])
    pieces = [(0, 3), (0, 0), (2, 15), (15, 20), (0, 0), (0, 0), (0, 2)]
    terms: list[tuple[Tensor, Tensor | None]] = [(logp[first:last], None) for first, last in pieces]
    check(kernel(logp, None, None, None, boundaries, True), terms, torch.float32, True)
    order = torch.arange(20)
    order[[1, 4, 6]] = torch.tensor([-1, 20, 50])
    check(
        kernel(logp, logp, None, order, torch.tensor([0, 3, 20]), True),
        [(logp[one], logp[one]) for one in ([0, 2], [3, 5, *range(7, 20)])],
        torch.float32,
        True,
    )


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_nothing_to_sum(kernel: Kernel, dtype: torch.dtype) -> None:
    nobody = torch.empty(0, dtype=dtype)
    check(
        kernel(nobody[None].expand(3, 0), None, None, None, None, True),
        [(nobody, None)] * 3,
        dtype,
        True,
    )
    check(
        kernel(nobody, None, None, None, torch.zeros(4).long(), True),
        [(nobody, None)] * 3,
        dtype,
        True,
    )
    for sums, counts in (
        kernel(torch.empty(0, 7, dtype=dtype), None, None, None, None, False),
        kernel(nobody, None, None, None, torch.zeros(1).long(), False),
    ):
        assert sums.shape == counts.shape == (0,)


def test_a_sum_of_floats_is_rounded_once(kernel: Kernel) -> None:
    """Each thread begins with -2^24, after which every -1 would be lost in float."""
    logp = -torch.ones(1, 9 * 512)
    logp[0, :512] = -(2.0**24)
    sums, _ = kernel(logp, None, None, None, None, False)
    assert torch.equal(sums, logp.double().sum(1).float())


@pytest.mark.parametrize("poison", [torch.nan, -torch.inf])
def test_what_is_no_number_stays_in_its_sequence(kernel: Kernel, poison: float) -> None:
    logp = guarded((N,), torch.bfloat16)
    logp[3 + 100] = poison
    sums, _ = kernel(logp, None, None, None, BOUNDARIES, False)
    assert sums.isfinite().tolist() == [b != 2 for b in range(B)]
    assert torch.equal(sums[2].isnan(), torch.tensor(poison).isnan())


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_no_barrier_is_missing(on_the_host: SequenceSums, dtype: torch.dtype) -> None:
    """The order in which warps run between barriers changes no bit."""
    logp, weights, order = guarded((N,), dtype), guarded((N,), dtype), torch.randperm(N)
    results = [
        on_the_host(logp, weights, None, order, BOUNDARIES, True, backwards)
        for backwards in (False, True)
    ]
    assert all(map(torch.equal, *results))
