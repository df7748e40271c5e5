# SPDX-License-Identifier: Apache-2.0
"""Fused models within what is wrapped around them: torch.compile, accelerate's devices and
offloading, DDP, FSDP, ZeRO-3."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastpref
from fastpref import TokenScores
from fastpref.integrations.causal_lm import scores
from tests.integrations.causal_lm.models import (
    batch,
    check_gradients,
    gradients,
    make,
    refusals,
    scores_of,
)

TIED = {"tie_word_embeddings": True}


@pytest.mark.heavy
def test_compiled_without_the_keyword() -> None:
    """The model's own graph, unbroken."""
    torch._dynamo.reset()
    model, inputs = fastpref.fuse_lm_head(make()), batch()
    expected = model(**inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = compiled(**inputs)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.heavy
def test_compiled_with_the_keyword() -> None:
    """The backbone is, once."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = fastpref.fuse_lm_head(make("gemma2", final_logit_softcapping=2.0))
    compiled = torch.compile(model, backend=counter)
    frames = []
    for _ in range(3):
        inputs = batch()
        plain = model(**inputs)
        expected = gradients(plain.loss, model)
        output = compiled(**inputs, fused_lm_head=True)
        exact = scores_of(plain.logits, inputs["labels"])["log_probs"]
        torch.testing.assert_close(output.log_probs.double(), exact, rtol=1e-5, atol=1e-5)
        check_gradients(gradients(output.loss, model), expected)
        frames.append(counter.frame_count)
    assert counter.op_count > 50 and frames[0] == frames[-1]
    assert refusals(model) == ()


@pytest.mark.parametrize("first", ["fused first", "dispatched first"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_dispatched_by_accelerate(first: str, offloaded: bool) -> None:
    """Its hooks sit in ``forward``; an offloaded head has its weight only within it."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, inputs = make("phi").eval(), batch()
    exact = scores_of(model(**inputs).logits, inputs["labels"])["log_probs"]
    places = {"model": "cpu", "lm_head": "cpu"}
    if first == "fused first":
        fastpref.fuse_lm_head(model)
    if offloaded:
        accelerate.cpu_offload(model, execution_device="cpu")
        assert model.lm_head.weight.is_meta
    else:
        accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    fastpref.fuse_lm_head(model)
    with torch.no_grad():
        output = model(**inputs, fused_lm_head=True, outputs=("entropy",))
        torch.testing.assert_close(output.log_probs.double(), exact, rtol=1e-5, atol=1e-5)
        assert model(**inputs).logits.shape[-1] == model.config.vocab_size
    assert model.lm_head.weight.is_meta == offloaded
    assert refusals(model) == ()


def test_outputs_pass_through_accelerates_casts() -> None:
    """``convert_to_fp32`` and ``send_to_device`` make a new output of the same class."""
    operations = pytest.importorskip("accelerate.utils.operations")
    output = fastpref.fuse_lm_head(make().bfloat16())(**batch(), fused_lm_head=True)
    for made in (operations.convert_to_fp32(output), operations.send_to_device(output, "cpu")):
        assert type(made) is type(output) and made.keys() == output.keys()
        assert torch.equal(made.log_probs, output.log_probs)


def test_a_head_partitioned_by_zero3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weight and bias hold data only while they are gathered, in backward too."""
    import sys
    import types

    model, inputs = fastpref.fuse_lm_head(make("phi")), batch()
    head = model.get_output_embeddings()
    trained = [head.weight, head.bias, model.get_input_embeddings().weight]
    output = model(**inputs, fused_lm_head=True)
    expected = torch.autograd.grad(output.loss, trained)
    whole = {head.weight: head.weight.data, head.bias: head.bias.data}
    gathered = []

    @contextlib.contextmanager
    def gather(values: list[Tensor]) -> Iterator[None]:
        gathered.append(len(values))
        for value in values:
            value.data = whole[value]
        yield
        for value in values:
            value.data = torch.empty(0)

    fake = types.ModuleType("deepspeed")
    fake.zero = types.SimpleNamespace(GatheredParameters=gather)
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    integration = sys.modules["transformers.integrations.deepspeed"]
    monkeypatch.setattr(integration, "is_deepspeed_zero3_enabled", lambda: True)
    for value in whole:
        value.data = torch.empty(0)
    found = model(**inputs, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, output.log_probs)
    again = torch.autograd.grad(found.loss, trained)
    assert all(map(torch.equal, again, expected))
    assert gathered == [2, 2]


# Of two ranks: each scores its own batch, and the gradient is the mean of theirs.


def _batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(7)
    return [batch(), batch()]


def _mean_gradients(fields: dict[str, Any]) -> dict[str, Tensor]:
    model = make(**fields)
    both = [gradients(model(**inputs).loss, model) for inputs in _batches()]
    return {name: (both[0][name] + both[1][name]) / 2 for name in both[0]}


def _compare(rank: int, model: nn.Module, wrapped: nn.Module, fields: dict[str, Any]) -> None:
    expected = _mean_gradients(fields)
    for _ in range(2):  # the first measures
        # Before the forward: after it FSDP has whole parameters in place of its shards.
        wrapped.zero_grad()
        wrapped(**_batches()[rank], fused_lm_head=True, outputs=("entropy",)).loss.backward()
        found = {name: value.grad for name, value in model.named_parameters()}
        found = {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in found.items()
        }
        check_gradients(found, expected)
    assert refusals(model) == ()


def _ddp(rank: int, fields: dict[str, Any]) -> None:
    model = fastpref.fuse_lm_head(make(**fields))
    _compare(rank, model, DistributedDataParallel(model), fields)


def _fsdp2(rank: int, parts: str, fields: dict[str, Any]) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = make(**fields)
    if "fused first" in parts:
        fastpref.fuse_lm_head(model)
    if "head" in parts:
        fully_shard(model.lm_head, mesh=mesh)
    if "norm" in parts:
        fully_shard([model.model.norm, model.lm_head], mesh=mesh)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    fastpref.fuse_lm_head(model)
    _compare(rank, model, model, fields)


def _fsdp1(rank: int, separate: bool) -> None:
    model = fastpref.fuse_lm_head(make())
    place = {"device_id": torch.device("cpu"), "use_orig_params": True}
    if separate:
        model.lm_head = FullyShardedDataParallel(model.lm_head, **place)
    wrapped = FullyShardedDataParallel(model, **place)
    expected = _mean_gradients({})
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(**_batches()[rank], fused_lm_head=True).loss.backward()
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            found = {
                name.replace("_fsdp_wrapped_module.", ""): value.grad.clone()
                for name, value in wrapped.named_parameters()
            }
        check_gradients(found, expected)
    assert refusals(model) == ()


def _tensor_parallel(rank: int, architecture: str, fields: dict[str, Any]) -> None:
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    inputs = _batches()[0]
    whole = make(architecture, **fields)
    plain = whole(**inputs)
    expected = gradients(plain.loss, whole)
    model = fastpref.fuse_lm_head(make(architecture, **fields))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"lm_head": "colwise_gather_output", "lm_head.weight": "colwise"}
    if whole.lm_head.bias is not None:
        plan["lm_head.bias"] = "colwise"
    apply_tensor_parallelism(model, mesh, plan)
    assert isinstance(model.lm_head.weight, DTensor)
    output = model(**inputs, fused_lm_head=True, outputs=("entropy",))
    scores = scores_of(plain.logits, inputs["labels"])
    torch.testing.assert_close(output.log_probs.double(), scores["log_probs"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.entropy.double(), scores["entropy"], rtol=1e-5, atol=1e-5)
    found = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in gradients(output.loss, model).items()
    }
    check_gradients(found, expected)
    assert refusals(model) == ()


def _sharded_elsewhere(rank: int) -> str:
    """A head whose weight stays a shard within its forward."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fastpref.fuse_lm_head(make())
    weight = distribute_tensor(model.lm_head.weight.detach(), mesh, [Replicate()])
    model.lm_head.weight = nn.Parameter(weight)
    try:
        model(**batch(), fused_lm_head=True)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.heavy
@pytest.mark.parametrize("fields", [{}, TIED], ids=["", "tied"])
def test_ddp(two_ranks: Any, fields: dict[str, Any]) -> None:
    two_ranks(_ddp, fields)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("parts", "fields"),
    [
        ("root", {}),
        ("root", TIED),
        ("root, fused first", {}),
        ("head", {}),
        ("head, fused first", {}),
        ("norm", {}),
    ],
)
def test_fsdp2(two_ranks: Any, parts: str, fields: dict[str, Any]) -> None:
    """Where the head is a unit of its own, too: its weight is whole within its forward only."""
    two_ranks(_fsdp2, parts, fields)


