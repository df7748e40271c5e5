# SPDX-License-Identifier: Apache-2.0
"""Runs a test file as a script on two gloo ranks.

The file calls ``main(compute)`` when it is run, and ``compute(rank)`` returns what the rank found.
"""

import contextlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)


def results(script, directory):
    """What each rank returned."""
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen([sys.executable, script, str(rank), directory]))
            for rank in range(2)
        ]
        for process in processes:
            stack.callback(process.kill)
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(2)]


def main(compute):
    rank, directory = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=TIMEOUT)
    torch.save(compute(rank), directory / f"rank{rank}.pt")
    # Nobody leaves while the other still talks to it. Not through the interpreter's end: torch's
    # own threads of the group may still be there, and then abort the process.
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
