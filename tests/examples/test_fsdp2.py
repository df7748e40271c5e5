# SPDX-License-Identifier: Apache-2.0
"""The example on two processes: an update under FSDP2 and under DDP is one of all pairs, and
torchrun starts it."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.examples.loading import FOLDER, load, printed
from tests.ranks import Ranks

pytestmark = pytest.mark.heavy


def made() -> tuple[Any, Any, list[dict[str, Tensor]]]:
    """The example, its model, and batches of 5 and 2 pairs with their references."""
    example = load("fsdp2")
    torch.manual_seed(0)
    model = example.make_model()
    batches = [example.make_batch(pairs) for pairs in (5, 2)]
    for batch in batches:
        batch["ref_logps"] = -40 + torch.randn(batch["labels"].shape[0])
    return example, model, batches


def on_a_rank(rank: int, ddp: bool) -> tuple[float, dict[str, Tensor]]:
    """The loss, and what the weights lose: the gradient, as the learning rate is 1."""
    example, model, batches = made()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    module = example.wrap(model, ddp)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    loss = example.step(module, optimizer, [example.own_pairs(one, rank, 2) for one in batches])
    after: dict[str, Any] = dict(model.named_parameters())
    return loss.item(), {
        name: old - (one.full_tensor() if isinstance(one, DTensor) else one).detach()
        for (name, old), one in zip(before.items(), after.values(), strict=True)
    }


@pytest.mark.parametrize("ddp", [False, True])
def test_an_update_is_one_of_all_pairs(two_ranks: Ranks, ddp: bool) -> None:
    example, model, batches = made()
    losses = []
    for batch in batches:
        ids, first = batch["input_ids"], example.PROMPT - 1
        logps = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        ratio = logps[:, first:].sum(1) - batch["ref_logps"]
        chosen, rejected = ratio.chunk(2)
        losses.append(torch.nn.functional.softplus(0.5 * (rejected - chosen)))
    want = torch.cat(losses).mean()
    want.backward()
    for loss, lost in two_ranks(on_a_rank, ddp):
        assert loss == pytest.approx(want.item(), rel=1e-5)
        for name, value in model.named_parameters():
            torch.testing.assert_close(lost[name], value.grad, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", [[], ["--ddp"]])
def test_torchrun(way: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(FOLDER / "fsdp2.py"), *way]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    losses = printed(ran.stdout, "loss")
    assert len(losses) == 4 and losses == sorted(losses, reverse=True) and losses[-1] < 0.3
