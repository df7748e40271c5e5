# SPDX-License-Identifier: Apache-2.0
"""What a preference loss returns."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .layouts import Arrangement


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
    """

    # Beside the six of the tuple: it says which rows are chosen.
    arrangement: Arrangement | None = None

    def __new__(
        cls,
        loss: Tensor,
        losses: Tensor,
        rewards: Tensor,
        logps: Tensor,
        ref_logps: Tensor | None,
        metrics: dict[str, Tensor],
        arrangement: Arrangement | None = None,
    ) -> PreferenceOutput:
        made = super().__new__(cls, loss, losses, rewards, logps, ref_logps, metrics)
        made.arrangement = arrangement
        return made

    def _replace(self, **changes: Any) -> PreferenceOutput:
        return PreferenceOutput(**(self._asdict() | changes), arrangement=self.arrangement)

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
                "an output that was rebuilt from its fields no longer knows its layout; take "
                "chosen and rejected rows from what preference_loss returned"
            )
        sides = self.arrangement.split(rows)
        if len(sides) != 2:
            raise AttributeError("chosen and rejected rows are those of a pairwise objective")
        return sides[side]
