# SPDX-License-Identifier: Apache-2.0
"""The adapter against TRL's own autograd function, and what patching does and refuses."""

import contextlib
import importlib.metadata
import logging
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastpref import ScoringOptions
from fastpref.integrations import trl as integration
from fastpref.integrations.trl import OUTPUTS, LogProbAdapter
from fastpref.scoring import plan as schedule
from fastpref.scoring import workspace
from fastpref.scoring.reference import reference_scores
from fastpref.scoring.request import make_request
from tests.scoring import refusing

ALL = tuple(OUTPUTS)
WITHOUT_TRL = 'TRL is not installed (pip install "fastpref[trl]")'
N, H, V = 60, 24, 259
TILE = 128  # narrower than the vocabulary: TRL folds three tiles
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.7},
    "scale": {"logit_scale": 0.0625},
    "everything": {"bias": True, "softcap": 3.0, "temperature": 0.7, "logit_scale": 0.5},
}


def stock() -> Any:
    """TRL's function."""
    return pytest.importorskip("trl.kernels", reason=WITHOUT_TRL).ChunkedLogProbFunction


def make_inputs(
    dtype: torch.dtype = torch.float32, bias: bool = False, n: int = N
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    pytest.importorskip("transformers", reason=WITHOUT_TRL)  # the adapter asks it about ZeRO-3
    torch.manual_seed(0)
    hidden = torch.randn(n, H).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(V, H)).to(dtype).requires_grad_()
    b = torch.randn(V).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(0, V, (n,))
    targets[:1], targets[1:2] = 0, V - 1
    return hidden, weight, b, targets


