# SPDX-License-Identifier: Apache-2.0
"""DPO with a head whose vocabulary is spread over the processes:

    torchrun --nproc-per-node 2 examples/tensor_parallel.py    # or by python, on one

Every process runs the same body on the same tokens and holds some rows of the head; no process
ever has all of them, nor any logits. What is trained on every process alike, here the body, gets
the same gradient on each. For DTensor heads (``ColwiseParallel``) pass the parameter as it is.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpref import PreferenceOutput, preference_loss

VOCABULARY, HIDDEN, PAIRS, LENGTH, STEPS = 101, 32, 4, 12, 20


class Model(nn.Module):
    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        torch.manual_seed(0)  # the same on every process
        self.body = nn.Sequential(
            nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Tanh()
        )
        whole = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.rows = nn.Parameter(whole.weight[start:stop].detach().clone())


def loss_of(model: Model, ids: Tensor, ref_logps: Tensor | None = None) -> PreferenceOutput:
    """Of pairs, chosen rows first."""
    hidden, target = model.body(ids[:, :-1]), ids[:, 1:]
    ref = torch.zeros(len(ids), dtype=torch.float32) if ref_logps is None else ref_logps
    return preference_loss(
        hidden, model.rows, target, "dpo", ref_logps=ref, tp_group=dist.group.WORLD, beta=0.5
    )


def main() -> list[float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    # Ranks may hold different numbers of rows, which follow on one another in rank order.
    edges = [VOCABULARY * one // world for one in range(world + 1)]
    model = Model(edges[rank], edges[rank + 1])
    ids = torch.randint(VOCABULARY, (2 * PAIRS, LENGTH))  # the same on every process, as seeded
    with torch.no_grad():
        reference = loss_of(model, ids).logps
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(STEPS):
        output = loss_of(model, ids, reference)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
        if rank == 0:
            print(f"loss {losses[-1]:.4f} accuracy {output.metrics['rewards/accuracies']:.2f}")
    return losses


if __name__ == "__main__":
    # On GPUs: backend="nccl", and tensors on torch.device("cuda", rank).
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **({} if dist.is_torchelastic_launched() else alone))
    main()
    # A thread of gloo lets go of the last collective's tensors later, which the interpreter's end
    # would abort; a barrier has none.
    dist.barrier()
    dist.destroy_process_group()
