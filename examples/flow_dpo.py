# SPDX-License-Identifier: Apache-2.0
"""Flow-DPO: a flow that makes red and blue images learns that red ones are preferred:

    python examples/flow_dpo.py

Liu et al. 2025, arXiv:2501.13918. A tiny transformer of patches is trained on both kinds of images,
then on pairs of them; the loss is one call. Says how many of its samples are red before and after,
and draws them to flow_dpo.png.
"""

from pathlib import Path

import torch

from fastpref.demo.flow import FlowTransformer, fit, noised_pairs, sample
from fastpref.demo.shapes import pairs, picture, red_share
from fastpref.diffusion import preset
from fastpref.reference import frozen_copy

FIT_STEPS, STEPS, PAIRS, SAMPLES = 400, 50, 24, 64


def train(model: FlowTransformer) -> None:
    """On pairs, against the model as it is now."""
    reference = frozen_copy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)
    loss_of = preset("flow_dpo", beta=200.0)
    for step in range(STEPS):
        seen, times, velocity = noised_pairs(pairs(PAIRS))
        with torch.no_grad():
            ref_pred = reference(seen, times)
        output = loss_of(model(seen, times), ref_pred, velocity)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == STEPS - 1:
            shown = {name: output.metrics[name].item() for name in ("loss/model", "loss/reference")}
            errors = "   ".join(f"{name} {value:.3f}" for name, value in shown.items())
            print(f"step {step:2}   loss {output.loss.item():.4f}   {errors}")


def main() -> None:
    torch.manual_seed(0)
    model = FlowTransformer()
    fit(model, FIT_STEPS, lambda *_: None)
    before = sample(model, SAMPLES)
    train(model)
    after = sample(model, SAMPLES)
    print(f"red before {red_share(before):.2f}   after {red_share(after):.2f}")
    picture({"before": before, "after Flow-DPO": after}, Path("flow_dpo.png"))


if __name__ == "__main__":
    main()
