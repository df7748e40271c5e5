# SPDX-License-Identifier: Apache-2.0
"""TRL's fused head, patched, and fastpref's own under FSDP, FSDP2 and tensor parallelism, on two
ranks of which one has no scored token: gradients of one process with both."""

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastpref
from fastpref.integrations import trl as integration
from tests.integrations.causal_lm.models import make
from tests.integrations.trl.runs import RELEASE
from tests.parallel.causal_lms import ROWS, count, expected, gradients, own_part, whole_batch
from tests.parallel.policies import check
from tests.ranks import Ranks

pytest.importorskip("trl", reason='TRL is not installed (pip install "fastpref[trl]")')
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(RELEASE < (1, 16), reason="stock runs on GPUs only, or has other heads"),
]

BIASED = "phi"


def shard(model: Any, head: str, mesh: DeviceMesh, **policy: Any) -> None:
    if head == "alone":
        fully_shard(model.lm_head, mesh=mesh, **policy)
    if head == "with norm":
        norm = getattr(model.model, "norm", None) or model.model.final_layernorm
        fully_shard([norm, model.lm_head], mesh=mesh, **policy)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **policy)
    fully_shard(model, mesh=mesh, **policy)


def put_head(model: Any, how: str) -> None:
    if how == "fused":
        fastpref.fuse_lm_head(model)
        return
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)


def patch_of(how: str) -> contextlib.AbstractContextManager[None]:
    return integration.patched() if how == "patched" else contextlib.nullcontext()


def in_parts(
    rank: int,
    how: str,
    head: str,
    architecture: str,
    ranks: tuple[int, ...],
    error: float = 1e-6,
    deferred: bool = True,
    **policy: Any,
) -> None:
    """FSDP2 over a mesh of ``ranks``, in two steps, of which the second alone may reduce where it
    is ``deferred``."""
    model = make(architecture)
    put_head(model, how)
    names = ("replicate", "shard")[-len(ranks) :]
    shard(model, head, init_device_mesh("cpu", ranks, mesh_dim_names=names), **policy)
    rows = own_part(rank)
    with patch_of(how):
        for row in range(ROWS // 2):
            model.set_requires_gradient_sync(not deferred or row == ROWS // 2 - 1)
            given = {name: value[row : row + 1] for name, value in rows.items()}
            given["num_items_in_batch"] = count() / dist.get_world_size()
            model(**given, fused_lm_head=True).loss.backward()
    check(gradients(model), expected(architecture), error)


def in_one(rank: int, how: str, wrapper: str) -> None:
    """DDP, or FSDP1."""
    model = make()
    put_head(model, how)
    module: Any = model
    if wrapper == "ddp":
        module = DistributedDataParallel(model)
    else:
        place: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": True}
        if wrapper == "fsdp1, alone":
            model.lm_head = FullyShardedDataParallel(model.lm_head, **place)
        module = FullyShardedDataParallel(model, **place)
    with patch_of(how):
        items = count() / dist.get_world_size()
        module(**own_part(rank), fused_lm_head=True, num_items_in_batch=items).loss.backward()
    whole = contextlib.nullcontext()
    if wrapper != "ddp":
        whole = FullyShardedDataParallel.summon_full_params(module, with_grads=True)
    with whole:
        found = {
            name.replace("_fsdp_wrapped_module.", "").removeprefix("module."): one.grad
            for name, one in module.named_parameters()
        }
        check(found, expected("llama"))


def everywhere(rank: int) -> None:
    for how in ("patched", "fused"):
        for head in ("root", "with norm", "alone"):
            in_parts(rank, how, head, "llama", (2,))
        in_parts(rank, how, "alone", BIASED, (1, 2))
        in_parts(rank, how, "alone", BIASED, (2, 1))
        in_one(rank, how, "ddp")
        in_one(rank, how, "fsdp1")
    in_one(rank, "fused", "fsdp1, alone")


def test_as_one_process(two_ranks: Ranks) -> None:
    two_ranks(everywhere)


def under_policies(rank: int) -> None:
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    offloaded = CPUOffloadPolicy(pin_memory=False)
    for how in ("patched", "fused"):
        for head in ("root", "with norm", "alone"):
            # Of a group whose module is never called, as TRL's head is not, FSDP2 itself fails to
            # look for a gradient to be reduced in another dtype later on.
            deferred = (how, head) != ("patched", "alone")
            in_parts(rank, how, head, "llama", (2,), 4e-2, deferred, mp_policy=low)
            in_parts(rank, how, head, "llama", (2,), offload_policy=offloaded)


@pytest.mark.slow
def test_mixed_precision_and_offload(two_ranks: Ranks) -> None:
    two_ranks(under_policies)


def flat_head(rank: int) -> str:
    try:
        in_one(rank, "patched", "fsdp1, alone")
    except ValueError as error:
        return str(error)
    return ""


def test_a_flat_head_alone_is_refused(two_ranks: Ranks) -> None:
    """TRL reads it outside its forward, where FSDP1 has no weight."""
    for said in two_ranks(flat_head):
        assert "that FSDP has flattened; run the loss inside the forward" in said


def with_rows_of_a_head(rank: int) -> None:
    """Tensor parallelism: all ranks have all tokens."""
    model = make()
    put_head(model, "patched")
    mesh = init_device_mesh("cpu", (2,))
    rows = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)])
    model.lm_head.weight = torch.nn.Parameter(rows)
    with integration.patched():
        output = model(**whole_batch(), fused_lm_head=True, num_items_in_batch=count())
        output.loss.backward()
    check(gradients(model), expected("llama"))


def test_tensor_parallel(two_ranks: Ranks) -> None:
    two_ranks(with_rows_of_a_head)


# Distillation's divergence is given the heads themselves.


def divergence_arguments() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    return {
        "student_hidden_states": draw(ROWS, 3, 8),
        "teacher_hidden_states": draw(ROWS, 3, 6),
        "student_lm_head_weight": draw(21, 8),
        "teacher_lm_head_weight": draw(21, 6),
        "student_lm_head_bias": draw(21),
        "completion_mask": torch.ones(ROWS, 3, dtype=torch.int64),
    }


def divergence_gradients(given: dict[str, Any], items: float) -> list[Tensor]:
    from trl.trainer import distillation_trainer

    names = ("student_lm_head_weight", "student_lm_head_bias")
    leaves = [given[name].requires_grad_() for name in names]
    given["student_hidden_states"].requires_grad_()
    loss, *_ = distillation_trainer._chunked_divergence_loss(
        **given, beta=0.5, num_items_in_batch=items
    )
    loss.backward()
    return [leaf.grad for leaf in leaves]


def distilled(rank: int) -> None:
    mesh, given = init_device_mesh("cpu", (2,)), divergence_arguments()
    want = divergence_gradients(divergence_arguments(), 12.0)
    for name, value in given.items():
        if "lm_head" in name:
            given[name] = distribute_tensor(value, mesh, [Shard(0)])
        else:
            given[name] = value[rank * 3 : rank * 3 + 3] if rank == 0 else value[3:]
    with integration.patched():
        found = divergence_gradients(given, 12.0 / 2)
    for got, one in zip(found, want, strict=True):
        assert isinstance(got, DTensor)
        torch.testing.assert_close(got.full_tensor(), one, rtol=1e-5, atol=1e-6)


def test_distillation_with_sharded_heads(two_ranks: Ranks) -> None:
    two_ranks(distilled)
