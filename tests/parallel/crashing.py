# SPDX-License-Identifier: Apache-2.0
"""One of two processes that train under DDP: ``python -m tests.parallel.crashing RANK STORE HOW``.
In its second step rank 1 raises in the loss, or in the backward pass of a policy of NaN, which
torch's anomaly mode looks for, or is killed there."""

import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch._dynamo  # which DDP takes long to import, while its peer waits
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.parallel.policies import PAIRS, make_policy, rows_of, whole_batch
from tests.ranks import run_to_the_end

TIMEOUT = 30.0  # seconds, of the process group


def kill(gradient: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(rank: int, store: str, how: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT),
    )
    policy = make_policy()
    module = DistributedDataParallel(policy)
    part = rows_of(whole_batch(), rank * PAIRS // 2, (rank + 1) * PAIRS // 2)
    module(part, denominator=PAIRS / 2).backward()
    print("a step", flush=True)
    dist.barrier()
    if rank == 1 and how == "raises":
        part["labels"] = part["labels"].float()
    if rank == 1 and how == "killed":
        policy.norm.weight.register_hook(kill)
    if rank == 1 and how == "nan":
        policy.norm.weight.data.fill_(torch.nan)
        torch.autograd.set_detect_anomaly(True)
    began = time.monotonic()
    try:
        module(part, denominator=PAIRS / 2).backward()
    except RuntimeError as error:
        print(f"after {time.monotonic() - began:.1f} s: {error}", flush=True)
        raise


if __name__ == "__main__":
    run_to_the_end(main, int(sys.argv[1]), sys.argv[2], sys.argv[3])