def scores_and_gradients(
    apply: Any, inputs: tuple[Any, ...], upstream: dict[str, Tensor], **head: Any
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The five outputs by TRL's name, and the gradients of whatever of the inputs takes one."""
    hidden, weight, bias, targets = inputs
    out = apply(
        hidden,
        weight,
        bias,
        targets,
        head.get("temperature", 1.0),
        TILE,
        head.get("softcap"),
        head.get("logit_scale", 1.0),
        ALL,
    )
    values = dict(zip(OUTPUTS, out, strict=True))
    trained = [value for value in (hidden, weight, bias) if value is not None]
    trained = [value for value in trained if value.requires_grad]
    loss = sum((values[name] * grad).sum() for name, grad in upstream.items())
    return values, list(torch.autograd.grad(loss, trained))


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
        scores = reference_scores(
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
    hidden_dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool
) -> None:
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


MIB = 1 << 20
TILE_BYTES = 4096 * 32768 * 2
H100 = 80 << 30
LLAMA, QWEN = (4096, 128256), (896, 151936)
HALF, WIDE = torch.bfloat16, torch.float32


def all_kept(rows: int, vocab: int) -> int:
    return -(-4 * rows * vocab * 2 // 3)


BUDGETS = {
    # rows, (H, V), dtype of the weight where it is trained, keeps: the budget
    "held by TRL's own": (8192, LLAMA, HALF, True, all_kept(8192, LLAMA[1])),
    "held by few rows": (2048, LLAMA, HALF, True, all_kept(2048, LLAMA[1])),
    "small H": (8192, QWEN, HALF, True, all_kept(8192, QWEN[1])),
    "more than a sixteenth": (65536, QWEN, HALF, True, H100 // 16),
    "float32 weight": (8192, LLAMA, WIDE, True, all_kept(8192, LLAMA[1])),
    "frozen, entropy": (8192, LLAMA, None, True, all_kept(8192, LLAMA[1])),
    "frozen": (8192, LLAMA, None, False, TILE_BYTES),
    "few rows": (100, LLAMA, None, False, 100 * 32768 * 2),
}


def budget_of(
    rows: int, head: tuple[int, int], trained: torch.dtype | None, keeps: bool, memory: int
) -> int:
    return integration.default_budget(
        rows,
        *head,
        torch.bfloat16,
        trained or torch.bfloat16,
        trains_weight=trained is not None,
        keeps=keeps,
        device_memory=memory,
    )


@pytest.mark.parametrize("name", BUDGETS)
def test_default_budget_on_a_gpu(name: str) -> None:
    rows, head, trained, keeps, expected = BUDGETS[name]
    assert budget_of(rows, head, trained, keeps, H100) == expected


MODELS = {
    "qwen2.5-0.5b": QWEN,
    "llama3.2-1b": (2048, 128256),
    "qwen2.5-1.5b": (1536, 151936),
    "qwen2.5-7b": (3584, 152064),
    "llama3-8b": LLAMA,
    "gemma2-9b": (3584, 256000),
}


@pytest.mark.parametrize("memory", [24, 40, 80])
@pytest.mark.parametrize("rows", [2048, 8192, 32768])
@pytest.mark.parametrize("name", MODELS)
def test_what_fits_with_trl_still_fits(name: str, rows: int, memory: int) -> None:
    """A gradient at the log-probabilities takes, by plan, no more than TRL, or has a sixteenth of
    the device for its workspace; and once that has run out, no more than TRL."""
    hidden_size, vocab = head = MODELS[name]
    budget = budget_of(rows, head, HALF, True, memory << 30)
    problem = schedule.Problem(
        scored=rows,
        hidden_size=hidden_size,
        trained_size=hidden_size,
        vocab_size=vocab,
        dtype=HALF,
        needs_hidden=True,
        needs_weight=True,
        needs_bias=False,
        only_logp=True,
        copies_weight=False,
        backend="rows",
        device_type="cuda",
        scores_in_tiles=True,
        temporary_bytes=0,
        total_memory=memory << 30,
    )
    plan = schedule.choose(problem, ScoringOptions(memory_budget=budget))
    # A tile, gradients of rows and of the weight in float32, and these rounded; numbers of rows.
    tile = min(rows, 4096) * 32768 * 2
    trl = tile + 6 * hidden_size * (rows + vocab) + 28 * rows
    result = 2 * hidden_size * vocab
    held = 2 * rows * (vocab + hidden_size) <= tile + 4 * hidden_size * vocab
    if held or budget > (memory << 30) // 16:
        assert plan.workspace_bytes + result <= trl
    assert (plan.kept_rows == rows) >= held
    while (smaller := schedule.less(plan, keep=False)) is not None:
        plan = smaller
    assert plan.workspace_bytes + result <= trl


@pytest.mark.parametrize("needs", ["nothing", "hidden", "weight"])
@pytest.mark.parametrize("outputs", [("logp",), ("logp", "entropy")])
def test_options_on_a_gpu_follow_what_needs_a_gradient(
    needs: str, outputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, _, targets = make_inputs()
    for name, value in (("hidden", hidden), ("weight", weight)):
        value.requires_grad_(name == needs)
    request, parameters = make_request(hidden, weight, targets, outputs=outputs)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), shape=hidden.shape)
    monkeypatch.setattr(integration, "total_memory", lambda device: 1 << 22)
    monkeypatch.setattr(integration, "TILE_ROWS", 10)
    options, budget_from = integration._options(request, on_gpu, parameters, 64)
    keeps = needs == "weight" or (needs == "hidden" and "entropy" in outputs)
    theirs = 10 * 64 * 4 + (needs == "weight") * V * H * 4
    assert options.memory_budget == (max(theirs, -(-4 * N * V * 4 // 3)) if keeps else theirs)
    assert options.schedule == "auto" and "TRL's own head" in str(budget_from)
    assert integration._options(request, hidden, parameters, 64) == (
        ScoringOptions(schedule="keep"),
        None,
    )


def test_the_plan_of_a_call_can_be_read(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, _, targets = make_inputs()
    given = ScoringOptions(memory_budget=3 * MIB), "of a test"
    monkeypatch.setattr(integration, "_options", lambda *_: given)
    with caplog.at_level(logging.DEBUG, logger="fastpref"):
        LogProbAdapter.apply(hidden, weight, None, targets, 1.0, TILE)
    assert any("(budget 3.0 MiB, of a test)" in message for message in caplog.messages)


def test_memory_that_runs_out_gives_the_same_scores() -> None:
    inputs = make_inputs(n=600)
    upstream = {"log_probs": torch.randn(600), "entropy": torch.randn(600)}
    want = scores_and_gradients(LogProbAdapter.apply, inputs, upstream)
    workspace.release()
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


def fused_scores(model: Any, labels: Tensor) -> Any:
    ids = torch.arange(10, 10 + labels.numel()).view_as(labels)
    return model(input_ids=ids, labels=labels, fused_lm_head=True)


@pytest.mark.parametrize("compact", [False, True], ids=["every position", "scored positions"])
def test_batch_without_a_label(
    compact: bool, trl_utils: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is a 0 that all of the model is connected to. On a GPU TRL passes no row at all."""
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: compact)
    model = make_model("phi")
    trl_utils.add_fused_lm_head(model, outputs=ALL)  # before patching: it is looked up at each call
    with integration.patched():
        out = fused_scores(model, torch.full((2, 12), -100))
        out.log_probs.sum().backward()
    assert not any(getattr(out, name).any() for name in OUTPUTS)
    gradients = [value.grad for value in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_compacted_batch_scores_as_a_masked_one(
    trl_utils: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("gemma2")
    trl_utils.add_fused_lm_head(model, outputs=ALL)
    labels = torch.randint(0, V, (2, 12)).masked_fill(torch.rand(2, 12) < 0.5, -100)
    with integration.patched():
        masked = fused_scores(model, labels)
        monkeypatch.setattr(trl_utils, "_use_triton", lambda device: True)
        compacted = fused_scores(model, labels)
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(masked, name), getattr(compacted, name))


@pytest.mark.parametrize("autocast", [False, True])
def test_partitioned_head_is_gathered_again_in_backward(
    autocast: bool, trl_utils: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3 weight and bias hold data only inside TRL's gathering context."""
    model = make_model("phi")
    trl_utils.add_fused_lm_head(model)
    head = model.get_output_embeddings()
    labels = torch.randint(0, V, (2, 12)).masked_fill(torch.rand(2, 12) < 0.5, -100)
    trained = [head.weight, head.bias, model.get_input_embeddings().weight]

    def gradients() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = fused_scores(model, labels).log_probs.sum()
        return torch.autograd.grad(loss, trained)

    with integration.patched():
        expected = gradients()
    whole = {value: value.data for value in (head.weight, head.bias)}
    gathered = []

    @contextlib.contextmanager
    def gather(*values: Tensor) -> Iterator[None]:
        assert values[0] is head.weight and values[1] is head.bias
        gathered.append(values)
        for value, data in whole.items():
            value.data = data
        yield
        for value in whole:
            value.data = torch.empty(0)

    deepspeed = sys.modules["transformers.integrations.deepspeed"]
    monkeypatch.setattr(deepspeed, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(trl_utils, "maybe_gather_lm_head_ctx", gather)
    for value in whole:
        value.data = torch.empty(0)
    with integration.patched():
        again = gradients()
    assert len(gathered) == 2
    assert head.weight.numel() == head.bias.numel() == 0
    assert all(map(torch.equal, again, expected))


def test_without_zero3_nothing_is_gathered(trl_utils: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context in backward would have the weight cast once more."""
    called: list[Any] = []
    monkeypatch.setattr(trl_utils, "maybe_gather_lm_head_ctx", lambda *args: called.append(args))
    hidden, weight, _, targets = make_inputs()
    LogProbAdapter.apply(hidden, weight, None, targets, 1.0, TILE)[0].sum().backward()
    assert called == []


def test_patch_and_unpatch_are_idempotent(trl_utils: Any, caplog: Any) -> None:
    found = trl_utils._ChunkedLogProbFunction
    assert found is stock()
    with caplog.at_level(logging.INFO, logger="fastpref"):
        integration.patch()
        integration.patch()
    assert trl_utils._ChunkedLogProbFunction is LogProbAdapter
    version = importlib.metadata.version("trl")
    assert [(record.levelname, version in record.message) for record in caplog.records] == [
        ("INFO", True)
    ]
    integration.unpatch()
    integration.unpatch()
    assert trl_utils._ChunkedLogProbFunction is found


def test_patched_restores_what_it_found(trl_utils: Any) -> None:
    found = trl_utils._ChunkedLogProbFunction
    with pytest.raises(KeyError), integration.patched():
        assert trl_utils._ChunkedLogProbFunction is LogProbAdapter
        raise KeyError
    assert trl_utils._ChunkedLogProbFunction is found
    integration.patch()
    with integration.patched():
        pass
    assert trl_utils._ChunkedLogProbFunction is LogProbAdapter
    with integration.patched():
        integration.unpatch()
    assert trl_utils._ChunkedLogProbFunction is LogProbAdapter
    integration.unpatch()
    assert trl_utils._ChunkedLogProbFunction is found


class OtherHead:
    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any) -> None:
        """Not what TRL has."""


@pytest.mark.parametrize(
    ("symbol", "version", "said"),
    [
        (OtherHead, None, r"forward\(ctx, hidden, weight, targets\)"),
        (None, None, r"has no _ChunkedLogProbFunction"),
        ("stock", "1.14.2", r"TRL 1\.14\.2"),
    ],
    ids=["other signature", "no symbol", "old version"],
)
def test_unknown_trl_is_refused(
    symbol: Any,
    version: str | None,
    said: str,
    trl_utils: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if symbol is None:
        monkeypatch.delattr(trl_utils, "_ChunkedLogProbFunction")
    elif symbol != "stock":
        monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", symbol)
    if version is not None:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    before = getattr(trl_utils, "_ChunkedLogProbFunction", None)
    for attempt in (integration.patch, integration.patched().__enter__):
        with pytest.raises(RuntimeError, match=said) as refused:
            attempt()
        message = str(refused.value)
        assert importlib.metadata.version("trl") in message
        assert "Expected: TRL 1.15 or newer" in message and "final_logit_softcapping" in message
        assert 'pip install "fastpref[trl]"' in message
    assert getattr(trl_utils, "_ChunkedLogProbFunction", None) is before


@pytest.mark.parametrize("version", ["1.15.0.dev0", "1.15.0", "2.0.0"])
def test_versions_with_the_known_signature_are_patched(
    version: str, trl_utils: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with integration.patched():
        assert trl_utils._ChunkedLogProbFunction is LogProbAdapter


@pytest.mark.parametrize("call", [integration.patch, integration.unpatch])
def test_missing_trl_names_the_remedy(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("trl", "trl.trainer", "trl.trainer.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "fastpref\[trl\]"'):
        call()
