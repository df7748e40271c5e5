# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters outside the forward of their module: every functional call refuses them and
says what to do."""

import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

import fastpref
from fastpref.nn import FusedLinearDPOLoss, FusedLinearJSDLoss
from tests.ranks import Ranks

V, H = 11, 4
REMEDY = "run the loss inside the forward of the module that owns it, as fastpref.fuse_lm_head"

CALLS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Any]] = {
    "linear_logprob": lambda hidden, weight, whole, ids: fastpref.linear_logprob(
        hidden, weight, ids
    ),
    "explain": lambda hidden, weight, whole, ids: fastpref.explain(hidden, weight, ids),
    "restrict_to": lambda hidden, weight, whole, ids: fastpref.linear_logprob(
        hidden, weight, ids, restrict_to=ids[..., None]
    ),
    "linear_logits": lambda hidden, weight, whole, ids: fastpref.linear_logits(
        hidden, weight, ids[..., None]
    ),
    "sparse_divergence": lambda hidden, weight, whole, ids: fastpref.sparse_divergence(
        hidden, weight, ids[..., None], torch.full((*ids.shape, 1), -0.5)
    ),
    "linear_divergence": lambda hidden, weight, whole, ids: fastpref.linear_divergence(
        hidden, weight, hidden, whole
    ),
    "a teacher": lambda hidden, weight, whole, ids: fastpref.linear_divergence(
        hidden, whole, hidden, weight
    ),
    "preference_loss": lambda hidden, weight, whole, ids: fastpref.preference_loss(
        hidden, weight, ids, "cpo"
    ),
    "a reference": lambda hidden, weight, whole, ids: fastpref.preference_loss(
        hidden, whole, ids, "dpo", ref_hidden=hidden, ref_weight=weight
    ),
    "a module": lambda hidden, weight, whole, ids: FusedLinearDPOLoss(use_ref_model=False)(
        weight, hidden, ids
    ),
    "a module of two": lambda hidden, weight, whole, ids: FusedLinearJSDLoss()(
        hidden[0], weight, hidden[0], whole, ids[0]
    ),
}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One rank, whose shard is all."""
    path: Path = tmp_path_factory.mktemp("rank") / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(path), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def fsdp2(mesh: Any) -> Tensor:
    return fully_shard(nn.Linear(H, V), mesh=mesh).weight


def fsdp2_gathered(mesh: Any) -> Tensor:
    weight: Any = fsdp2(mesh)
    whole: Tensor = weight.full_tensor()
    return whole


def fsdp2_cast(mesh: Any) -> Tensor:
    return fsdp2_gathered(mesh).to(torch.bfloat16)


def zero3(mesh: Any) -> Tensor:
    """With the fields that DeepSpeed puts on a partitioned parameter."""
    weight: Any = nn.Parameter(torch.randn(V, H))
    weight.ds_id, weight.ds_shape = 0, weight.shape
    weight.ds_status = types.SimpleNamespace(name="NOT_AVAILABLE")
    weight.data = torch.empty(0)
    partitioned: Tensor = weight
    return partitioned


WAYS = {
    fsdp2: r"got a DTensor",
    fsdp2_gathered: r"got full_tensor\(\) of a DTensor.*grad_placements",
    fsdp2_cast: r"got full_tensor\(\) of a DTensor.*grad_placements",
    zero3: r"got a partitioned ZeRO-3 parameter without data.*weight_context",
}


@pytest.mark.parametrize("shard", WAYS, ids=lambda shard: shard.__name__)
@pytest.mark.parametrize("call", CALLS)
def test_is_refused(call: str, shard: Callable[[Any], Tensor], mesh: Any) -> None:
    check_refused(call, shard(mesh), WAYS[shard])


def check_refused(call: str, weight: Tensor, said: str) -> None:
    """Also where the same call was served before with all of the weight."""
    hidden, ids = torch.randn(2, 3, H), torch.randint(V, (2, 3))
    whole = torch.randn(V, H, requires_grad=True)
    CALLS[call](hidden, whole.view_as(whole), whole, ids)  # no Parameter, as FSDP's views
    with pytest.raises(ValueError, match=f"(?s)weight must be .*{said}") as caught:
        CALLS[call](hidden, weight, whole, ids)
    assert REMEDY in str(caught.value)


def flat(rank: int) -> None:
    """Of FSDP1 a rank may have no element of the weight, or some, or a view without memory."""
    place = {"device_id": torch.device("cpu")}
    parts = FullyShardedDataParallel(nn.Linear(H, V, bias=False), use_orig_params=True, **place)
    freed = FullyShardedDataParallel(nn.Linear(H, V, bias=False), **place)
    freed(torch.randn(3, H)).sum().backward()
    for call in CALLS:
        check_refused(call, parts.module.weight, r"this rank's part of a parameter that FSDP has")
        check_refused(call, freed.module.weight, r"got \(11, 4\) whose memory FSDP has freed")


@pytest.mark.heavy
def test_flat_parameters_are_refused(two_ranks: Ranks) -> None:
    two_ranks(flat)


def test_what_says_where_its_gradient_goes_is_served(mesh: Any) -> None:
    """And what has no gradient, and a rank's own rows."""
    hidden, ids = torch.randn(2, 3, H), torch.randint(V, (2, 3))
    weight: Any = nn.Parameter(distribute_tensor(torch.randn(V, H), mesh, [Shard(0)]))
    want = fastpref.linear_logprob(hidden, weight.detach().to_local(), ids).logp
    given = [
        weight.full_tensor(grad_placements=[Partial("avg")]),
        weight.full_tensor(grad_placements=[Replicate()]),
        weight.to_local(),
        weight.detach().full_tensor(),
    ]
    for one in given:
        assert torch.equal(fastpref.linear_logprob(hidden, one, ids).logp, want)


def test_hidden_states_may_have_been_gathered(mesh: Any) -> None:
    """Those of sequence parallelism are the same on every rank."""
    spread: Any = distribute_tensor(torch.randn(2, 3, H), mesh, [Shard(1)]).requires_grad_()
    ids, weight = torch.randint(V, (2, 3)), torch.randn(V, H)
    found = fastpref.linear_logprob(spread.full_tensor(), weight, ids).logp
    want = fastpref.linear_logprob(spread.detach().to_local(), weight, ids).logp
    assert torch.equal(found.detach(), want)
    with pytest.raises(ValueError, match=r"hidden must be .*DTensor.*hidden\.full_tensor\(\)"):
        fastpref.linear_logprob(spread, weight, ids)
