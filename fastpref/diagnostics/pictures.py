# SPDX-License-Identifier: Apache-2.0
"""PNG pictures. matplotlib is imported when one is drawn."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pages import shade

if TYPE_CHECKING:
    from .layers import SpinalTrace

WIDTH = 96  # characters a line of a credit map
MOST_LINES = 300  # of one; what follows is counted
CHARACTER, LINE = 0.0875, 0.24  # inches
COLOURS = ("#1f6f8b", "#d1812c", "#5b8c3e", "#8a4f7d")


def _figure(width: float, height: float, layout: Any = "constrained") -> Any:
    """Without pyplot, whose backend and open figures are the user's."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'pictures need matplotlib, not installed here: pip install "fastpref[demo]"'
        ) from error
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def draw_credit(tokens: Sequence[str], credit: Sequence[float], path: Path, title: str) -> Path:
    pieces, lines = _laid_out(tokens)
    left_out = len({at for line, _, _, at in pieces if line >= MOST_LINES})
    rows = min(lines, MOST_LINES) + 2 + bool(left_out)
    figure = _figure(0.3 + WIDTH * CHARACTER, 0.2 + rows * LINE, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-1.5, WIDTH + 2)
    axes.set_ylim(rows + 0.4, -0.4)
    axes.axis("off")
    largest = max(map(abs, credit))
    plain: dict[str, Any] = {"va": "center", "parse_math": False}
    heading = f"{title}   " if title else ""
    heading += f"sum {sum(credit):+.4g}, from {min(credit):+.4g} (red) to {max(credit):+.4g} (blue)"
    axes.text(0, 0.5, heading, fontsize=9, color="#444444", **plain)
    for line, column, text, at in pieces:
        if line >= MOST_LINES:
            continue
        colour, strength = shade(credit[at], largest)
        face = (*(part / 255 for part in colour), strength)
        size = sum(map(_columns, text))
        axes.fill_between((column, column + size), line + 1.05, line + 1.95, color=face, lw=0)
        for offset, one in zip(_offsets(text), text, strict=True):
            style = {"family": "monospace", "fontsize": 10, "ha": "left", **plain}
            axes.text(column + offset, line + 1.5, one, **style)
    if left_out:
        more = f"... and {left_out} tokens more"
        axes.text(0, rows - 0.5, more, fontsize=9, color="#444444", **plain)
    figure.savefig(path, dpi=110)
    return path


def _laid_out(tokens: Sequence[str]) -> tuple[list[tuple[int, int, str, int]], int]:
    """Line, column, text and token of each piece, and how many lines there are."""
    pieces: list[tuple[int, int, str, int]] = []
    line = column = 0
    for at, token in enumerate(tokens):
        text = ""
        for one in token:
            shown = "\u23ce" if one == "\n" else one if one.isprintable() else "\u00b7"
            if column + sum(map(_columns, text)) + _columns(shown) > WIDTH:
                pieces.append((line, column, text, at))
                line, column, text = line + 1, 0, ""
            text += shown
            if one == "\n":
                pieces.append((line, column, text, at))
                line, column, text = line + 1, 0, ""
        if text:
            pieces.append((line, column, text, at))
            column += sum(map(_columns, text))
    return pieces, line + 1


def _columns(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _offsets(text: str) -> list[int]:
    found = [0]
    for one in text[:-1]:
        found.append(found[-1] + _columns(one))
    return found


def draw_layers(traces: Mapping[str, SpinalTrace], path: Path) -> Path:
    figure = _figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    for (label, trace), colour in zip(traces.items(), COLOURS * len(traces), strict=False):
        style = {"color": colour, "marker": "o", "markersize": 3, "label": label}
        left.plot(range(len(trace.contraction)), trace.contraction, **style)
        steps = [at + 0.5 for at in range(len(trace.transport))]
        right.plot(steps, trace.transport, **style)
    left.set(title="contraction", xlabel="layer", ylabel="power of the spectrum's tail")
    right.set(title="transport", xlabel="layer", ylabel="Fisher-Rao length, radians")
    right.set_ylim(bottom=0)
    left.legend(frameon=False)
    figure.savefig(path, dpi=110)
    return path


def draw_likelihoods(changes: Mapping[str, Sequence[float]], path: Path) -> Path:
    """Histograms of log-ratios, on one axis."""
    figure = _figure(7, 3.4)
    panel = figure.subplots()
    every = [one for values in changes.values() for one in values]
    low, high = min(every), max(every)
    for (label, values), colour in zip(changes.items(), COLOURS, strict=False):
        span = (low, high) if high > low else (low - 0.5, low + 0.5)
        panel.hist(values, bins=30, range=span, alpha=0.55, color=colour, label=label)
    panel.axvline(0, color="#444444", lw=0.8)
    panel.set(xlabel="log policy - log reference of a response, nats", ylabel="responses")
    panel.legend(frameon=False)
    figure.savefig(path, dpi=110)
    return path


def draw_lengths(more: Sequence[float], margins: Sequence[float], slope: float, path: Path) -> Path:
    figure = _figure(7, 3.4)
    panel = figure.subplots()
    panel.scatter(more, margins, s=14, color=COLOURS[0], alpha=0.7, lw=0)
    if slope == slope:
        middle = sum(margins) / len(margins) - slope * sum(more) / len(more)
        ends = min(more), max(more)
        panel.plot(ends, [middle + slope * one for one in ends], color=COLOURS[1])
    panel.axhline(0, color="#444444", lw=0.8)
    panel.set(xlabel="tokens of the chosen response more than of the rejected", ylabel="margin")
    figure.savefig(path, dpi=110)
    return path
