# SPDX-License-Identifier: Apache-2.0
"""How much memory a device has for this process: on CPU that of the machine, or what the container
or the batch system allows, which Linux keeps in the files of control groups."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch


def total_memory(device: torch.device) -> int:
    """Bytes; of a CPU as they were at the first call, so that equal calls have equal plans."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return _cpu_memory()


@functools.cache
def _cpu_memory() -> int:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = container_limit()
    return machine if limit is None else min(machine, limit)


class _Hierarchy(NamedTuple):
    """Of control groups, as it is mounted."""

    kind: str  # cgroup or cgroup2: of version 1 or 2
    root: PurePosixPath  # the group that lies at the mount point
    mount: PurePosixPath


# A group's limit is in this file; "max" or a number near 2^63 where it has none.
_LIMIT = {"cgroup": "memory.limit_in_bytes", "cgroup2": "memory.max"}


def container_limit(files: Path = Path("/")) -> int | None:
    """Least limit in bytes of this process's control groups and of those around them; None where
    there is none. ``files`` is the root of the file system."""
    try:
        groups = list(_groups((files / "proc/self/cgroup").read_text()))
        mounted = list(_mounted((files / "proc/self/mountinfo").read_text()))
    except (OSError, ValueError):
        return None
    found = [
        limit
        for kind, group in groups
        for one in mounted
        if one.kind == kind
        for limit in _limits(files, one, group)
    ]
    return min(found, default=None)


def _groups(text: str) -> Iterator[tuple[str, PurePosixPath]]:
    """This process's, of each version. Lines are number:controllers:path, 0::path for version 2."""
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            yield "cgroup2", PurePosixPath(path)
        elif "memory" in controllers.split(","):
            yield "cgroup", PurePosixPath(path)


def _mounted(text: str) -> Iterator[_Hierarchy]:
    """Lines are ``id parent device root mount options [more] - kind source options``."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        (_, _, _, root, mount, *_), (kind, _, options) = before.split(" "), after.split(" ")
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            yield _Hierarchy(kind, PurePosixPath(root), PurePosixPath(mount))


def _limits(files: Path, hierarchy: _Hierarchy, group: PurePosixPath) -> Iterator[int]:
    # A container may see its own group as "/", or by a path of the host's that it has not mounted:
    # what lies at the mount point holds it then.
    inside = PurePosixPath()
    if group.is_relative_to(hierarchy.root) and ".." not in group.parts:
        inside = group.relative_to(hierarchy.root)
    top = files / hierarchy.mount.relative_to("/")
    for folder in (inside, *inside.parents):
        try:
            text = (top / folder / _LIMIT[hierarchy.kind]).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and 0 < int(text) < 1 << 62:
            yield int(text)
