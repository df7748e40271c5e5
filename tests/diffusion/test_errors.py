# SPDX-License-Identifier: Apache-2.0
"""Squared errors, their difference and the gradient, by each backend, against float64: dtypes and
their mixtures, strides, masks, sizes; and the same bits every time."""

import itertools

import pytest
import torch
from torch import Tensor

from fastpref.diffusion.errors import squared_error, squared_errors
from fastpref.diffusion.layout import walk
from tests.diffusion.cases import (
    DTYPES,
    LAYOUTS,
    MASKS,
    B,
    C,
    H,
    W,
    channels_last,
    exact_errors,
    predictions,
)

# Of a sum of terms, in units of their absolute sum.
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-15}


def check(
    model: Tensor,
    ref: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> None:
    """All three numbers of each sample, and the gradient of two of them."""
    wide = any(one.dtype == torch.float64 for one in (model, ref, target))
    dtype = torch.float64 if wide else torch.float32
    model = model.detach().requires_grad_()
    found = squared_errors(model, ref, target, reduction=reduction, mask=mask)
    exact = model.detach().double().requires_grad_()
    expected = exact_errors(exact, ref, target, mask, reduction)
    apart = 2 * (model.detach().double() - ref.double()).abs()
    near = (ref.double() - target.double()).abs()
    terms = exact_errors(apart + near, near, torch.zeros_like(near), mask, reduction)[0]
    if wide:  # the difference of two errors, to which this compares, is rounded like these
        terms = expected[1] + expected[2]
    for one, other, scale in zip(found, expected, (terms, *expected[1:]), strict=True):
        assert one.dtype == dtype and one.shape == (model.shape[0],)
        assert ((one.double() - other).abs() <= ROUNDING[dtype] * scale.detach() + 1e-30).all()
    upstream = torch.linspace(-1, 2, 2 * model.shape[0], dtype=dtype).view(2, -1)
    (gradient,) = torch.autograd.grad(found[:2], model, list(upstream), retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected[:2], exact, list(upstream.double()))
    assert gradient.dtype == model.dtype and gradient.shape == model.shape
    ulp = max(torch.finfo(model.dtype).eps, ROUNDING[dtype])
    # The last step of a half's subnormals.
    floor = 2.0**-24 if model.dtype == torch.float16 else 0.0
    far = (gradient.double() - expected_gradient).abs()
    assert (far <= ulp * expected_gradient.abs() + floor).all()
    (again,) = torch.autograd.grad(found[:2], model, list(upstream))
    assert torch.equal(again, gradient)


MIXTURES = list(itertools.product(DTYPES, repeat=3))
SAMPLE = [
    *((one,) * 3 for one in DTYPES),
    (torch.bfloat16, torch.float16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float16, torch.float32, torch.float64),
]


@pytest.mark.parametrize(
    "dtypes",
    [
        *SAMPLE,
        *(pytest.param(one, marks=pytest.mark.slow) for one in MIXTURES if one not in SAMPLE),
    ],
    ids=lambda dtypes: "-".join(str(one).removeprefix("torch.") for one in dtypes),
)
def test_dtypes(backend: str, dtypes: tuple[torch.dtype, ...]) -> None:
    given = (one.to(dtype) for one, dtype in zip(predictions(2, 3, 37), dtypes, strict=True))
    check(*given)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "shape",
    [(1,), (5,), (2, 1), (3, 7, 5), (2, 4, 8, 8), (2, 3, 4, 5, 6), (1, 2, 2, 2, 2, 2, 3)],
    ids=str,
)
def test_shapes(backend: str, shape: tuple[int, ...], reduction: str) -> None:
    check(*predictions(*shape, dtype=torch.float32), reduction=reduction)


@pytest.mark.parametrize(
    "size",
    [
        *(1023, 1025, 16385),
        *(pytest.param(one, marks=pytest.mark.slow) for one in (1024, 16384, 50_000, 100_003)),
    ],
)
def test_sizes_about_blocks_and_parts(backend: str, size: int) -> None:
    check(*predictions(2, size, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(backend: str, layout: str, dtype: torch.dtype) -> None:
    lie, free = LAYOUTS[layout]
    given = lie(*predictions(B, C, H, W, dtype=dtype))
    walked = walk(given).tensors
    assert all(one is other for one, other in zip(walked, given, strict=True)) == free
    check(*given)
    if layout == "channels_last":
        model = given[0].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(
            squared_error(model, given[2], reduction="sum").sum(), model
        )
        assert gradient.stride() == model.stride()


def _frames_first(one: Tensor) -> Tensor:
    """Stored (B, T, C, H, W), as pipelines of video have them."""
    return one.transpose(1, 2).contiguous().transpose(1, 2)


VIDEO = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last_3d": channels_last,
    "frames first": _frames_first,
}


@pytest.mark.parametrize("masked", [None, "frames", "pixels"])
@pytest.mark.parametrize("layout", VIDEO)
def test_video(backend: str, layout: str, masked: str | None) -> None:
    """(B, C, T, H, W), without a copy."""
    given = tuple(map(VIDEO[layout], predictions(2, 4, 3, 6, 10, dtype=torch.bfloat16)))
    walked = walk(given).tensors
    assert all(one is other for one, other in zip(walked, given, strict=True))
    shape = {"frames": (2, 1, 3, 1, 1), "pixels": (2, 1, 3, 6, 10)}.get(masked or "")
    check(*given, None if shape is None else torch.rand(shape) < 0.6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(backend: str, mask: str, reduction: str) -> None:
    check(*predictions(B, C, H, W, dtype=torch.float32), MASKS[mask](), reduction)


@pytest.mark.parametrize(
    "layout, mask",
    [
        ("channels_last", "spatial"),
        ("channels_last", "channels"),
        ("half of tokens", "spatial"),
        ("batch inside", "elements"),
        ("cropped", "columns"),
        *(
            pytest.param(*both, marks=pytest.mark.slow)
            for both in itertools.product(LAYOUTS, MASKS)
        ),
    ],
)
def test_masks_of_other_layouts(backend: str, layout: str, mask: str) -> None:
    given = LAYOUTS[layout][0](*predictions(B, C, H, W, dtype=torch.float32))
    check(*given, MASKS[mask]())


@pytest.mark.parametrize("lies", ["next to each other", "apart", "in one place"])
def test_a_mask_of_long_pieces(backend: str, lies: str) -> None:
    """Longer than a block, and a part that ends within one."""
    mask = torch.zeros(2, 1, 3000, dtype=torch.bool)
    mask[0, :, 1100:2300], mask[1, :, ::7] = True, True
    if lies == "apart":
        mask = torch.stack((mask, ~mask), -1)[..., 0]
    if lies == "in one place":
        mask = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0]).view(2, 6, 1)
    check(*predictions(2, 6, 3000, dtype=torch.float16), mask)