@pytest.mark.heavy
@pytest.mark.parametrize("separate", [False, True])
def test_fsdp1(two_ranks: Any, separate: bool) -> None:
    two_ranks(_fsdp1, separate)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("llama", {}),
        ("phi", {"vocab_size": 161}),  # a bias, and ranks with more rows than others
        ("inkling_text", {"unpadded_vocab_size": 155}),
    ],
)
def test_tensor_parallel_heads(two_ranks: Any, architecture: str, fields: dict[str, Any]) -> None:
    """Each rank multiplies by its rows; no weight is gathered."""
    two_ranks(_tensor_parallel, architecture, fields)


@pytest.mark.heavy
def test_a_shard_within_the_heads_forward_is_refused(two_ranks: Any) -> None:
    for said in two_ranks(_sharded_elsewhere):
        assert "output head's weight is a DTensor" in said and "fully_shard" in said


def test_a_head_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A meta device stands for a second one: what a head on it is scored with is there, and what
    comes of it stays there."""
    devices: dict[str, Any] = {}

    def recording(hidden: Tensor, weight: Tensor, target: Tensor, **given: Any) -> Any:
        tensors = {"hidden": hidden, "weight": weight, "target": target, **given}
        devices.update({n: v.device.type for n, v in tensors.items() if isinstance(v, Tensor)})
        return TokenScores(torch.zeros(target.shape, device=weight.device, dtype=torch.float32))

    monkeypatch.setattr(scores, "linear_logprob", recording)
    model, inputs = fastpref.fuse_lm_head(make("phi"), check=False), batch()
    model.lm_head.to("meta")
    temperature = torch.ones(len(inputs["labels"]), 1)
    output = model(**inputs, fused_lm_head=True, temperature=temperature)
    names = ("hidden", "weight", "target", "bias", "temperature")
    assert devices == dict.fromkeys(names, "meta")
    found = (output.log_probs, output.label_mask, output.loss)
    assert {one.device.type for one in found} == {"meta"}
