# SPDX-License-Identifier: Apache-2.0
"""The adapter against TRL's own autograd function: numbers, dtypes, products."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastpref.integrations.trl import OUTPUTS, LogProbAdapter
from fastpref.scoring import request, workspace
from fastpref.scoring.plain_scores import plain_scores
from tests.integrations.trl.head_calls import (
    ALL,
    TILE,
    H,
    N,
    V,
    make_inputs,
    scores_and_gradients,
    stock,
)
from tests.scoring import refusing

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.7},
    "scale": {"logit_scale": 0.0625},
    "everything": {"bias": True, "softcap": 3.0, "temperature": 0.7, "logit_scale": 0.5},
}


def exact(inputs: tuple[Any, ...], upstream: dict[str, Tensor], **head: Any) -> Any:
    """The same in float64, from the whole logit matrix."""
    double = tuple(
        value.detach().double().requires_grad_(value.requires_grad)
        if value is not None and value.is_floating_point()
        else value
        for value in inputs
    )

    def apply(h: Tensor, w: Tensor, b: Any, y: Tensor, t: float, _: int, *rest: Any) -> Any:
        cap, scale, _ = rest
        scores = plain_scores(
            h, w, y, bias=b, temperature=t, softcap=cap, logit_scale=scale, ignore_index=-1
        )
        return [getattr(scores, name) for name in OUTPUTS.values()]

    return scores_and_gradients(apply, double, upstream, **head)


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).detach().abs().max())


def expect_as_accurate(value: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """At most twice the error of TRL's, plus rounding of the result."""
    ulp = torch.finfo(value.dtype).eps * float(truth.detach().abs().max())
    assert error(value, truth) <= 2 * error(theirs, truth) + 4 * ulp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_scores_and_gradients_are_those_of_trl(head: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype, head.get("bias", False))
    upstream = {"log_probs": torch.randn(N), "entropy": torch.randn(N)}
    ours, our_gradients = scores_and_gradients(LogProbAdapter.apply, inputs, upstream, **head)
    theirs, their_gradients = scores_and_gradients(stock().apply, inputs, upstream, **head)
    truth, true_gradients = exact(inputs, upstream, **head)
    for name in OUTPUTS:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].requires_grad == theirs[name].requires_grad
        if name == "is_top1":
            continue
        expect_as_accurate(ours[name], theirs[name], truth[name])
    for gradient, their, true in zip(our_gradients, their_gradients, true_gradients, strict=True):
        assert gradient.dtype == dtype
        expect_as_accurate(gradient, their, true)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "hidden and bias"])
def test_frozen_inputs_get_no_gradient(frozen: str) -> None:
    inputs = make_inputs(bias=True)
    for name, value in zip(("hidden", "weight", "bias"), inputs, strict=False):
        if value is not None:
            value.requires_grad_(name not in frozen)
    upstream = {"log_probs": torch.randn(N)}
    _, ours = scores_and_gradients(LogProbAdapter.apply, inputs, upstream)
    _, theirs = scores_and_gradients(stock().apply, inputs, upstream)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("upstream", ["log_probs", "entropy"])
def test_a_gradient_may_reach_one_output_only(upstream: str) -> None:
    inputs = make_inputs(bias=True)
    gradient = {upstream: torch.randn(N)}
    _, ours = scores_and_gradients(LogProbAdapter.apply, inputs, gradient, softcap=3.0)
    _, theirs = scores_and_gradients(stock().apply, inputs, gradient, softcap=3.0)
    torch.testing.assert_close(ours, theirs)


def test_only_what_is_asked_for_is_computed() -> None:
    hidden, weight, bias, targets = make_inputs()
    for names in ((), ("log_probs",), ("is_top1", "entropy")):
        out = LogProbAdapter.apply(hidden, weight, bias, targets, 1.0, TILE, None, 1.0, names)
        present = [name for name, value in zip(OUTPUTS, out, strict=True) if value is not None]
        assert present == [name for name in OUTPUTS if name in ("log_probs", *names)]


def test_a_tie_counts_for_the_first_maximum() -> None:
    """Every column that holds or rounds to the greatest logit is tried as target."""
    stock_apply = stock().apply
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, H).bfloat16(), torch.randn(4000, H).bfloat16()
    weight[2000:] = weight[:2000].flip(0)  # every greatest logit twice
    logits = hidden @ weight.t()
    rows, targets = (logits == logits.amax(1, keepdim=True)).nonzero().unbind(1)
    assert targets.shape[0] >= 600
    arguments = (hidden[rows], weight, None, targets, 1.0, 4096, None, 1.0, ("is_top1",))
    expected = stock_apply(*arguments)[-1]
    assert 300 == int(expected.sum())
    assert torch.equal(LogProbAdapter.apply(*arguments)[-1], expected)


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype", "autocast"),
    [
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
    ],
)
def test_products_run_in_the_dtype_that_trl_uses(
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    autocast: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As on a processor that multiplies in 16 bits.
    monkeypatch.setattr(request, "slow_reason", lambda *_: None)
    hidden, weight, _, targets = make_inputs()
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    weight = weight.detach().to(weight_dtype).requires_grad_()
    product = torch.bfloat16 if autocast else hidden_dtype
    inputs = (hidden, weight, None, targets)
    upstream = {"log_probs": torch.randn(N)}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), ProductDtypes() as products:
        ours, our_gradients = scores_and_gradients(LogProbAdapter.apply, inputs, upstream)
    assert products.seen == {product}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        theirs, their_gradients = scores_and_gradients(stock().apply, inputs, upstream)
    truth, true_gradients = exact(inputs, upstream)
    expect_as_accurate(ours["log_probs"], theirs["log_probs"], truth["log_probs"])
    assert [g.dtype for g in our_gradients] == [hidden_dtype, weight_dtype]
    for gradient, their, true in zip(our_gradients, their_gradients, true_gradients, strict=True):
        # torch's bfloat16 product on CPU rounds once to bfloat16; TRL's gradient products are fp32.
        rounding = torch.finfo(product).eps * float(true.abs().max())
        assert error(gradient, true) <= 2 * error(their, true) + rounding


