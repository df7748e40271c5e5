# SPDX-License-Identifier: Apache-2.0
"""The loss on the last stage of a pipeline, micro-batch by micro-batch."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from fastpref import preference_loss
from tests.parallel.policies import PAIRS, VOCABULARY, check, make_policy, whole_batch
from tests.ranks import Ranks


class First(nn.Module):
    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.embed, self.layer = policy.embed, policy.layer

    def forward(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.embed(ids)
        return embedded + torch.tanh(self.layer(embedded))


class Last(nn.Module):
    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.norm, self.head = policy.norm, policy.head

    def forward(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.norm(hidden)
        return normed


def loss_of(hidden: Tensor, labels: Tensor, head: Any, **given: Any) -> Tensor:
    return preference_loss(
        hidden[:, :-1],
        head.weight,
        labels[:, 1:],
        "simpo",
        layout="interleaved",
        bias=head.bias,
        **given,
    ).loss


def whole_gradients() -> dict[str, Tensor]:
    policy, batch = make_policy().double(), whole_batch()
    hidden = Last(policy)(First(policy)(batch["ids"]))
    loss_of(hidden, batch["labels"], policy.head).backward()
    return {name: value.grad for name, value in policy.named_parameters()}


def on_a_rank(rank: int, kind: Any, micro_batches: int) -> None:
    policy, batch = make_policy(), whole_batch()
    module = Last(policy) if rank else First(policy)
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        return loss_of(hidden, labels, policy.head, denominator=PAIRS)

    # Each loss is a share of the whole batch's already.
    schedule = kind(stage, micro_batches, loss_fn=loss, scale_grads=False)
    if rank:
        schedule.step(target=batch["labels"])
    else:
        schedule.step(batch["ids"])
    expected = whole_gradients()
    own = {name: value.grad for name, value in policy.named_parameters() if value.grad is not None}
    assert set(own) == {
        name for name in expected if name.startswith(("norm", "head")) == bool(rank)
    }
    check(own, {name: expected[name] for name in own})
    dist.barrier()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "micro_batches"),
    [(ScheduleGPipe, 4), (Schedule1F1B, 4), pytest.param(Schedule1F1B, 2, marks=pytest.mark.slow)],
)
def test_micro_batches_as_the_whole_batch(two_ranks: Ranks, kind: Any, micro_batches: int) -> None:
    two_ranks(on_a_rank, kind, micro_batches)


@pytest.mark.parametrize("micro_batches", [3, 8])
def test_a_pair_that_would_be_split(micro_batches: int) -> None:
    """As the schedules cut a batch."""
    hidden, labels = torch.randn(2 * PAIRS, 9, 16), whole_batch()["labels"]
    head = nn.Linear(16, VOCABULARY)
    parts = zip(hidden.tensor_split(micro_batches), labels.tensor_split(micro_batches), strict=True)
    with pytest.raises(ValueError, match=r"interleaved.*even.*got [13]; cut micro-batches between"):
        for part in parts:
            loss_of(*part, head, denominator=PAIRS)
