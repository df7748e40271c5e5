# SPDX-License-Identifier: Apache-2.0
"""The example's training on two processes, against one with the whole head; and as it is run."""

import math
import socket
import subprocess
import sys

import pytest

from tests.examples.loading import FOLDER, load, printed
from tests.ranks import Ranks

pytestmark = pytest.mark.heavy


def on_a_rank(rank: int) -> list[float]:
    return load("tensor_parallel").main()


def test_as_one_process(two_ranks: Ranks) -> None:
    one = load("tensor_parallel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one.dist, "get_rank", lambda: 0)
        patch.setattr(one.dist, "get_world_size", lambda: 1)
        whole = one.main()
    assert whole[0] == pytest.approx(math.log(2)) and whole[-1] < 0.1
    for losses in two_ranks(on_a_rank):
        assert losses == pytest.approx(whole, rel=1e-4)


@pytest.mark.slow
def test_by_torchrun() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    ran = subprocess.run(
        [*launch, str(FOLDER / "tensor_parallel.py")], capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    losses = printed(ran.stdout, "loss")
    assert len(losses) == 20 and losses[-1] < 0.1
