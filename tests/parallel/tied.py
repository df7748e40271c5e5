# SPDX-License-Identifier: Apache-2.0
"""One of two processes that train a policy whose head is its embedding, under DDP and under FSDP2,
and end by themselves: ``python -m tests.parallel.tied RANK STORE``."""

import faulthandler
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from tests.parallel.policies import PAIRS, make_policy, rows_of, whole_batch
from tests.parallel.test_data_parallel import Case, wrapped
from tests.ranks import run_to_the_end

STEPS = 3
TIMEOUT = 600.0  # seconds, of the process group: whoever starts the processes notices first


def train(rank: int, wrapper: str) -> list[float]:
    """The gradient's norm at each step."""
    policy = make_policy(tied=True)
    module = wrapped(Case(wrapper), policy)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    part, norms = rows_of(whole_batch(), rank * PAIRS // 2, (rank + 1) * PAIRS // 2), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        module(part, denominator=PAIRS / 2).backward()
        norms.append(float(nn.utils.get_total_norm([one.grad for one in module.parameters()])))
        optimizer.step()
    return norms


def main(rank: int, store: str) -> None:
    faulthandler.register(signal.SIGTERM, chain=True)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT),
    )
    for wrapper in ("ddp", "fsdp2"):
        print(wrapper, *(f"{norm:.4f}" for norm in train(rank, wrapper)), flush=True)


if __name__ == "__main__":
    run_to_the_end(main, int(sys.argv[1]), sys.argv[2])
