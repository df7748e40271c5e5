# SPDX-License-Identifier: Apache-2.0
"""A preference training of a flow from end to end: images, Flow-DPO, a picture before and after."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..diffusion import preset
from ..reference import frozen_copy
from . import DemoError
from .console import Console
from .flow import FlowTransformer, fit, noised_pairs, sample
from .shapes import pairs, picture, red_share

SAMPLES = 64


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps of both trainings, and of the second what else it takes."""

    fit_steps: int = 400
    steps: int = 50
    pairs: int = 24
    rate: float = 5e-5
    beta: float = 200.0


def require_matplotlib() -> None:
    """Raise DemoError naming the extra to install where the picture cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise DemoError(
            "the visual demo draws a picture with matplotlib, not installed here: pip install "
            '"fastpref[visual]"'
        )


def run(out: Path, recipe: Recipe, seed: int, console: Console) -> dict[str, Any]:
    """Train, and write samples.png and results.json to ``out``; returns what the latter holds."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = FlowTransformer()
    size = sum(one.numel() for one in model.parameters())
    console.say("model", f"a flow of small images, transformer of {size / 1e6:.2f} M parameters")
    fit(model, recipe.fit_steps, console.progress("fit"))
    before = sample(model, SAMPLES)
    console.say("before", f"{red_share(before):.0%} of {SAMPLES} samples are red, the others blue")
    console.say("flow_dpo", f"red is preferred: {recipe.pairs} pairs a step, beta {recipe.beta:g}")
    losses, seconds = _prefer(model, recipe, console)
    after = sample(model, SAMPLES)
    console.say("after", f"{red_share(after):.0%} of the samples from the same noise are red")
    picture({"before": before, "after Flow-DPO": after}, out / "samples.png")
    results = {
        "preset": "flow_dpo",
        "before": {"red_share": red_share(before)},
        "after": {"red_share": red_share(after)},
        "losses": losses,
        "seconds": {"preference_training": round(seconds, 1), "in_all": round(console.seconds, 1)},
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    console.say("done", f"samples.png and results.json are in {out}")
    return results


def _prefer(model: FlowTransformer, recipe: Recipe, console: Console) -> tuple[list[float], float]:
    """Losses of the steps and the seconds that they took."""
    reference, progress = frozen_copy(model), console.progress("flow_dpo")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.0)
    loss_of = preset("flow_dpo", beta=recipe.beta)
    began = time.monotonic()
    for step in range(recipe.steps):
        seen, times, velocity = noised_pairs(pairs(recipe.pairs))
        with torch.no_grad():
            ref_pred = reference(seen, times)
        loss = loss_of(model(seen, times), ref_pred, velocity).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step + 1, recipe.steps, loss.item())
    return progress.losses, time.monotonic() - began
