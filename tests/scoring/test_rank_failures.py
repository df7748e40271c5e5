# SPDX-License-Identifier: Apache-2.0
"""A rank that raises where no collective tells the others: they raise too, once its process ends,
or after the group's timeout where it lives on."""

import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fastpref import linear_logprob
from fastpref.scoring import forward
from tests.ranks import Ranks

pytestmark = pytest.mark.heavy

N, H, V = 12, 6, 40


def score(rank: int, group: dist.ProcessGroup) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)[rank * 20 : rank * 20 + 20]
    return linear_logprob(hidden, weight, torch.arange(N), tp_group=group).logp.sum()


def no_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("planted")


def second_call(rank: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The first one succeeds; in this one the second rank is out of memory."""
    score(rank, group)
    if rank == 0:
        return score(rank, group)
    with mock.patch.object(forward, "_room", no_memory):
        return score(rank, group)


def run_as_process(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=30),  # torch's own
    )
    try:
        second_call(rank, dist.group.WORLD)
    finally:
        print("raised at", time.time(), flush=True)


def test_a_process_that_ends(tmp_path: Path) -> None:
    code = (
        "import sys; from tests.ranks import run_to_the_end; "
        "from tests.scoring.test_rank_failures import run_as_process; "
        "run_to_the_end(run_as_process, int(sys.argv[1]), sys.argv[2])"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, raised = ranks[1].communicate(timeout=600)
        ended = time.time()
        said, peer = ranks[0].communicate(timeout=600)
    finally:
        for one in ranks:
            one.kill()
    assert ranks[1].returncode == 1 and "under tp_group all ranks must run alike" in raised
    assert ranks[0].returncode != 0 and "RuntimeError" in peer and "peer" in peer
    # Not when it ended: on a loaded machine the interpreter's own exit may take as long.
    assert float(said.split()[-1]) - ended < 60


def lives_on(rank: int) -> tuple[str, float]:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=4))
    began = time.monotonic()
    try:
        second_call(rank, group)
    except RuntimeError as error:  # which OutOfMemoryError is
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "nothing raised", 0.0


def test_a_process_that_lives_on(two_ranks: Ranks) -> None:
    (peer, waited), (raised, _) = two_ranks(lives_on)
    assert raised.startswith("OutOfMemoryError: planted")
    assert peer.startswith("RuntimeError: ") and "imed out" in peer and waited < 60
