# SPDX-License-Identifier: Apache-2.0
"""A vocabulary spread over two ranks, and pairs over two such groups: tensor parallelism within
FSDP2 and within DDP on a 2 x 2 mesh, against one process with the whole batch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastpref
from fastpref import preference_loss
from tests.parallel.policies import (
    PAIRS,
    VOCABULARY,
    check,
    expected_gradients,
    make_policy,
    rows_of,
    whole_batch,
)
from tests.ranks import Ranks

pytestmark = pytest.mark.heavy
ROWS = -(-VOCABULARY // 2)  # of the first rank; the second has one less


def mesh_of_four() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("pairs", "vocabulary"))


class Spread(nn.Module):
    """A policy with this rank's rows of its head."""

    def __init__(self, group: Any, rank: int) -> None:
        super().__init__()
        self.policy, self.group = make_policy(), group
        rows = slice(rank * ROWS, (rank + 1) * ROWS)
        head: Any = self.policy.head
        head.weight = nn.Parameter(head.weight[rows].detach().clone())
        head.bias = nn.Parameter(head.bias[rows].detach().clone())

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        policy, labels = self.policy, batch["labels"]
        embedded = policy.embed(batch["ids"])
        hidden = policy.norm(embedded + torch.tanh(policy.layer(embedded)))
        return preference_loss(
            hidden[:, :-1],
            policy.head.weight,
            labels[:, 1:],
            "dpo",
            layout="interleaved",
            bias=policy.head.bias,
            ref_logps=batch["ref_logps"],
            denominator=PAIRS / 2,
            tp_group=self.group,
        ).loss


def under_ddp(rank: int) -> None:
    mesh = mesh_of_four()
    part, column = mesh.get_coordinate()
    module = Spread(mesh.get_group("vocabulary"), column)
    wrapped = DistributedDataParallel(module, process_group=mesh.get_group("pairs"))
    batch = rows_of(whole_batch(), *((0, 3), (3, PAIRS))[part])
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(batch).backward()
    expected = expected_gradients()
    for name in ("head.weight", "head.bias"):
        expected[name] = expected[name][column * ROWS : (column + 1) * ROWS]
    check({name: value.grad for name, value in module.policy.named_parameters()}, expected)


def within_fsdp2(rank: int) -> None:
    """Of a transformers model, whose head is sharded by rows and then, in them, by FSDP2."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    from tests.integrations.causal_lm.models import make, refusals
    from tests.parallel import causal_lms as lms

    mesh = mesh_of_four()
    part, _ = mesh.get_coordinate()
    rows = slice(2 * part, 2 * part + 2)
    for head_alone in (False, True):
        model = fastpref.fuse_lm_head(make())
        plan = {"lm_head": "colwise_gather_output", "lm_head.weight": "colwise"}
        apply_tensor_parallelism(model, mesh["vocabulary"], plan)
        if head_alone:
            fully_shard(model.lm_head, mesh=mesh["pairs"])
        fully_shard(model, mesh=mesh["pairs"])
        given = {name: value[rows] for name, value in lms.whole_batch().items()}
        for _ in range(2):
            model.zero_grad()
            items = lms.count() / 2
            model(**given, fused_lm_head=True, num_items_in_batch=items).loss.backward()
        check(lms.gradients(model), lms.expected("llama"))
        assert refusals(model) == ()


def test_tensor_parallel_under_ddp(four_ranks: Ranks) -> None:
    four_ranks(under_ddp)


@pytest.mark.slow
def test_tensor_parallel_within_fsdp2(four_ranks: Ranks) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    four_ranks(within_fsdp2)
