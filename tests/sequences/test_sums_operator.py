# SPDX-License-Identifier: Apache-2.0
"""sequence_logp by an operator, the host's kernel in its place: sums and gradients are those of
plain torch, and what does not go to it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import _extension
from fastpref.sequences import sequence_logp
from fastpref.sequences import sums as summing
from tests.cuda_on_host.kernels import ELEMENTS

pytestmark = pytest.mark.heavy
Kernel = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def operator(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether sequence_logp uses the operator."""
    monkeypatch.setattr(torch.ops.fastpref, "sequence_sums", kernel, raising=False)

    def use(serves: bool) -> None:
        monkeypatch.setattr(summing, "_operator_serves", lambda *given: serves)

    use(True)
    return use


def make_layout(name: str) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Shape of the tokens, and what describes their sequences. Sequence 1 is empty."""
    generator = torch.Generator().manual_seed(3)
    if name == "padded":
        return (4, 6), {}
    if name == "mask":
        mask = torch.rand(4, 6, generator=generator) < 0.6
        mask[1] = False
        return (4, 6), {"mask": mask}
    if name == "cu_seqlens":
        return (12,), {"cu_seqlens": torch.tensor([0, 5, 5, 6, 12])}
    ids = torch.tensor([3, 0, -1, 0, 2, 2, -7, 3, 3, 0, 2, 3])
    return (12,), {"sequence_ids": ids, "num_sequences": 4}


def unscored(layout: dict[str, Any], shape: tuple[int, ...]) -> Tensor:
    if "mask" in layout:
        return ~layout["mask"].bool()
    if "sequence_ids" in layout:
        return layout["sequence_ids"] < 0
    return torch.zeros(shape, dtype=torch.bool)


layouts = pytest.mark.parametrize("name", ["padded", "mask", "cu_seqlens", "sequence_ids"])
reductions = pytest.mark.parametrize("reduction", ["sum", "mean"])


def leaves(absent: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
    """NaN where ``absent``."""
    values = [torch.randn(absent.shape).masked_fill(absent, torch.nan) for _ in dtypes]
    return [one.to(dtype).requires_grad_() for one, dtype in zip(values, dtypes, strict=True)]


@layouts
@reductions
@pytest.mark.parametrize(
    "dtypes",
    [
        *((dtype,) for dtype in ELEMENTS),
        *((dtype, dtype) for dtype in ELEMENTS),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float8_e5m2,),
    ],
    ids=lambda dtypes: "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
)
def test_operator_and_torch_agree(
    operator: Callable[[bool], None], name: str, reduction: Any, dtypes: tuple[torch.dtype, ...]
) -> None:
    shape, layout = make_layout(name)
    if (name, reduction) == ("padded", "mean"):
        layout = {"mask": torch.ones(shape, dtype=torch.uint8)}
    absent = unscored(layout, shape)
    inputs = leaves(absent, *dtypes)
    results = []
    for serves in (True, False):
        operator(serves)
        sums = sequence_logp(
            *inputs[:1], token_weights=(*inputs, None)[1], reduction=reduction, **layout
        )
        upstream = torch.randn(4, generator=torch.Generator().manual_seed(1)).to(sums.dtype)
        upstream[2] = torch.inf
        results.append((sums.detach(), *torch.autograd.grad(sums, inputs, upstream)))
        assert sums.dtype == (torch.float64 if dtypes[0] == torch.float64 else torch.float32)
    for got, expected, one in zip(*results, (sums, *inputs), strict=True):
        assert got.dtype == expected.dtype == one.dtype and got.shape == one.shape
        # The sums are added up in another order.
        digits = 1e-6 if one is sums else 0.0
        torch.testing.assert_close(
            got.double(), expected.double(), rtol=digits, atol=digits, equal_nan=True
        )
    for gradient in results[0][1:]:
        assert bool((gradient.double()[absent] == 0).all())


@layouts
@pytest.mark.parametrize("score", [torch.nan, -torch.inf, -3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_weight_of_0_takes_its_token_out(
    operator: Callable[[bool], None], name: str, dtype: torch.dtype, score: float
) -> None:
    """As plain torch has it, whose own test is in tests/sequences."""
    shape, layout = make_layout(name)
    absent = unscored(layout, shape)
    logp, weights = leaves(absent, dtype, dtype)
    out = ~absent & (torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5)
    assert out.any()
    logp, weights = (
        one.detach().masked_fill(out, value).requires_grad_()
        for one, value in ((logp, score), (weights, -0.0))
    )
    results = []
    for serves in (True, False):
        operator(serves)
        sums = sequence_logp(logp, token_weights=weights, **layout)
        upstream = torch.ones_like(sums)
        upstream[0] = torch.nan
        results.append((sums, *torch.autograd.grad(sums, (logp, weights), upstream)))
    assert results[0][0].isfinite().all() and not results[0][1][out].any()
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


@layouts
@reductions
def test_gradients_are_differentiable_again(
    operator: Callable[[bool], None], name: str, reduction: Any
) -> None:
    shape, layout = make_layout(name)
    if (name, reduction) == ("padded", "mean"):
        layout = {"mask": torch.ones(shape, dtype=torch.bool)}
    logp, weights = leaves(torch.zeros(shape).bool(), torch.float64, torch.float64)

    def call(logp: Tensor, weights: Tensor) -> Tensor:
        return sequence_logp(logp, token_weights=weights, reduction=reduction, **layout)

    assert torch.autograd.gradcheck(call, (logp, weights))
    assert torch.autograd.gradgradcheck(call, (logp, weights))
    for frozen in (0, 1):
        given = [one.detach() if i == frozen else one for i, one in enumerate((logp, weights))]
        assert torch.autograd.gradcheck(call, given)


@layouts
def test_nan_in_unscored_tokens_reaches_no_second_derivative(
    operator: Callable[[bool], None], name: str
) -> None:
    shape, layout = make_layout(name)
    absent = unscored(layout, shape)
    inputs = leaves(absent, torch.float64, torch.float64)
    sums = sequence_logp(inputs[0], token_weights=inputs[1], **layout)
    first = torch.autograd.grad(sums.square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(one.square().sum() for one in first), inputs)
    for gradient in (*first, *second):
        assert bool(gradient.isfinite().all())
        assert bool((gradient[absent] == 0).all())


def test_tokens_outside_every_sequence_get_no_gradient(operator: Callable[[bool], None]) -> None:
    """On a GPU nobody looks at the values of boundaries and ids."""
    apply = summing._OperatorSums.apply
    for layout, expected in (
        (summing._Layout(boundaries=torch.tensor([2, 3, 99])), [0, 0, 1, 2, 2]),
        (summing._Layout(boundaries=torch.tensor([-9, 3, 3])), [1, 1, 1, 0, 0]),
        (summing._Layout(ids=torch.tensor([1, 5, 0, -1, 2]), num_sequences=2), [2, 0, 1, 0, 0]),
    ):
        logp = torch.ones(5, requires_grad=True)
        sums = apply(logp, None, layout, False)
        assert sums.tolist() == [expected.count(1), expected.count(2)]
        (gradient,) = torch.autograd.grad(sums, logp, torch.tensor([1.0, 2.0]))
        assert gradient.tolist() == expected


def test_strided_and_expanded_inputs(operator: Callable[[bool], None]) -> None:
    padded = torch.randn(6, 4).t()
    row = torch.rand(1, 6) < 0.5
    calls = [
        (padded, {"mask": row.expand(4, 6), "token_weights": torch.randn(4, 12)[:, ::2]}),
        (torch.randn(6)[None].expand(4, 6), {"mask": torch.rand(6, 4).t() < 0.5}),
        (torch.randn(24)[::2], {"cu_seqlens": torch.tensor([0, 9, 5, 9, 12, 9])[::2]}),
        (
            torch.randn(24)[::2],
            {"sequence_ids": torch.randint(-1, 3, (24,))[::2], "num_sequences": 3},
        ),
        (torch.randn(4, 1).expand(4, 6), {}),
    ]
    for logp, layout in calls:
        operator(True)
        got = sequence_logp(logp, **layout)
        operator(False)
        torch.testing.assert_close(got, sequence_logp(logp, **layout))


def test_weights_of_any_dtype(operator: Callable[[bool], None]) -> None:
    logp, weights = torch.randn(4, 6, requires_grad=True), torch.randint(-3, 4, (4, 6))
    for given in (weights, weights.to(torch.int8), weights > 0):
        results = []
        for serves in (True, False):
            operator(serves)
            sums = sequence_logp(logp, token_weights=given)
            results.append((sums, *torch.autograd.grad(sums.square().sum(), logp)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", ["no tokens", "no sequences", "neither"])
def test_nothing_to_sum_stays_connected(operator: Callable[[bool], None], shape: str) -> None:
    tokens = torch.randn(3 if shape == "no sequences" else 0, requires_grad=True)
    count = 2 if shape == "no tokens" else 0
    sums = [
        sequence_logp(tokens, sequence_ids=torch.full_like(tokens, -1).long(), num_sequences=count)
    ]
    if shape != "no sequences":
        sums.append(sequence_logp(tokens, cu_seqlens=torch.zeros(count + 1).long()))
        sums.append(sequence_logp(tokens.expand(count, 0)))
    for one in sums:
        assert one.tolist() == [0.0] * count
        (gradient,) = torch.autograd.grad(one.sum(), tokens)
        assert gradient.shape == tokens.shape and bool((gradient == 0).all())


def test_only_what_a_gradient_needs_is_kept(
    operator: Callable[[bool], None],
) -> None:
    logp, weights = leaves(torch.zeros(4, 6).bool(), torch.float32, torch.float32)

    def kept(logp: Tensor, weights: Tensor | None) -> set[int]:
        sums = sequence_logp(logp, token_weights=weights)
        assert sums.grad_fn is not None
        saved = sums.grad_fn.saved_tensors  # type: ignore[attr-defined]
        return {one.data_ptr() for one in saved if one is not None}

    assert kept(logp, None) == set()
    assert kept(logp, weights.detach()) == {weights.data_ptr()}
    # Which of them are 0 decides what a score that is not finite counts for.
    assert kept(logp.detach(), weights) == {logp.data_ptr(), weights.data_ptr()}
    assert kept(logp, weights) == {logp.data_ptr(), weights.data_ptr()}


@pytest.mark.skipif(
    _extension.ops_unavailable_reason() is not None, reason="the operators are not built"
)
def test_what_is_traced_or_transformed_does_not_go_to_the_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_extension, "_kernels_serve", lambda device: True)
    serves, found = _extension.operators_serve, []
    plain = torch.zeros(3)
    assert serves(plain, None) and serves(torch.nn.Parameter(plain))
    assert not serves(plain, torch.zeros(3, device="meta"))
    torch.func.vmap(lambda one: found.append(serves(one)) or one)(plain)
    torch.func.jvp(lambda one: found.append(serves(one)) or one, (plain,), (plain,))
    torch.jit.trace(lambda one: found.append(serves(one)) or one, (plain,), check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        assert serves(plain)
        assert not serves(plain, torch.autograd.forward_ad.make_dual(plain, plain))
    assert found == [False, False, False]
    monkeypatch.delattr(torch.ops.fastpref, "sequence_sums", raising=False)
    with torch._subclasses.FakeTensorMode():
        logp = torch.zeros(2, 3, device="cuda")
        assert not serves(logp, None)
        sums = sequence_logp(logp, mask=logp > 0, reduction="mean")
        assert sums.shape == (2,) and sums.is_cuda


def test_a_cpu_is_served_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.fastpref, "sequence_sums", None, raising=False)
    assert sequence_logp(torch.ones(2, 3)).tolist() == [3, 3]
