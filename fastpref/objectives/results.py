# SPDX-License-Identifier: Apache-2.0
"""What an objective returns: one named tuple a family. Only ``losses`` carries a gradient."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias, cast

from torch import Tensor

from .signature import POLICY_LOGPS, Unit


class PairLosses(NamedTuple):
    """One loss a preference pair.

    - ``losses``: (P,). Differentiable.
    - ``chosen_rewards``: (P,). Detached.
    - ``rejected_rewards``: (P,). Detached.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class UnitLosses(NamedTuple):
    """One loss a response (or a segment of one).

    - ``losses``: (B,). Differentiable.
    - ``rewards``: (B,). Detached.
    """

    losses: Tensor
    rewards: Tensor


class ListLosses(NamedTuple):
    """One loss a ranked list of K responses.

    - ``losses``: (G,). Differentiable.
    - ``rewards``: (G, K), 0 where a response is absent. Detached.
    """

    losses: Tensor
    rewards: Tensor


class TokenLosses(NamedTuple):
    """One loss a response, made of per-token terms.

    - ``losses``: (B,). Differentiable.
    - ``ratio``: (B, T), the importance ratio, 0 where the mask is. Detached.
    - ``is_clipped``: (B, T) bool, whether the clip took the token's gradient away.
    - ``kl``: (B, T), an estimate of the divergence at each token, or None without a reference.
      Detached.
    """

    losses: Tensor
    ratio: Tensor
    is_clipped: Tensor
    kl: Tensor | None


Losses: TypeAlias = PairLosses | UnitLosses | ListLosses | TokenLosses

_RESULTS: Mapping[Unit, type[Any]] = {
    "pair": PairLosses,
    "unit": UnitLosses,
    "list": ListLosses,
    "token": TokenLosses,
}

_SHAPES: Mapping[Unit, str] = {"pair": "(P,)", "unit": "(B,)", "list": "(G,)", "token": "(B,)"}


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
        alone = "" if unit == "token" else f"; the losses alone, a {_SHAPES[unit]} tensor, will do"
        raise TypeError(
            f"{name} must return {kind.__name__}({', '.join(kind._fields)}), "
            f"got {type(returned).__name__}{alone}"
        )
    losses, *others = returned
    if not isinstance(losses, Tensor):
        raise TypeError(
            f"{name} must return losses as a {_SHAPES[unit]} tensor, one a {unit}, got "
            f"{type(losses).__name__}; leave them unreduced"
        )
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
