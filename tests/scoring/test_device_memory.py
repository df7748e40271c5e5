# SPDX-License-Identifier: Apache-2.0
"""The memory that budgets are a share of: the machine's, or the container's limit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastpref import explain
from fastpref.scoring import memory
from fastpref.scoring.memory import container_limit, total_memory
from fastpref.scoring.plan import BUDGET_SHARE

GIB = 1 << 30
V2 = "0::{}\n"
V1 = "12:pids:/other\n4:cpu,memory:{}\n0::/\n"
UNIFIED = "30 24 0:26 {} {} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
MEMORY = "35 31 0:32 {} {} rw,nosuid - cgroup cgroup rw,memory\n"
OTHERS = """\
24 1 259:1 / / rw - ext4 /dev/root rw
36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
"""


def tree(
    root: Path, group: str, mounts: str, limits: dict[str, str], where: str = "sys/fs/cgroup"
) -> Path:
    """A file system of control groups, and its root."""
    files = {f"{where}/{name}": text for name, text in limits.items()}
    files |= {"proc/self/cgroup": group, "proc/self/mountinfo": OTHERS + mounts}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


UNIFIED_HERE = UNIFIED.format("/", "/sys/fs/cgroup")
MEMORY_HERE = MEMORY.format("/", "/sys/fs/cgroup/memory")
NONE_V1 = "9223372036854771712\n"


@pytest.mark.parametrize(
    "group, mounts, limits, expected",
    [
        (V2.format("/"), UNIFIED_HERE, {"memory.max": f"{2 * GIB}\n"}, 2 * GIB),
        (V2.format("/"), UNIFIED_HERE, {"memory.max": "max\n"}, None),
        (V2.format("/"), UNIFIED_HERE, {}, None),
        # The machine's root group has no file.
        (V2.format("/a/b"), UNIFIED_HERE, {"a/b/memory.max": "3\n"}, 3),
        # The groups around it bind it as well.
        (
            V2.format("/a/b/c"),
            UNIFIED_HERE,
            {"a/memory.max": f"{GIB}\n", "a/b/memory.max": "max", "a/b/c/memory.max": f"{4 * GIB}"},
            GIB,
        ),
        (
            V2.format("/a/b"),
            UNIFIED_HERE,
            {"a/memory.max": f"{4 * GIB}", "a/b/memory.max": f"{GIB}", "a/x/memory.max": "1"},
            GIB,
        ),
        (
            V1.format("/job/step"),
            MEMORY_HERE,
            {
                "memory/memory.limit_in_bytes": NONE_V1,
                "memory/job/memory.limit_in_bytes": f"{5 * GIB}\n",
                "memory/job/step/memory.limit_in_bytes": NONE_V1,
            },
            5 * GIB,
        ),
        (V1.format("/"), MEMORY_HERE, {"memory/memory.limit_in_bytes": NONE_V1}, None),
        # A container without a namespace of its own: the host's path, mounted from there on.
        (
            V1.format("/docker/ab12/inner"),
            MEMORY.format("/docker/ab12", "/sys/fs/cgroup/memory"),
            {
                "memory/memory.limit_in_bytes": f"{6 * GIB}",
                "memory/inner/memory.limit_in_bytes": f"{2 * GIB}",
            },
            2 * GIB,
        ),
        # Outside of what is mounted, or above the namespace.
        (
            V1.format("/docker/ab12"),
            MEMORY.format("/elsewhere", "/sys/fs/cgroup/memory"),
            {"memory/memory.limit_in_bytes": f"{6 * GIB}"},
            6 * GIB,
        ),
        (
            V2.format("/../../a"),
            UNIFIED_HERE,
            {"memory.max": f"{GIB}", "../../a/memory.max": "1"},
            GIB,
        ),
        # Both versions at once, the memory of one of them.
        (
            V1.format("/a"),
            UNIFIED.format("/", "/sys/fs/cgroup/unified") + MEMORY_HERE,
            {"memory/a/memory.limit_in_bytes": f"{GIB}"},
            GIB,
        ),
        ("garbled\n", UNIFIED_HERE, {"memory.max": f"{GIB}"}, None),
    ],
    ids=[
        *("a limit", "max", "no file", "the root group has none", "the group around", "its own"),
        *("version 1", "a huge number", "a container's mount", "not mounted", "above", "both"),
        "unknown lines",
    ],
)
def test_limits(
    tmp_path: Path, group: str, mounts: str, limits: dict[str, str], expected: int | None
) -> None:
    assert container_limit(tree(tmp_path, group, mounts, limits)) == expected


def test_a_hierarchy_may_be_mounted_anywhere(tmp_path: Path) -> None:
    mounts = UNIFIED.format("/", "/mnt/groups")
    made = tree(tmp_path, V2.format("/a"), mounts, {"a/memory.max": "77"}, "mnt/groups")
    assert container_limit(made) == 77


def test_without_control_groups(tmp_path: Path) -> None:
    assert container_limit(tmp_path) is None


@pytest.fixture
def remembered_anew():
    memory._cpu_memory.cache_clear()
    yield
    memory._cpu_memory.cache_clear()


@pytest.mark.usefixtures("remembered_anew")
@pytest.mark.parametrize("limit", [None, 3 * GIB // 2, 1 << 61])
def test_the_budget_is_a_share_of_what_the_container_has(
    monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(memory, "container_limit", lambda: limit)
    expected = min(machine, limit or machine)
    assert total_memory(torch.device("cpu")) == expected
    # A size of its own: plans are kept.
    rows = 40 + (limit or 0) % 7
    hidden, weight = torch.randn(rows, 9), torch.randn(51, 9)
    plan = explain(hidden, weight, torch.arange(rows))
    assert plan.memory_budget == expected // BUDGET_SHARE
    # Later changes do not count.
    monkeypatch.setattr(memory, "container_limit", lambda: 12345)
    assert total_memory(torch.device("cpu")) == expected
