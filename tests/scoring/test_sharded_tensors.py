# SPDX-License-Identifier: Apache-2.0
"""Heads that torch.distributed.tensor shards: accepted over exactly the ranks of ``tp_group``, with
the hidden gradient summed here or by the framework, and refused otherwise."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fastpref import linear_divergence, linear_logits, linear_logprob, preference_loss
from tests.ranks import Ranks, device

pytestmark = pytest.mark.heavy

N, H, V = 12, 6, 42  # not a multiple of four


def drawn(where: str | torch.device = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(where)

    return {
        "hidden": draw(N, H).requires_grad_(),
        "weight": draw(V, H).requires_grad_(),
        "bias": draw(V).requires_grad_(),
        "other": draw(V, H),
        "target": torch.randint(V, (N,), generator=generator).to(where),
    }


def loss_of(given: dict[str, Any], name: str, **changes: Any) -> Tensor:
    hidden, weight, bias, target = (given[one] for one in ("hidden", "weight", "bias", "target"))
    if name == "logprob":
        scores = linear_logprob(
            hidden, weight, target, bias=bias, outputs=("logp", "entropy"), **changes
        )
        return (scores.logp + scores.entropy).square().sum()
    if name == "logits":
        ids = target[:, None]
        return linear_logits(hidden, weight, ids, bias=bias, **changes).square().sum()
    if name == "divergence":
        teacher = given["plain"] if "plain" in given else hidden
        other, biases = given["other"], {"student_bias": bias}
        value = linear_divergence(hidden, weight, teacher.detach(), other, **biases, **changes)
        return value.square().sum()
    rows = hidden if isinstance(hidden, DTensor) else hidden.view(4, 3, H)
    return preference_loss(rows, weight, target.view(4, 3), "simpo", bias=bias, **changes).loss


NAMES = ("logprob", "logits", "divergence", "preference")


def of_whole(name: str) -> dict[str, Tensor]:
    given = drawn()
    loss = loss_of(given, name)
    wanted = ("hidden", "weight", "bias")
    gradients = torch.autograd.grad(loss, [given[one] for one in wanted])
    return {"loss": loss.detach(), **dict(zip(wanted, gradients, strict=True))}


def sharded(rank: int, kind: str) -> dict[str, dict[str, Tensor]]:
    """``kind`` says what hidden is, and who sums its gradient."""
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    found = {}
    for name in NAMES:
        given = drawn(device())
        leaf = given["hidden"]
        for one in ("weight", "bias", "other"):
            local = distribute_tensor(given[one].detach(), mesh, [Shard(0)])
            given[one] = local.requires_grad_(one != "other")
        given["plain"] = leaf
        changes: dict[str, Any] = {"tp_group": mesh.get_group()}
        if kind == "replicated":
            own = leaf.view(4, 3, H) if name == "preference" else leaf
            given["hidden"] = DTensor.from_local(own, mesh, [Replicate()])
        if kind == "summed by the framework":
            own = DTensor.from_local(leaf, mesh, [Replicate()])
            given["hidden"] = own.to_local(grad_placements=[Partial()])
            changes["reduce_hidden_grad"] = False
        loss = loss_of(given, name, **changes)
        loss.backward()
        found[name] = {"loss": loss.detach(), "hidden": leaf.grad}
        for one in ("weight", "bias"):
            assert given[one].grad.placements == (Shard(0),)
            found[name][one] = given[one].grad.full_tensor()
    return found


@pytest.mark.parametrize("kind", ["plain", "replicated", "summed by the framework"])
def test_as_one_process(kind: str, four_ranks: Ranks) -> None:
    ranks = four_ranks(sharded, kind)
    for name in NAMES:
        for key, want in of_whole(name).items():
            for found in ranks:
                torch.testing.assert_close(
                    found[name][key], want, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
                )


class Scoring(nn.Linear):
    """A head whose forward scores targets, under ``ColwiseParallel``, which hands on hidden alone:
    replicated, its gradient to be summed."""

    target: Tensor
    group: Any

    def forward(self, hidden: Any) -> Tensor:
        assert isinstance(hidden, DTensor) and isinstance(self.weight, DTensor)
        given = hidden, self.weight, self.target
        logp = linear_logprob(*given, bias=self.bias, tp_group=self.group).logp
        # What goes out is the same everywhere, and not columns of logits.
        return DTensor.from_local(logp, hidden.device_mesh, [Replicate()], run_check=False)


def colwise(rank: int) -> dict[str, Tensor]:
    given, mesh = drawn(device()), init_device_mesh(device().type, (dist.get_world_size(),))
    head = Scoring(H, V, dtype=torch.float64, device=device())
    head.load_state_dict({one: given[one].detach() for one in ("weight", "bias")})
    head.target, head.group = given["target"], mesh.get_group()
    parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()))
    loss = head(given["hidden"]).square().sum()
    loss.backward()
    gradients = {one: getattr(head, one).grad.full_tensor() for one in ("weight", "bias")}
    return {"loss": loss.detach(), "hidden": given["hidden"].grad, **gradients}


def test_colwise_parallel(two_ranks: Ranks) -> None:
    given = drawn()
    scores = linear_logprob(given["hidden"], given["weight"], given["target"], bias=given["bias"])
    loss = scores.logp.square().sum()
    loss.backward()
    for found in two_ranks(colwise):
        torch.testing.assert_close(found["loss"], loss.detach())
        for one in ("hidden", "weight", "bias"):
            torch.testing.assert_close(found[one], given[one].grad, msg=one)


REFUSED = {
    "columns": r"weight is a DTensor placed \(Shard\(dim=1\),\), expected \(Shard\(dim=0\),\)",
    "replicated": r"weight is a DTensor placed \(Replicate\(\),\).*redistribute",
    "another mesh": r"weight is a DTensor over the mesh \[\[0, 1\], \[2, 3\]\], expected .*ranks",
    "hidden": r"hidden is a DTensor placed \(Shard\(dim=0\),\), expected \(Replicate\(\),\)",
    "no group": "weight must be a plain tensor, got a DTensor.*tp_group",
}


def refused(rank: int, name: str) -> str:
    given, world = drawn(device()), dist.get_world_size()
    mesh = init_device_mesh(device().type, (2, 2) if name == "another mesh" else (world,))
    placements: list[Any] = {
        "columns": [Shard(1)],
        "replicated": [Replicate()],
        "another mesh": [Shard(0), Shard(0)],
    }.get(name, [Shard(0)])
    weight = distribute_tensor(given["weight"].detach(), mesh, placements)
    hidden: Tensor = given["hidden"].detach()
    if name == "hidden":
        hidden = distribute_tensor(hidden, mesh, [Shard(0)])
    try:
        group = None if name == "no group" else dist.group.WORLD
        linear_logprob(hidden, weight, given["target"], tp_group=group)
    except ValueError as error:
        return str(error)
    return "nothing raised"


@pytest.mark.parametrize("name", REFUSED)
def test_other_placements_and_meshes(name: str, four_ranks: Ranks) -> None:
    for said in four_ranks(refused, name):
        with pytest.raises(ValueError, match=REFUSED[name]):
            raise ValueError(said)
