# SPDX-License-Identifier: Apache-2.0
"""preference_loss and linear_divergence on a GPU: every schedule and backend against float64, host
reads, a captured graph, torch.compile, memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import ScoringOptions, explain, preference_loss
from fastpref.scoring.backends.divergences import unavailable_reason
from tests.gpu.test_scoring import backends
from tests.preference.plain_pairs import B, T, batch, found, plain
from tests.preference.test_numbers import CASES, OPTIONS
from tests.scoring.cases import check_contract
from tests.scoring.test_divergence import DIVERGENCES, check_error, rounded_models

pytestmark = pytest.mark.gpu
dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda one: str(one)[6:]
)


def there(given: dict[str, Tensor]) -> dict[str, Tensor]:
    moved = {name: one.detach().cuda() for name, one in given.items()}
    for name in ("hidden", "weight"):
        moved[name].requires_grad_()
    return moved


@backends
@pytest.mark.parametrize("dtype, options", CASES, ids=str)
def test_error(backend: str, dtype: torch.dtype, options: str) -> None:
    given = there(batch(dtype))
    exact = there({k: v.double() if k != "target" else v for k, v in batch(dtype).items()})
    chosen = ScoringOptions(backend=backend, **OPTIONS[options])
    output = preference_loss(**given, objective="dpo", options=chosen)
    actual, eager, exactly = (
        found(output.loss, output.logps, given, -3.7),
        found(*plain(given, "dpo"), given, -3.7),
        found(*plain(exact, "dpo"), exact, -3.7),
    )
    # Of one number plain torch may have the last bit by luck.
    loss = actual.pop("loss").double()
    torch.testing.assert_close(
        loss, exactly["loss"], rtol=1e-6 if dtype.itemsize > 2 else 1e-2, atol=0
    )
    check_contract(actual, eager, exactly)


def packed(given: dict[str, Tensor]) -> dict[str, Any]:
    """Every row of the same length, one after the other."""
    rows = {name: given[name].detach().flatten(0, 1) for name in ("hidden", "ref_hidden")}
    rows["hidden"].requires_grad_()
    boundaries = torch.arange(0, B * T + 1, T, device="cuda")
    return given | rows | {"target": given["target"].flatten(), "cu_seqlens": boundaries}


def step(arguments: dict[str, Any], **changes: Any) -> tuple[Tensor, ...]:
    output = preference_loss(**arguments, objective="dpo", outputs=("entropy",), **changes)
    leaves = [arguments["hidden"], arguments["weight"]]
    return output.loss, *torch.autograd.grad(output.loss, leaves), *output.metrics.values()


@pytest.mark.parametrize("kind", ["packed", "bounded"])
def test_no_host_read(kind: str) -> None:
    given = there(batch(torch.float32))
    arguments = packed(given) if kind == "packed" else given
    changes = {"options": ScoringOptions(max_scored=B * T)} if kind == "bounded" else {}
    want = step(arguments, **changes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step(arguments, **changes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_captured_graph_replays() -> None:
    given = there(batch(torch.float32))
    arguments = packed(given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step(arguments)
    with torch.no_grad():
        arguments["hidden"].mul_(0.5)
    graph.replay()
    for got, want in zip(held, step(arguments), strict=True):
        torch.testing.assert_close(got, want)


def test_torch_compile() -> None:
    given = there(batch(torch.float32))

    def loss(arguments: dict[str, Any]) -> Tensor:
        return preference_loss(**arguments, objective="dpo", outputs=("entropy",)).loss

    value = torch.compile(loss, fullgraph=True, dynamic=True)(given)
    gradients = torch.autograd.grad(value, [given["hidden"], given["weight"]])
    for got, want in zip((value, *gradients), step(given)[:3], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("schedule", ["recompute", "batches"])
def test_twice_the_pairs_take_no_larger_workspace(schedule: str) -> None:
    vocab, width, length, grown = 32768, 64, 64, []
    for rows in (16, 32):
        hidden = torch.randn(rows, length, width, device="cuda", requires_grad=True)
        weight = torch.randn(vocab, width, device="cuda", requires_grad=True)
        target = torch.randint(vocab, (rows, length), device="cuda")
        options = ScoringOptions(schedule=schedule, memory_budget=256 * vocab * 4)
        arguments = (hidden, weight, target, "simpo")
        plan = explain(*arguments, options=options)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        preference_loss(*arguments, options=options).loss.backward()
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        assert peak <= plan.workspace_bytes + hidden.nbytes + weight.nbytes + (8 << 20), str(plan)
        grown.append(peak - 6 * hidden.nbytes)
    assert grown[1] <= grown[0] + (1 << 20)


@backends
@pytest.mark.parametrize("divergence", DIVERGENCES)
@dtypes
@pytest.mark.parametrize("frozen", [False, True])
def test_divergence(backend: str, divergence: str, dtype: torch.dtype, frozen: bool) -> None:
    reason = unavailable_reason(backend)
    if reason is not None:
        pytest.skip(reason)
    needs = ("hidden",) if frozen else ("hidden", "weight")
    exact, low = rounded_models(dtype, needs, "cuda")
    options = ScoringOptions(backend=backend)
    value = low.run(divergence=divergence, options=options)
    check_error(exact, low, value, divergence, needs)
