# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a vocabulary-sharded head must have in common, compared at the first call.

Ranks tell each other how many rows of the head they hold, what memory they have, and a digest of
everything that decides which collectives a call makes. They do so in one collective, once for each
head and signature: no later call of the same makes another.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .head import Shard
from .types import AS_IT_IS

# Signatures of one group; one that comes back after as many others is compared again. The same on
# every rank, as each has seen the same sequence of them.
MOST = 1024
NO_START = -1

# The layout of what is sent must stay as it is, so that other versions can be told that they are.
_WORDS = 7
_FAILED, _VERSION, _DIGEST, _COLUMNS, _START, _MEMORY, _WIDENS = range(_WORDS)


class Own(NamedTuple):
    """Of this rank."""

    columns: int
    start: int | None = None  # first vocabulary id; None: after those of the ranks before
    memory: int = 0  # bytes
    widens: bool = False  # as in ``Plan``


class Agreed(NamedTuple):
    """The same on every rank but for the shard's start."""

    shard: Shard
    columns: tuple[int, ...]  # of each rank
    memory: int  # that every rank has
    widens: bool  # whether any must

    @classmethod
    def alone(cls, own: Own) -> Agreed:
        """Where the vocabulary is not sharded."""
        shard = Shard(own.start or 0, own.columns, own.columns)
        return cls(shard, (own.columns,), own.memory, own.widens)


class _Seen:
    """By one group."""

    def __init__(self) -> None:
        self.found: dict[tuple[Any, ...], tuple[int, Agreed, StorageWeakRef]] = {}
        self.count = 0

    def keep(self, key: tuple[Any, ...], agreed: Agreed, head: StorageWeakRef) -> None:
        self.found[key] = self.count, agreed, head
        self.count += 1
        if len(self.found) > MOST:
            oldest = self.count - MOST
            self.found = {key: one for key, one in self.found.items() if one[0] >= oldest}


NOTHING: Mapping[str, object] = {}
# What the ranks of groups that share no vocabulary have found to be alike.
_ALIKE: WeakKeyDictionary[dist.ProcessGroup, set[tuple[Any, ...]]] = WeakKeyDictionary()
_SEEN: WeakKeyDictionary[dist.ProcessGroup, _Seen] = WeakKeyDictionary()


def agree(
    group: dist.ProcessGroup,
    weight: Tensor,
    own: Own,
    common: Mapping[str, object],
    now: Mapping[str, object] = NOTHING,
) -> Agreed:
    """What the ranks of ``group`` hold of the head whose rows here are ``weight``.

    Args:
        common: by name, what must be alike on every rank.
        now: the same, of what changes from call to call: it is compared where something in
            ``common`` is new, and not for its own sake.

    Raises:
        ValueError: ranks differ, or their vocabulary ranges overlap or leave ids out.
        RuntimeError: another rank's arguments were refused, or it makes no such call.
    """
    seen = _SEEN.get(group) or _Seen()
    # The weight beside the sizes: ranks must agree on what is new, and another head may have as
    # many rows here and more of them elsewhere. Its storage is not freed for as long as the weak
    # reference lives, so that no other one gets its address.
    storage = weight.untyped_storage()
    head = StorageWeakRef(storage)
    key = (storage._cdata, own, *common.items())
    known = seen.found.get(key)
    if known is not None:
        return known[1]
    found = _compared(group, own, {**common, **now}, weight.device, "tp_group")
    agreed = _shards(group, found)
    seen = _SEEN[group]
    seen.keep(key, agreed, head)
    return agreed


def compare(
    group: dist.ProcessGroup | None,
    name: str,
    common: Mapping[str, object],
    now: Mapping[str, object],
    device: torch.device,
) -> None:
    """As ``agree``, for the ranks of another group that is called ``name``."""
    if group is None:
        return
    alike = _ALIKE.setdefault(group, set())
    key = (name, *common.items())
    if key not in alike:
        _compared(group, Own(0), {**common, **now}, device, name)
        alike.add(key)


def _compared(
    group: dist.ProcessGroup, own: Own, told: Mapping[str, object], device: torch.device, name: str
) -> list[list[int]]:
    """What every rank says of itself, where all say alike what must be."""
    _SEEN.setdefault(group, _Seen())
    versions = _versions()
    words = [0] * _WORDS
    words[_VERSION], words[_DIGEST] = _digest(versions), _digest(told)
    words[_COLUMNS], words[_MEMORY], words[_WIDENS] = own.columns, own.memory, int(own.widens)
    words[_START] = NO_START if own.start is None else own.start
    table = _gathered(group, words, device, name)
    failed = [rank for rank, row in enumerate(table) if row[_FAILED]]
    if failed:
        _raise_of_others(group, failed, _exchanged(group, None), name)
    if any(row[at] != table[0][at] for row in table for at in (_VERSION, _DIGEST)):
        _raise_difference(group, _exchanged(group, {**versions, **told}), name)
    return table


