# SPDX-License-Identifier: Apache-2.0
"""log_ratio on a GPU: the Triton kernels serve, agree with float64, give the same bits every time,
read nothing back to the host, and run in a CUDA graph."""

import itertools

import pytest
import torch

from fastpref.diffusion import backends, log_ratio
from tests.diffusion.cases import LAYOUTS, MASKS, B, C, H, W, exact_errors, predictions

pytestmark = pytest.mark.gpu
SIZES = [(2, 4, 64, 64), (3, 4, 6, 10), (2, 50_001), (2, 16, 5, 60, 104)]


def check(*given: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    model, ref, target = (one.detach() for one in given)
    model.requires_grad_()
    found = log_ratio(model, ref, target, weight=2500.0, mask=mask)
    exact = model.detach().double().requires_grad_()
    expected = -2500 * exact_errors(exact, ref, target, mask, "mean")[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(found.sum(), model, retain_graph=True)
    (again,) = torch.autograd.grad(found.sum(), model)
    assert torch.equal(gradient, again) and gradient.stride() == torch.empty_like(model).stride()
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    tolerance = {"rtol": max(1e-6, torch.finfo(model.dtype).eps), "atol": 2.0**-24}
    torch.testing.assert_close(gradient.double(), expected_gradient, **tolerance)
    assert torch.equal(found, log_ratio(model, ref, target, weight=2500.0, mask=mask))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "dtypes",
    list(itertools.product((torch.bfloat16, torch.float32, torch.float64), repeat=2)),
    ids=str,
)
def test_numbers(size: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    given = predictions(*size)
    given = tuple(
        one.to("cuda", dtype) for one, dtype in zip(given, (*dtypes, dtypes[0]), strict=True)
    )
    assert backends.of(*(one.view(size[0], 1, -1) for one in given), None).__name__.endswith(
        "triton"
    )
    check(*given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_layouts_and_masks(layout: str, mask: str) -> None:
    given = (one.cuda() for one in predictions(B, C, H, W, dtype=torch.float32))
    check(*LAYOUTS[layout][0](*given), mask=MASKS[mask]().cuda())


def test_no_host_reads() -> None:
    given = [one.cuda() for one in predictions(2, 4, 64, 64, dtype=torch.bfloat16)]
    weight = torch.ones(2, device="cuda", requires_grad=True)

    def call() -> None:
        model = given[0].detach().requires_grad_()
        log_ratio(model, *given[1:], weight=weight).sum().backward()

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph() -> None:
    model, ref, target = (one.cuda() for one in predictions(2, 4, 64, 64, dtype=torch.float32))
    model.requires_grad_()

    def call() -> torch.Tensor:
        found = log_ratio(model, ref, target)
        return torch.cat((found, torch.autograd.grad(found.sum(), model)[0].flatten()))

    expected = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    graph.replay()
    assert torch.equal(found, expected)


def test_samples_of_more_than_an_int32() -> None:
    size = (1 << 31) + 4096
    model = torch.zeros(1, size, dtype=torch.bfloat16, device="cuda")
    model[0, -1] = 3.0
    target = torch.zeros_like(model)
    model.requires_grad_()
    found = log_ratio(model, torch.zeros_like(model), target, reduction="sum")
    assert float(found) == -9.0
    found.backward()
    assert float(model.grad[0, -1]) == -6.0 and int((model.grad != 0).sum()) == 1
