# SPDX-License-Identifier: Apache-2.0
"""The processes that two-rank tests share: what they return, and what becomes of failures."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.ranks import Ranks, backends, device

pytestmark = pytest.mark.heavy


def total(rank: int, share: float) -> tuple[int, torch.Tensor]:
    value = torch.tensor([share * (rank + 1)], dtype=torch.float64)
    dist.all_reduce(value)
    return os.getpid(), value


def where(rank: int, gpus: int) -> tuple[str, str]:
    """What one GPU more or less changes once the group is there: nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: gpus)
        value = torch.ones(1, dtype=torch.float64, device=device())
        dist.all_reduce(value)
        return str(device().type), f"{value.item():.0f}"


def on_the_second(rank: int, fault: str) -> None:
    if rank == 1 and fault == "raises":
        raise KeyError("planted")
    if rank == 1 and fault == "dies":
        os._exit(3)
    if rank == 1 and fault == "hangs":
        time.sleep(600)
    dist.barrier()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2) as both:
        yield both


def test_each_returns_its_own_from_one_pair_of_processes(ranks: Ranks) -> None:
    first, second = ranks(total, 1.0), ranks(total, 0.5)
    assert [value.item() for _, value in first] == [3, 3]
    assert [value.item() for _, value in second] == [1.5, 1.5]
    pids = [pid for pid, _ in first]
    assert pids == [pid for pid, _ in second] and len({*pids, os.getpid()}) == 3


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raises", r"(?s)rank 1: Traceback.*in on_the_second.*KeyError: 'planted'"),
        pytest.param("dies", "rank 1: ended with status 3", marks=pytest.mark.slow),
        pytest.param("hangs", "rank 1: no answer", marks=pytest.mark.slow),
    ],
)
def test_a_failure_is_reported_and_the_next_call_gets_a_fresh_pair(
    fault: str, said: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [pid for pid, _ in ranks(total, 1.0)]
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match=said):
        if fault == "hangs":
            patch.setattr(ranks, "timeout", 2.0)
        ranks(on_the_second, fault)
    assert not any(Path(f"/proc/{pid}").exists() for pid in before)
    assert not {pid for pid, _ in ranks(total, 1.0)} & set(before)


def test_gpus_decide_the_backend(ranks: Ranks) -> None:
    assert [backends(gpus, 2) for gpus in (0, 1, 2, 8)] == [
        "gloo",
        "gloo",
        "cpu:gloo,cuda:nccl",
        "cpu:gloo,cuda:nccl",
    ]
    kind = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    for gpus in (0, 8):
        assert ranks(where, gpus) == [(kind, "2"), (kind, "2")]


def in_a_mesh(rank: int) -> tuple[float, float, str | None]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    sums = []
    for name in ("dp", "tp"):
        value = torch.tensor([10.0**rank], dtype=torch.float64)
        dist.all_reduce(value, group=mesh.get_group(name))
        sums.append(value.item())
    return sums[0], sums[1], os.environ.get("OMP_NUM_THREADS")


def test_four_make_a_mesh(four_ranks: Ranks) -> None:
    assert four_ranks(in_a_mesh) == [
        (101, 11, "1"),
        (1010, 11, "1"),
        (101, 1100, "1"),
        (1010, 1100, "1"),
    ]


def test_a_pair_that_died_between_calls_is_replaced(ranks: Ranks) -> None:
    for pid, _ in ranks(total, 1.0)[1:]:
        os.kill(pid, 9)
    time.sleep(0.2)
    assert [value.item() for _, value in ranks(total, 1.0)] == [3, 3]


ENDING = """
import atexit
from tests.ranks import run_to_the_end
atexit.register(print, "finalised")
run_to_the_end({function}, "written")
"""


@pytest.mark.parametrize(("function", "status"), [("print", 0), ("int", 1)])
def test_a_process_that_runs_to_the_end(function: str, status: int) -> None:
    """What it printed arrives, and nothing of the interpreter's finalisation runs."""
    code = ENDING.format(function=function)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == status and "finalised" not in ran.stdout
    assert ran.stdout == ("" if status else "written\n")
    assert ("ValueError: invalid literal" in ran.stderr) == bool(status)