class ProductDtypes(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the dtypes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("outputs", [(), ALL], ids=["log_probs", "all"])
@pytest.mark.parametrize("trained", ["both", "hidden", "weight"])
@pytest.mark.parametrize("scored", [0, 23, N])
def test_rows_without_gradient_cost_no_product(
    scored: int, trained: str, outputs: tuple[str, ...]
) -> None:
    """On CPU TRL passes prompts and padding too, and masks their scores."""
    hidden, weight, _, targets = make_inputs()
    hidden.requires_grad_(trained != "weight")
    weight.requires_grad_(trained != "hidden")
    mask = torch.zeros(N, dtype=torch.bool)
    mask[torch.randperm(N)[:scored]] = True
    with FlopCounterMode(display=False) as forward:
        out = LogProbAdapter.apply(hidden, weight, None, targets, 1.0, TILE, None, 1.0, outputs)
    log_probs = out[0].masked_fill(~mask, 0)
    leaves = [value for value in (hidden, weight) if value.requires_grad]
    with FlopCounterMode(display=False) as backward:
        gradients = torch.autograd.grad(log_probs.sum(), leaves)
    assert forward.get_total_flops() == 2 * N * H * V
    assert backward.get_total_flops() == len(leaves) * 2 * scored * H * V
    (expected,) = stock().apply(hidden, weight, None, targets, 1.0, TILE, None, 1.0, ())[:1]
    theirs = torch.autograd.grad(expected.masked_fill(~mask, 0).sum(), leaves)
    torch.testing.assert_close(gradients, theirs)


def test_no_rows_at_all_stay_connected() -> None:
    hidden, weight, bias, targets = make_inputs(bias=True, n=0)
    out = LogProbAdapter.apply(hidden, weight, bias, targets, 1.0, TILE, None, 1.0, ALL)
    assert [tuple(value.shape) for value in out] == [(0,)] * 5
    gradients = torch.autograd.grad(out[0].sum() + out[1].sum(), [hidden, weight, bias])
    assert [int(gradient.count_nonzero()) for gradient in gradients] == [0, 0, 0]


def test_memory_that_runs_out_gives_the_same_scores() -> None:
    inputs = make_inputs(n=600)
    upstream = {"log_probs": torch.randn(600), "entropy": torch.randn(600)}
    want = scores_and_gradients(LogProbAdapter.apply, inputs, upstream)
    workspace.release_workspace()
    with refusing.Refusing(refusing.at(0), 600 * V * 4) as mode:
        got = scores_and_gradients(LogProbAdapter.apply, inputs, upstream)
    assert mode.refused == 1
    torch.testing.assert_close(got, want)


def test_scores_of_doubles_are_float32() -> None:
    hidden, weight, bias, targets = make_inputs(torch.float64)
    out = LogProbAdapter.apply(hidden, weight, bias, targets, 1.0, TILE)
    assert [value.dtype for value in out] == [torch.float32] * 4 + [torch.bool]
    (gradient,) = torch.autograd.grad(out[0].sum(), [hidden])
    assert gradient.dtype == torch.float64


def test_unknown_output_is_refused() -> None:
    hidden, weight, bias, targets = make_inputs()
    with pytest.raises(ValueError, match=r"outputs must be among .*'variance'.*upgrade fastpref"):
        LogProbAdapter.apply(hidden, weight, bias, targets, 1.0, TILE, None, 1.0, ("variance",))


def test_under_compile_the_graph_breaks_quietly() -> None:
    hidden, weight, _, targets = make_inputs()

    @torch.compile(backend="eager")
    def compiled(hidden: Tensor) -> Tensor:
        out = LogProbAdapter.apply(2 * hidden, weight, None, targets, 1.0, TILE, None, 1.0, ())
        return -out[0]

    with warnings.catch_warnings(record=True) as warned:
        value = compiled(hidden.detach())
    assert not [warning for warning in warned if "Dynamo" in str(warning.message)]
    expected, *_ = LogProbAdapter.apply(2 * hidden, weight, None, targets, 1.0, TILE, None, 1.0, ())
    assert torch.equal(value, -expected)
