# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel that sums over sequences, on the host, and the gradients that sequence_logp gives
it.

Not seen here: launches, streams, and speed.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import _extension
from fastpref.scoring.types import statistics_dtype
from fastpref.sequences import sequence_logp
from fastpref.sequences import sums as summing
from tests.cuda_on_host.kernels import ELEMENTS, unavailable_reason
from tests.cuda_on_host.sequence_sums import SequenceSums, compile_sequence_sums

pytestmark = pytest.mark.heavy
Kernel = Callable[..., tuple[Tensor, Tensor]]

# Odd lengths, several tokens a thread, empty sequences first, last and between.
LENGTHS = [0, 3, 517, 0, 1, 5000, 1027, 0]
B, N = len(LENGTHS), sum(LENGTHS)
BOUNDARIES = torch.tensor([0, *LENGTHS]).cumsum(0)
IDS = torch.arange(B).repeat_interleave(torch.tensor(LENGTHS))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Handing these small tensors to a second thread takes longer than the tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def on_the_host(tmp_path_factory: pytest.TempPathFactory) -> SequenceSums:
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    return compile_sequence_sums(tmp_path_factory.mktemp("host"))


@pytest.fixture
def kernel(on_the_host: SequenceSums) -> Kernel:
    return on_the_host


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


# From here on sequence_logp with either in the operator's place.


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


def arguments(**changed: Any) -> list[Any]:
    """Of the operator, all in order but for ``changed``."""
    given = dict.fromkeys(("token_weights", "mask", "order", "boundaries"))
    return [*({"logp": torch.zeros(2, 3)} | given | changed).values(), False]


PACKED = {"logp": torch.zeros(3), "boundaries": torch.tensor([0, 3])}
ERRORS = {
    "dtype": (arguments(logp=torch.zeros(2, 3).long()), "logp must be float64, float32, bfloat16"),
    "packed": (arguments(logp=torch.zeros(3)), r"\(N,\) with boundaries.* got 1 dimensions"),
    "padded": (arguments(boundaries=torch.tensor([0, 3])), r"\(N,\) with boundaries.* got 2 dim"),
    "columns": (arguments(logp=torch.zeros(3, 2).t()), "logp must have contiguous rows"),
    "weights": (arguments(token_weights=torch.zeros(3)), "token_weights must be shaped like logp"),
    "half weights": (
        arguments(token_weights=torch.zeros(2, 3).half()),
        "token_weights must have the dtype of logp, got another; cast both to float64",
    ),
    "float mask": (arguments(mask=torch.zeros(2, 3)), "mask must be bool"),
    "other device": (
        arguments(mask=torch.zeros(2, 3, device="meta").bool()),
        "mask must be on the device of logp; move it there first",
    ),
    "order": (arguments(order=torch.tensor([0])), "order must be .* come with boundaries"),
    "short order": (arguments(**PACKED, order=torch.tensor([0])), "order must be .* got 1 elem"),
    "strided order": (
        arguments(**PACKED, order=torch.zeros(6).long()[::2]),
        "order must be one contiguous row of int64",
    ),
    "float boundaries": (
        arguments(logp=torch.zeros(3), boundaries=torch.zeros(2)),
        "boundaries must be one contiguous row of int64",
    ),
    "no boundaries": (
        arguments(logp=torch.zeros(3), boundaries=torch.zeros(0).long()),
        r"boundaries must be \(B \+ 1,\), got no elements",
    ),
}


@functools.cache
def without_cuda_operator() -> str | None:
    if torch.version.cuda is not None:
        return "this torch has CUDA"
    if _extension.ops_unavailable_reason() is not None:
        return "fastpref/_ops.so is not built"
    built = torch._C._dispatch_has_kernel_for_dispatch_key("fastpref::sequence_sums", "CUDA")
    return None if built else "built without CUDA"


@pytest.mark.skipif(without_cuda_operator() is not None, reason=str(without_cuda_operator()))
@pytest.mark.parametrize("name", ERRORS)
def test_operator_refuses(name: str) -> None:
    given, message = ERRORS[name]
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastpref.sequence_sums.default.redispatch(keys, *given)
