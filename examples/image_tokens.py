# SPDX-License-Identifier: Apache-2.0
"""DDO and DPO of an autoregressive image model, through ``fastpref.preference_loss`` as it is:

    python examples/image_tokens.py

A tiny model in the manner of LlamaGen writes images of 36 tokens, class by class; its head has a
bias and runs in float32, as VAR's has. DDO (Zheng et al. 2025, arXiv:2503.01103) teaches it to tell
real images from its own: log-probabilities are sums over all tokens, ``labels`` say which are real,
``alpha`` weighs each generated one, and a beta of 0 takes a row out, as those whose class was
dropped. DPO then prefers images that brighten from left to right. Says what share of the tokens
follow the rule of real images, beside a model that was fitted to real images for as many steps more
(which is ahead here: DDO is for models that more fitting does not improve), and what share of the
steps brighten.
"""

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpref import PreferenceOutput, preference_loss
from fastpref.reference import frozen_copy

SIDE, HUES, LEVELS, WIDTH = 6, 8, 8, 64
TOKENS, VOCABULARY, NO_CLASS = SIDE * SIDE, HUES * LEVELS, HUES
FIT_STEPS, ROUNDS, DDO_STEPS, DPO_STEPS, BATCH = 150, 2, 50, 40, 32


class Model(nn.Module):
    """Any causal model that gives hidden states will do."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(HUES + 1, WIDTH)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, classes: Tensor, tokens: Tensor) -> Tensor:
        """(B,) and (B, T) -> hidden states (B, T, WIDTH), each of what comes before its token."""
        hidden = torch.cat([self.classes(classes)[:, None], self.tokens(tokens[:, :-1])], 1)
        hidden = hidden + self.places[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for block in self.blocks:
            hidden = block(hidden, mask, is_causal=True)
        return self.norm(hidden)

    @torch.no_grad()
    def sample(self, classes: Tensor) -> Tensor:
        """(B,) -> (B, TOKENS)."""
        tokens = torch.zeros(len(classes), 1, dtype=torch.int64)
        for place in range(TOKENS):
            chances = self.head(self(classes, tokens)[:, -1]).softmax(-1)
            tokens[:, place] = torch.multinomial(chances, 1)[:, 0]
            tokens = F.pad(tokens, (0, 1))
        return tokens[:, :TOKENS]


def real(classes: Tensor, rising: Tensor) -> Tensor:
    """Images of the class's hue whose rows brighten or darken by a level a token, in a circle."""
    start = torch.randint(LEVELS, (len(classes), 1, 1))
    steps = torch.where(rising, 1, -1)[:, None, None] * torch.arange(SIDE)
    levels = (start + steps) % LEVELS
    return (classes[:, None, None] * LEVELS + levels).expand(-1, SIDE, -1).flatten(1)


def steps_of(tokens: Tensor) -> Tensor:
    """(B, SIDE, SIDE - 1), from each token to its right neighbour, 0 to LEVELS - 1."""
    levels = (tokens % LEVELS).view(-1, SIDE, SIDE)
    return (levels[..., 1:] - levels[..., :-1]) % LEVELS


def quality(classes: Tensor, tokens: Tensor) -> float:
    """Share of tokens of the class's hue that brighten or darken from their left neighbour."""
    steps = steps_of(tokens)
    hue = (tokens // LEVELS == classes[:, None]).view(-1, SIDE, SIDE)[..., 1:]
    return float((hue & ((steps == 1) | (steps == LEVELS - 1))).float().mean())


def rising_share(tokens: Tensor) -> float:
    return float((steps_of(tokens) == 1).float().mean())


def preferred(
    model: Model,
    reference: Model,
    classes: Tensor,
    tokens: Tensor,
    objective: str,
    **settings: Any,
) -> PreferenceOutput:
    """The loss of (B,) classes and (B, TOKENS) images."""
    with torch.no_grad():
        ref_hidden = reference(classes, tokens)
    return preference_loss(
        model(classes, tokens),
        model.head.weight,
        tokens,
        objective,
        bias=model.head.bias,
        ref_hidden=ref_hidden,
        ref_weight=reference.head.weight,
        ref_bias=reference.head.bias,
        **settings,
    )


def ddo(
    model: Model,
    reference: Model,
    classes: Tensor,
    tokens: Tensor,
    labels: Tensor,
    alpha: Tensor,
    beta: Tensor,
) -> PreferenceOutput:
    """``labels`` (B,), true where an image is real; ``alpha`` and ``beta`` (B,)."""
    settings = {"layout": "units", "extras": {"labels": labels}, "alpha": alpha, "beta": beta}
    return preferred(model, reference, classes, tokens, "ddo", **settings)


def dpo(model: Model, reference: Model, classes: Tensor, tokens: Tensor) -> PreferenceOutput:
    """Of pairs, preferred images first."""
    return preferred(model, reference, classes, tokens, "dpo", beta=0.1)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def fit(model: Model, steps: int) -> None:
    """On real images of both directions, a tenth of them without their class."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        classes = torch.randint(HUES, (BATCH,))
        tokens = real(classes, torch.rand(BATCH) < 0.5)
        seen = torch.where(torch.rand(BATCH) < 0.1, NO_CLASS, classes)
        logits = model.head(model(seen, tokens))
        step(optimizer, F.cross_entropy(logits.flatten(0, 1), tokens.flatten()))


def discriminate(model: Model) -> list[float]:
    """Rounds of DDO, each against the model that the last one left, and the losses of the last."""
    losses: list[float] = []
    for _ in range(ROUNDS):
        losses.clear()
        reference = frozen_copy(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, DDO_STEPS)
        classes = torch.randint(HUES, (DDO_STEPS, BATCH))
        generated = reference.sample(classes.flatten()).view(DDO_STEPS, BATCH, TOKENS)
        for own, fake in zip(classes, generated, strict=True):
            tokens = torch.cat([real(own, torch.rand(BATCH) < 0.5), fake])
            labels = torch.arange(2 * BATCH) < BATCH
            dropped = torch.rand(2 * BATCH) < 0.1
            seen = torch.where(dropped, NO_CLASS, own.repeat(2))
            beta = torch.where(dropped & ~labels, 0.0, 0.05)  # real rows are learnt without too
            output = ddo(
                model, reference, seen, tokens, labels, torch.full((2 * BATCH,), 0.2), beta
            )
            step(optimizer, output.loss)
            schedule.step()
            losses.append(output.loss.item())
    return losses


def prefer(model: Model) -> None:
    reference = frozen_copy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    for _ in range(DPO_STEPS):
        classes = torch.randint(HUES, (BATCH // 2,)).repeat(2)
        tokens = real(classes, torch.arange(BATCH) < BATCH // 2)
        step(optimizer, dpo(model, reference, classes, tokens).loss)


def show(label: str, model: Model) -> None:
    classes = torch.arange(HUES).repeat(16)
    tokens = model.sample(classes)
    print(f"{label:6} quality {quality(classes, tokens):.3f}   rising {rising_share(tokens):.3f}")


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    fit(model, FIT_STEPS)
    show("before", model)
    longer = deepcopy(model)
    fit(longer, ROUNDS * DDO_STEPS)
    show("longer", longer)
    losses = discriminate(model)
    print(f"DDO loss {losses[0]:.3f} to {sum(losses[-10:]) / 10:.3f}")
    show("DDO", model)
    prefer(model)
    show("DPO", model)


if __name__ == "__main__":
    main()