def test_what_is_left_out_is_not_read(backend: str) -> None:
    """And gets no gradient; a sample with nothing left gives 0, no NaN of 0 / 0."""
    model, ref, target = predictions(B, C, H, W, dtype=torch.float32)
    mask = MASKS["spatial"]()
    mask[1] = False
    left_out = ~mask.expand(model.shape)
    clean = squared_errors(model, ref, target, reduction="mean", mask=mask)
    for one, value in zip((model, ref, target), (torch.nan, torch.inf, -torch.inf), strict=True):
        one[left_out] = value
    model.requires_grad_()
    found = squared_errors(model, ref, target, reduction="mean", mask=mask)
    for one, other in zip(found, clean, strict=True):
        assert torch.equal(one, other) and one[1] == 0
    (found.gap.sum() + found.model.sum()).backward()
    assert (model.grad[left_out] == 0).all() and model.grad.isfinite().all()


def test_nan_stays_in_its_sample(backend: str) -> None:
    model, ref, target = predictions(3, 40, dtype=torch.float32)
    model[1, 7] = torch.nan
    model.requires_grad_()
    found = squared_errors(model, ref, target, reduction="mean")
    assert found.gap.isnan().tolist() == found.model.isnan().tolist() == [False, True, False]
    found.gap.sum().backward()
    assert model.grad.isnan().sum() == 1 and model.grad[1, 7].isnan()


def test_one_prediction_alone(backend: str) -> None:
    model, _, target = predictions(2, 3, 50, dtype=torch.bfloat16)
    model.requires_grad_()
    found = squared_error(model, target, reduction="sum")
    exact = (model.detach().double() - target.double()).square().sum((1, 2))
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0.0)
    (gradient,) = torch.autograd.grad(found[1], model)
    expected = 2 * (model.detach().double() - target.double())
    # A whole ulp: Triton's interpreter cuts bfloat16 off, a GPU rounds.
    torch.testing.assert_close(gradient[1].double(), expected[1], rtol=2.0**-7, atol=0.0)
    assert (gradient[0] == 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0), (0,)], ids=str)
def test_nothing(backend: str, shape: tuple[int, ...]) -> None:
    """Zeros that are still connected, so that a backward of several ranks does not hang."""
    model = torch.zeros(shape, dtype=torch.float16, requires_grad=True)
    for mask in (None, torch.ones((), dtype=torch.bool)):
        found = squared_errors(model, model, model, reduction="mean", mask=mask)
        for one in found:
            assert one.dtype == torch.float32 and torch.equal(one, torch.zeros(shape[0]))
        found.gap.sum().backward()
        assert model.grad.shape == shape
        model.grad = None


def test_bits_do_not_depend_on_threads_or_on_the_run(backend: str) -> None:
    if backend == "plain":
        pytest.skip("torch's own sums")
    given = predictions(3, 20_001, dtype=torch.float16)
    threads = torch.get_num_threads()
    first = squared_errors(*given, reduction="sum")
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = squared_errors(*given, reduction="sum")
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_samples_do_not_touch_each_other(backend: str) -> None:
    """Of a batch and alone: the same to rounding, bit for bit where programs are the same."""
    given = predictions(5, 3, 700, dtype=torch.float32)
    whole = squared_errors(*given, reduction="mean")
    for b in range(5):
        alone = squared_errors(*(one[b : b + 1] for one in given), reduction="mean")
        for one, other in zip(alone, whole, strict=True):
            torch.testing.assert_close(one[0], other[b], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("samples, apart", [(2, 1 << 31), (3, 1 << 30)])
def test_samples_further_apart_than_an_int32(backend: str, samples: int, apart: int) -> None:
    """Of memory of which a few pages are touched; or the last one alone is so far, by a stride that
    an int32 holds."""
    stride, size = apart + 16, 48
    space = torch.UntypedStorage(2 * ((samples - 1) * stride + size))
    lying = torch.empty(0, dtype=torch.float16).set_(space, 0, (samples, size), (stride, 1))
    model, ref, target = predictions(samples, size, dtype=torch.float16)
    lying.copy_(model)
    check(lying, ref, target)