def refused_together(group: Any, name: str = "tp_group") -> contextlib.AbstractContextManager[None]:
    """What is raised within before the first call of ``group`` has agreed is raised on its other
    ranks too, which are told in the collective that they wait in. Later calls make none where
    nothing is new, so that a rank that raises there must end."""
    if group is None or not isinstance(group, dist.ProcessGroup) or torch.compiler.is_compiling():
        return AS_IT_IS
    return _refused_together(group, name)


@contextlib.contextmanager
def _refused_together(group: dist.ProcessGroup, name: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        if group not in _SEEN:
            _SEEN[group] = _Seen()
            words = [0] * _WORDS
            words[_FAILED] = 1
            _gathered(group, words, _device(group), name)
            _exchanged(group, f"{type(error).__name__}: {error}")
        raise


def _versions() -> dict[str, object]:
    from .. import __version__

    return {"version of fastpref": __version__, "version of torch": torch.__version__}


def _digest(values: Mapping[str, object]) -> int:
    """63 bits."""
    told = hashlib.blake2b(repr(sorted(values.items())).encode(), digest_size=8).digest()
    return int.from_bytes(told, "little") >> 1


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where a group communicates, for a rank whose tensors are no guide."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _gathered(
    group: dist.ProcessGroup, words: list[int], device: torch.device, name: str
) -> list[list[int]]:
    """``words`` of every rank."""
    own = torch.tensor(words, dtype=torch.int64, device=device)
    found = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(found, own, group=group)
        return [one.tolist() for one in found]
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank()} did not meet the other ranks of its {name} "
            f"({_ranks(group)}) in its first call: each of them must make the same call, with a "
            "group of the same ranks"
        ) from error


def _ranks(group: dist.ProcessGroup) -> str:
    return ", ".join(map(str, dist.get_process_group_ranks(group)))


def _exchanged(group: dist.ProcessGroup, told: object) -> list[Any]:
    """Where it is known that all of them raise."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, told, group=group)
    return found


def _raise_of_others(
    group: dist.ProcessGroup, failed: list[int], told: list[Any], name: str
) -> None:
    ranks = dist.get_process_group_ranks(group)
    said = "; ".join(f"rank {ranks[at]}: {told[at]}" for at in failed)
    raise RuntimeError(f"other ranks of {name} refused their arguments: {said}")


def _raise_difference(group: dist.ProcessGroup, told: list[Any], group_name: str) -> None:
    ranks = dist.get_process_group_ranks(group)
    shown = [{name: repr(value) for name, value in one.items()} for one in told]
    names = dict.fromkeys(itertools.chain.from_iterable(shown))
    said = []
    for name in names:
        of_rank = [one.get(name, "nothing") for one in shown]
        if len(set(of_rank)) > 1:
            said.append(name + ": " + ", ".join(_by_value(ranks, of_rank)))
    raise ValueError(
        f"the ranks of {group_name} must make the same call, and differ in {'; '.join(said)}. Pass "
        "the same on every rank"
    )


def _by_value(ranks: list[int], values: list[str]) -> Iterator[str]:
    for value in dict.fromkeys(values):
        own = [str(rank) for rank, one in zip(ranks, values, strict=True) if one == value]
        yield f"{value} on rank{'s' * (len(own) > 1)} {', '.join(own)}"


def _shards(group: dist.ProcessGroup, table: list[list[int]]) -> Agreed:
    columns = [row[_COLUMNS] for row in table]
    before = [0, *itertools.accumulate(columns)]
    given = [row[_START] for row in table]
    starts = [at if own == NO_START else own for own, at in zip(given, before, strict=False)]
    _check_ranges(group, starts, columns)
    own = dist.get_rank(group)
    return Agreed(
        Shard(starts[own], sum(columns), max(columns)),
        tuple(columns),
        min(row[_MEMORY] for row in table),
        any(row[_WIDENS] for row in table),
    )


def _check_ranges(group: dist.ProcessGroup, starts: list[int], columns: list[int]) -> None:
    ranks = dist.get_process_group_ranks(group)
    ranges = sorted(
        (start, start + count, rank)
        for start, count, rank in zip(starts, columns, ranks, strict=True)
    )
    for (_, stop, rank), (start, _, other) in itertools.pairwise(ranges):
        if start != stop:
            shown = ", ".join(f"rank {rank} [{a}, {b})" for a, b, rank in ranges)
            what = "overlap" if start < stop else "leave ids out"
            raise ValueError(
                f"vocab_range: the vocabulary ids of ranks {rank} and {other} {what}; the ranks of "
                f"tp_group hold {shown}. Their ranges must follow on one another: pass "
                "vocab_range=(start, stop) of each rank's own rows, without padding"
            )
