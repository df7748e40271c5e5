# SPDX-License-Identifier: Apache-2.0
"""sequence_logp on a GPU: its values, bits and host reads, and what goes past the kernel."""

import functools

import pytest
import torch

from fastpref import _extension
from fastpref.sequences import sequence_logp

pytestmark = pytest.mark.gpu
GPU = torch.cuda.is_available()
REASON = _extension.cuda_ops_unavailable_reason() if GPU else "no NVIDIA GPU"
operator = pytest.mark.skipif(REASON is not None, reason=str(REASON))
LENGTHS = [0, 300, 1, 0, 5000, 777, 0]
LAYOUTS = ["padded", "mask", "cu_seqlens", "sequence_ids"]
layouts = pytest.mark.parametrize("name", LAYOUTS)
reductions = pytest.mark.parametrize("reduction", ["sum", "mean"])
weightings = pytest.mark.parametrize("weighted", [False, True])
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)


def make_case(name, dtype=torch.float32, weighted=True, reduction="mean"):
    """Log-probabilities, weights, and the other arguments; NaN where not scored."""
    generator = torch.Generator().manual_seed(0)
    shape = (7, 1501) if name in ("padded", "mask") else (sum(LENGTHS),)
    scored = torch.rand(shape, generator=generator) < 0.7
    layout = {"reduction": reduction}
    if name == "cu_seqlens":
        layout["cu_seqlens"] = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    elif name == "sequence_ids":
        ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
        ids = ids[torch.randperm(len(ids), generator=generator)]
        layout |= {"sequence_ids": torch.where(scored, ids, -1), "num_sequences": len(LENGTHS)}
    elif name == "mask" or reduction == "mean":
        scored[3] = False
        layout["mask"] = scored
    if not {"mask", "sequence_ids"} & set(layout):
        scored = torch.ones(shape, dtype=torch.bool)
    values = [
        (-3 * torch.rand(shape, generator=generator) - 0.1)
        .masked_fill(~scored, torch.nan)
        .to(dtype)
        for _ in range(2)
    ]
    return values[0], values[1] if weighted else None, layout


def on(device, logp, weights, layout):
    def move(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return move(logp), move(weights), {key: move(value) for key, value in layout.items()}


def step(logp, weights, layout):
    """The sums, and gradients of a weighted sum of them."""
    inputs = [one.detach().requires_grad_() for one in (logp, weights) if one is not None]
    sums = sequence_logp(inputs[0], token_weights=(*inputs, None)[1], **layout)
    upstream = torch.linspace(-1, 2, len(sums), dtype=sums.dtype, device=sums.device)
    return sums, *torch.autograd.grad(sums, inputs, upstream)


@operator
@layouts
@reductions
@weightings
@dtypes
def test_against_the_cpu(name, reduction, weighted, dtype):
    case = make_case(name, dtype, weighted, reduction)
    expected, actual = step(*case), step(*on("cuda", *case))
    # Sums are added up in another order, and may round to the other neighbour.
    digits = 1e-13 if dtype == torch.float64 else 2.0**-23
    torch.testing.assert_close(actual[0].cpu(), expected[0], rtol=digits, atol=0)
    for got, wanted in zip(actual[1:], expected[1:], strict=True):
        assert torch.equal(got.cpu(), wanted)


@operator
@layouts
def test_the_operator_serves(name):
    logp, weights, layout = on("cuda", *make_case(name, torch.float64))
    sums = sequence_logp(logp.requires_grad_(), token_weights=weights, **layout)
    assert "OperatorSums" in sums.grad_fn.name()


@operator
@layouts
def test_the_same_bits_fifty_times(name):
    case = on("cuda", *make_case(name))
    first = step(*case)
    for _ in range(50):
        assert all(torch.equal(*pair) for pair in zip(step(*case), first, strict=True))


@operator
@layouts
@reductions
@weightings
def test_the_host_never_waits(name, reduction, weighted):
    case = on("cuda", *make_case(name, weighted=weighted, reduction=reduction))
    expected = step(*case)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step(*case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, got, expected))


@operator
@layouts
def test_gradients_are_differentiable_again(name):
    shape = (3, 8) if name in ("padded", "mask") else (8,)
    layout = {}
    if name == "mask":
        layout = {"mask": torch.rand(shape, device="cuda") < 0.6}
    elif name == "cu_seqlens":
        layout = {"cu_seqlens": torch.tensor([0, 3, 3, 8], device="cuda")}
    elif name == "sequence_ids":
        ids = torch.tensor([2, 0, -1, 0, 2, 1, 2, -1], device="cuda")
        layout = {"sequence_ids": ids, "num_sequences": 3}
    inputs = [torch.randn(shape, dtype=torch.float64, device="cuda") for _ in range(2)]

    def call(logp, weights):
        return sequence_logp(logp, token_weights=weights, **layout)

    inputs = [one.requires_grad_() for one in inputs]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@operator
def test_boundaries_and_ids_outside_read_nothing_there():
    """Nobody looks at their values on a GPU."""
    logp = torch.ones(20, device="cuda", requires_grad=True)
    far = torch.tensor([-(1 << 40), 3, 2, 15, 1 << 40], device="cuda")
    sums = sequence_logp(logp, cu_seqlens=far)
    assert sums.tolist() == [3, 0, 13, 5]
    torch.autograd.grad(sums.sum(), logp)
    ids = torch.arange(20, device="cuda")
    sums = sequence_logp(logp, sequence_ids=ids, num_sequences=3)
    assert torch.autograd.grad(sums.sum(), logp)[0].tolist() == [1.0] * 3 + [0.0] * 17


@operator
@layouts
def test_torch_itself_gives_the_same(name):
    """While traced or transformed, plain torch adds up."""
    logp, weights, layout = on("cuda", *make_case(name, torch.float64))
    expected = sequence_logp(logp, token_weights=weights, **layout)
    call = functools.partial(sequence_logp, token_weights=weights, **layout)
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logp), expected, rtol=1e-13, atol=0)
    _, pull = torch.func.vjp(call, logp)
    (gradient,) = pull(torch.ones_like(expected))
    leaf = logp.clone().requires_grad_()
    assert torch.equal(gradient, torch.autograd.grad(call(leaf).sum(), leaf)[0])


@operator
@layouts
def test_a_captured_graph_replays(name):
    logp, weights, layout = on("cuda", *make_case(name))
    expected = step(logp, weights, layout)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(logp, weights, layout)
    torch.cuda.current_stream().wait_stream(stream)
    graph, doubled = torch.cuda.CUDAGraph(), logp.clone()
    with torch.cuda.graph(graph):
        got = step(doubled, weights, layout)
    doubled.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got[0], 2 * expected[0])
    assert torch.equal(got[1], expected[1]) and torch.equal(got[2], 2 * expected[2])


@operator
@layouts
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one(name):
    case = make_case(name)
    first, second = step(*on("cuda:0", *case)), step(*on("cuda:1", *case))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))
