# SPDX-License-Identifier: Apache-2.0
"""HTML: a response coloured by credit, and the page of a report. Nothing is loaded from anywhere
but the report's folder."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

BLUE, RED = (31, 111, 180), (200, 60, 50)
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;"
    "color:#222}img{max-width:100%}table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}"
    ".map{white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;line-height:1.7;"
    "border:1px solid #ddd;padding:.6em}.map span{border-radius:2px}p.note{color:#666}"
)


def shade(value: float, largest: float) -> tuple[tuple[int, int, int], float]:
    """A colour, and how much of it, in [0, 0.8]."""
    return (BLUE if value > 0 else RED), 0.8 * abs(value) / largest if largest else 0.0


def credit_spans(tokens: Sequence[str], credit: Sequence[float]) -> str:
    largest = max(map(abs, credit))
    spans = []
    for token, value in zip(tokens, credit, strict=True):
        (red, green, blue), strength = shade(value, largest)
        text = escape(token).replace("\n", "&#9166;\n")
        spans.append(
            f'<span style="background:rgba({red},{green},{blue},{strength:.3f})" '
            f'title="{value:+.4g}">{text}</span>'
        )
    return f'<div class="map">{"".join(spans)}</div>'


def credit_page(tokens: Sequence[str], credit: Sequence[float], title: str) -> str:
    note = (
        f"{len(tokens)} tokens, sum {sum(credit):+.4g}, from {min(credit):+.4g} (red) to "
        f"{max(credit):+.4g} (blue); point at one for its number"
    )
    parts = [f'<p class="note">{note}</p>', credit_spans(tokens, credit)]
    return page(title or "Credit of tokens", parts)


def table(rows: Sequence[tuple[str, object, str]]) -> str:
    """Names, values and what they are."""
    lines = [
        f'<tr><td>{escape(name)}</td><td class="n">{escape(_shown(value))}</td>'
        f"<td>{escape(meaning)}</td></tr>"
        for name, value, meaning in rows
    ]
    return f"<table>{''.join(lines)}</table>"


def _shown(value: object) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def page(title: str, parts: Sequence[str]) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
