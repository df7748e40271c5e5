# SPDX-License-Identifier: Apache-2.0
"""What several objectives made of the same model, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from .training import preferred_share


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one objective made of the model, on held-out pairs."""

    preferred_share: float
    log_ratio_margin: float  # nats by which the gap of chosen and rejected has grown, their mean
    losses: list[float]
    seconds: float

    @classmethod
    def of(
        cls, before: Sequence[float], after: Sequence[float], losses: list[float], seconds: float
    ) -> "Outcome":
        """From the gaps of the held-out pairs before and after the training.

        The model before is the reference, so that the growth of a gap is the difference of the two
        log-ratios, whatever the objective and its beta.
        """
        margins = [new - old for old, new in zip(before, after, strict=True)]
        return cls(preferred_share(after), fmean(margins), losses, seconds)


def table(before: float, outcomes: Mapping[str, Outcome]) -> list[str]:
    """The outcomes as lines of text; `before` is the share of the model they start from."""
    width = max(len(name) for name in ("objective", *outcomes))
    lines = [
        f"{'':{width}}  {'chosen is likelier':>18}  {'log-ratio':>9}  {'loss of step':^18}",
        f"{'objective':{width}}  {'before':>8}  {'after':>8}  {'margin':>9}  "
        f"{'first':>8}  {'last':>8}  {'seconds':>7}",
    ]
    for name, outcome in outcomes.items():
        lines.append(
            f"{name:{width}}  {before:8.1%}  {outcome.preferred_share:8.1%}  "
            f"{outcome.log_ratio_margin:9.2f}  {outcome.losses[0]:8.4f}  "
            f"{outcome.losses[-1]:8.4f}  {outcome.seconds:7.1f}"
        )
    return lines
