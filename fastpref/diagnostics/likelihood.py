# SPDX-License-Identifier: Apache-2.0
"""Where probability goes in a training: likelihood displacement (Razin et al., arXiv:2410.08847)
and the three monitors of "3D-Properties" (arXiv:2406.07327)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .checks import check_floats, wide


class Likelihoods(NamedTuple):
    """Summed log-probabilities under one model.

    - ``chosen``: (P,).
    - ``rejected``: (P,).
    - ``unseen``: (M,), of responses that the training does not see, or None.
    """

    chosen: Tensor
    rejected: Tensor
    unseen: Tensor | None = None


@dataclass(frozen=True)
class Displacement:
    """Of "3D-Properties" the three quantities, as means in nats; not its theory, nor its regulated
    losses, of which ``flex_dpo`` is in the objectives.

    - ``chosen_drop``: by how much chosen responses have become less likely; negative: more.
    - ``rejected_drop``: the same of rejected ones.
    - ``dispersion``: by how much unseen ones have become more likely, or None without any.
    - ``chosen_fell``: share of pairs whose chosen response has become less likely: displaced.
    - ``both_fell``: share of pairs of which both have.
    """

    chosen_drop: float
    rejected_drop: float
    dispersion: float | None
    chosen_fell: float
    both_fell: float


def displacement(
    before: Likelihoods | tuple[Tensor, ...], after: Likelihoods | tuple[Tensor, ...]
) -> Displacement:
    """What became of the likelihoods of the same responses.

    Args:
        before, after: (chosen, rejected) or (chosen, rejected, unseen) under the model before and
            after: the reference and the policy, say.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    first, second = _likelihoods("before", before), _likelihoods("after", after)
    if (first.unseen is None) != (second.unseen is None):
        raise ValueError(
            "before and after must both have unseen responses, or neither; got them in "
            f"{'after' if first.unseen is None else 'before'} alone"
        )
    for name in Likelihoods._fields:
        old, new = getattr(first, name), getattr(second, name)
        if old is not None:
            check_floats(1, "(P,)", **{f"before.{name}": old, f"after.{name}": new})
    pair: dict[str, Any] = {"before.chosen": first.chosen, "before.rejected": first.rejected}
    check_floats(1, "(P,)", **pair)
    chosen, rejected = wide(first.chosen - second.chosen), wide(first.rejected - second.rejected)
    dispersion = None
    if first.unseen is not None and second.unseen is not None:
        dispersion = float(wide(second.unseen - first.unseen).mean())
    return Displacement(
        chosen_drop=float(chosen.mean()),
        rejected_drop=float(rejected.mean()),
        dispersion=dispersion,
        chosen_fell=float(wide(chosen > 0).mean()),
        both_fell=float(wide((chosen > 0) & (rejected > 0)).mean()),
    )


def _likelihoods(name: str, given: Likelihoods | tuple[Tensor, ...]) -> Likelihoods:
    if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
        got = f"{len(given)} values" if isinstance(given, (tuple, list)) else type(given).__name__
        raise TypeError(
            f"{name} must be (chosen, rejected) or (chosen, rejected, unseen), got {got}"
        )
    return Likelihoods(*given)
