# SPDX-License-Identifier: Apache-2.0
"""What a preference loss returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .layouts import Arrangement, Halves, Indexed, Interleaved, Lists, Units


class _Fields(NamedTuple):
    loss: Tensor
    losses: Tensor
    rewards: Tensor
    logps: Tensor
    ref_logps: Tensor | None
    metrics: dict[str, Tensor]


class PreferenceOutput(_Fields):
    """What ``preference_loss`` returns.

    - ``loss``: 0-dim, or one a unit with ``reduction="none"``. Differentiable.
    - ``losses``: one a unit, (P,), (B,) or (G,). Detached.
    - ``rewards``: (B,), in row order. Detached.
    - ``logps``: (B,), the policy's sums in row order. Differentiable.
    - ``ref_logps``: (B,), or None without a reference. Detached.
    - ``metrics``: 0-dim tensors by the names that TRL logs. Detached.

    It keeps its layout where it is copied, pickled, or rebuilt from its class and fields, as
    Accelerate, DDP and torch's trees do: each layout has a subclass.
    """

    # Which rows are chosen. It lies in the class: a framework that moves or casts the fields of a
    # named tuple builds it again as type(x)(*fields), and knows of nothing else.
    arrangement: Arrangement | None = None

    @property
    def chosen_logps(self) -> Tensor:
        """(P,), of pairs."""
        return self._side(self.logps, 0)

    @property
    def rejected_logps(self) -> Tensor:
        """(P,), of pairs."""
        return self._side(self.logps, 1)

    @property
    def chosen_rewards(self) -> Tensor:
        """(P,), of pairs."""
        return self._side(self.rewards, 0)

    @property
    def rejected_rewards(self) -> Tensor:
        """(P,), of pairs."""
        return self._side(self.rewards, 1)

    def _side(self, rows: Tensor, side: int) -> Tensor:
        if self.arrangement is None:
            raise AttributeError(
                "this output was made of six fields and knows no layout; take chosen and rejected "
                "rows from what preference_loss returned, or rebuild that as type(output)(*fields)"
            )
        gathered = any(isinstance(one, Tensor) and one.dim() for one in self.metrics.values())
        if gathered and not isinstance(self.arrangement, Interleaved):
            raise AttributeError(
                "this output was gathered from several ranks or devices, whose rows follow each "
                "other; take chosen and rejected rows before that, or use layout='interleaved'"
            )
        sides = self.arrangement.split(rows)
        if len(sides) != 2:
            raise AttributeError("chosen and rejected rows are those of a pairwise objective")
        return sides[side]


class HalvesOutput(PreferenceOutput):
    """Chosen rows first."""

    arrangement = Halves()


class InterleavedOutput(PreferenceOutput):
    """Each chosen row before its rejected one."""

    arrangement = Interleaved()


class UnpairedOutput(PreferenceOutput):
    """No row is chosen."""

    arrangement = Units()


class IndexedOutput(PreferenceOutput):
    """Pairs by an index tensor: its class is made for it, and holds the tensor."""

    def _replace(self, **changes: Any) -> Any:
        return output_of(self.arrangement, *(self._asdict() | changes).values())

    def __reduce__(self) -> tuple[Any, ...]:
        return output_of, (self.arrangement, *self)


_CLASSES: Mapping[type, type[PreferenceOutput]] = {
    type(None): PreferenceOutput,
    Halves: HalvesOutput,
    Interleaved: InterleavedOutput,
    Lists: UnpairedOutput,
    Units: UnpairedOutput,
}


def output_of(arrangement: Arrangement | None, *fields: Any) -> PreferenceOutput:
    """Of six fields, and which rows are compared where that is known."""
    if not isinstance(arrangement, Indexed):
        return _CLASSES[type(arrangement)](*fields)
    if torch.compiler.is_compiling():  # which traces no class; it is lost to type(x)(*fields)
        made = IndexedOutput(*fields)
        made.arrangement = arrangement
        return made
    own = type(IndexedOutput.__name__, (IndexedOutput,), {"arrangement": arrangement})
    return cast(PreferenceOutput, own(*fields))
