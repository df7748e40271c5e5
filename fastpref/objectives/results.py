# SPDX-License-Identifier: Apache-2.0
"""What an objective returns: one named tuple a family. Only ``losses`` carries a gradient."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias, cast

from torch import Tensor

from .signature import POLICY_LOGPS, Unit


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

_RESULTS: Mapping[Unit, type[Any]] = {
    "pair": PairLosses,
    "unit": UnitLosses,
    "list": ListLosses,
    "token": TokenLosses,
}


def as_result(name: str, unit: Unit, returned: Any, logps: list[Any]) -> Losses:
    """What the function called ``name`` ``returned``, as the tuple of its family, detached but for
    the losses.

    Raises:
        TypeError, ValueError: it is no such tuple, nor bare losses, or these are not one a unit.
    """
    kind = _RESULTS[unit]
    if isinstance(returned, Tensor) and unit != "token":
        returned = (returned, *_log_ratios(logps, POLICY_LOGPS[unit]))
    if not isinstance(returned, tuple) or len(returned) != len(kind._fields):
        raise TypeError(
            f"{name} must return {kind.__name__}({', '.join(kind._fields)}), "
            f"got {type(returned).__name__}"
        )
    losses, *others = returned
    if losses.shape != logps[0].shape[:1]:
        raise ValueError(
            f"{name} must return one loss a {unit}, shape "
            f"{tuple(logps[0].shape[:1])}, not reduced; got {tuple(losses.shape)}"
        )
    detached = (None if value is None else value.detach() for value in others)
    return cast(Losses, kind(losses, *detached))


def _log_ratios(logps: list[Any], policy: int) -> list[Any]:
    """Policy minus reference; the policy's own log-probs where there is none."""
    references = logps[policy:] or [None] * policy
    pairs = zip(logps[:policy], references, strict=True)
    return [p if ref is None else p - ref for p, ref in pairs]
