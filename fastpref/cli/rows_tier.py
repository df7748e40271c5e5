# SPDX-License-Identifier: Apache-2.0
"""What ``python -m fastpref kernels`` prints of the rows tier."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench import predictions
from ..bench.predictions import Counts

# Of a first call without gradient, and of the launches of its only pass.
MOST_SECONDS, MOST_LAUNCHES = 5, 12
COLUMNS = (
    *("registers", "instructions", "read", "written", "forward launches", "all launches"),
    "compile seconds",
)


def table(capability: int, element: str, counts: Sequence[Counts]) -> str:
    """A row for each call; for the chip of the cards that are known, in 16 bits, predictions."""
    lines = [
        f"sm_{capability}, {element}, rows tier: instructions and bytes a logit of all passes; "
        "launches of Triton and torch, products included",
        f"  {'':40}" + "".join(f"{name:>18}" for name in COLUMNS),
    ]
    for one in counts:
        values = (
            *(one.registers, f"{sum(one.instructions):.1f}", one.read, one.written),
            *(one.forward_launches, one.launches, f"{one.compile_seconds:.1f}"),
        )
        lines.append(f"  {one.call.name:40}" + "".join(f"{value:>18}" for value in values))
    lines.append(
        f"  aimed at: at most {MOST_LAUNCHES} launches without gradient, {MOST_SECONDS} seconds"
    )
    if capability == 90 and element != "fp32":
        lines += ["", *_predictions(counts)]
    return "\n".join(lines)


def _predictions(counts: Sequence[Counts]) -> list[str]:
    rates = "; ".join(
        f"{card.name}: {card.flops / 1e12:.0f} TFLOP/s, {card.bytes / 1e12:.1f} TB/s, "
        f"{card.instructions / 1e12:.1f} T instructions of a thread/s"
        for card in predictions.CARDS
    )
    heads = [f"H={width}, V={vocab}" for width, vocab in predictions.HEADS]
    lines = [
        f"  predicted, not measured, N={predictions.ROWS}: milliseconds, and ratio to the bare "
        "products, beside what is aimed at",
        f"  assumed: {rates}; {predictions.LAUNCH_SECONDS * 1e6:.0f} us a launch",
        f"  {'':28}" + "".join(f"{head:>26}" for head in heads) + f"{'times TRL, H=4096':>22}",
    ]
    for aim, card, milliseconds, times in predictions.predicted({x.call.name: x for x in counts}):
        cells = []
        for at, (ms, head) in enumerate(zip(milliseconds, predictions.HEADS, strict=True)):
            ratio = ms / 1e3 / predictions.bare(card, head, aim.products)
            most = "" if aim.most is None else f" of {aim.most[at]:.2f}"
            cells.append(f"{ms:.2f} ms, {ratio:.3f}{most}")
        compared = "" if times is None else f"{times:.2f} of {aim.over_trl}"
        line = f"  {f'{aim.name}, {card.name}':28}" + "".join(f"{one:>26}" for one in cells)
        lines.append(f"{line}{compared:>22}".rstrip())
    return lines
