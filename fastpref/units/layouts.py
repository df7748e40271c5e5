# SPDX-License-Identifier: Apache-2.0
"""Which rows of a batch an objective compares: pairs, lists, or each row by itself.

halves        rows 0 to P - 1 are chosen, row P + p is rejected against row p (TRL's order)
interleaved   row 2 p is chosen, row 2 p + 1 rejected
(P, 2)        an index tensor: the rows of each pair, chosen first
groups        each ``group_size`` rows in turn are a list
units         every row by itself
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from ..objectives import Objective
from ..objectives.checks import hint, is_integer
from ..objectives.reading import readable

LayoutName: TypeAlias = Literal["halves", "interleaved", "groups", "units"]
LAYOUTS: tuple[LayoutName, ...] = ("halves", "interleaved", "groups", "units")


class Arrangement(Protocol):
    """B rows as the arguments of a family, and back."""

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """(B, ...) -> one tensor for each log-probability of the policy that the family takes."""

    def join(self, *parts: Tensor) -> Tensor:
        """The inverse: values by unit -> (B,). A row in no unit gets 0."""


@dataclass(frozen=True, slots=True)
class Halves:
    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.chunk(2) if len(rows) else (rows, rows)

    def join(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class Interleaved:
    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows[0::2], rows[1::2]

    def join(self, *parts: Tensor) -> Tensor:
        return torch.stack(parts, dim=1).flatten()


@dataclass(frozen=True, slots=True)
class Indexed:
    pairs: Tensor  # (P, 2) int64
    rows: int

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        pairs = self.pairs.to(rows.device)
        return rows[pairs[:, 0]], rows[pairs[:, 1]]

    def join(self, *parts: Tensor) -> Tensor:
        values = torch.cat(parts)
        return values.new_zeros(self.rows).scatter(0, self.pairs.t().flatten(), values)


@dataclass(frozen=True, slots=True)
class Lists:
    size: int

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows.unflatten(0, (len(rows) // self.size, self.size)),)

    def join(self, *parts: Tensor) -> Tensor:
        return parts[0].flatten()


@dataclass(frozen=True, slots=True)
class Units:
    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows,)

    def join(self, *parts: Tensor) -> Tensor:
        return parts[0]


def arrange(
    layout: LayoutName | Tensor, group_size: int | None, rows: int, objective: Objective
) -> Arrangement:
    """The arrangement of ``rows`` rows for ``objective``.

    Raises:
        TypeError, ValueError: where the layout is none, or does not fit the rows or the objective.
    """
    _check_layout(layout, group_size)
    if objective.unit in ("unit", "token"):
        return Units()
    if objective.unit == "list":
        return _lists(layout, group_size, rows, objective.name)
    if isinstance(layout, Tensor):
        return Indexed(_checked_pairs(layout, rows), rows)
    if layout in ("groups", "units"):
        raise ValueError(
            f"layout must say which rows {objective.name} compares, got {layout!r}; pass 'halves', "
            "'interleaved', or a (P, 2) tensor of rows"
        )
    if rows % 2:
        raise ValueError(
            f"layout={layout!r} makes pairs of an even number of rows, got {rows}; cut "
            "micro-batches between pairs, and pass a (P, 2) tensor of rows where some are in none"
        )
    return Halves() if layout == "halves" else Interleaved()


def _check_layout(layout: LayoutName | Tensor, group_size: int | None) -> None:
    if not isinstance(layout, Tensor | str) or (isinstance(layout, str) and layout not in LAYOUTS):
        rows = isinstance(layout, Sequence) and not isinstance(layout, str)
        remedy = "; pass torch.tensor([...])" if rows else hint(layout, LAYOUTS)
        raise ValueError(
            f"layout must be {', '.join(map(repr, LAYOUTS))} or a (P, 2) tensor of rows, "
            f"got {layout!r}{remedy}"
        )
    grouped = not isinstance(layout, Tensor) and layout == "groups"
    if grouped == (group_size is None):
        raise ValueError(
            f"group_size and layout='groups' come together, got group_size={group_size!r} and "
            f"layout={'a tensor' if isinstance(layout, Tensor) else repr(layout)}"
        )
    if group_size is not None and not is_integer(group_size):
        raise TypeError(f"group_size must be an int, got {type(group_size).__name__}")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")


def _lists(
    layout: LayoutName | Tensor, group_size: int | None, rows: int, name: str
) -> Arrangement:
    if group_size is None:
        raise ValueError(f"{name} compares lists: pass layout='groups' and group_size")
    if rows % group_size:
        raise ValueError(
            f"group_size must divide the number of rows, got {group_size} and {rows} rows; cut "
            "micro-batches between lists, fill short ones up and pass extras={'mask': ...}, False "
            "for what is filled in"
        )
    return Lists(int(group_size))


def _checked_pairs(pairs: Tensor, rows: int) -> Tensor:
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"layout as a tensor must be (P, 2), got {tuple(pairs.shape)}")
    if pairs.is_floating_point() or pairs.dtype == torch.bool:
        raise TypeError(f"layout as a tensor must hold integers, got {pairs.dtype}")
    if readable(pairs) and pairs.numel() and (int(pairs.min()) < 0 or int(pairs.max()) >= rows):
        raise ValueError(
            f"layout must name rows from 0 to {rows - 1}, got {int(pairs.min())} to "
            f"{int(pairs.max())}"
        )
    return pairs.long()
