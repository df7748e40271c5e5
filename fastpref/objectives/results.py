# SPDX-License-Identifier: Apache-2.0
"""What an objective returns: one named tuple a family. Only ``losses`` carries a gradient."""

from typing import NamedTuple, TypeAlias

from torch import Tensor


class PairLosses(NamedTuple):
    """One loss a preference pair."""

    losses: Tensor  # (P,)
    chosen_rewards: Tensor  # (P,) detached
    rejected_rewards: Tensor  # (P,) detached


class UnitLosses(NamedTuple):
    """One loss a response (or a segment of one)."""

    losses: Tensor  # (B,)
    rewards: Tensor  # (B,) detached


class ListLosses(NamedTuple):
    """One loss a ranked list of K responses."""

    losses: Tensor  # (G,)
    rewards: Tensor  # (G, K) detached


class TokenLosses(NamedTuple):
    """One loss a response, made of per-token terms."""

    losses: Tensor  # (B,)
    ratio: Tensor  # (B, T) importance ratio, detached
    is_clipped: Tensor  # (B, T) bool
    kl: Tensor | None  # (B, T) detached; None without a reference


Losses: TypeAlias = PairLosses | UnitLosses | ListLosses | TokenLosses
