# SPDX-License-Identifier: Apache-2.0
"""A rectified flow on small images: a transformer that predicts velocities, its training and its
sampler. x_t = (1 - t) x0 + t eps, and the velocity is eps - x0."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .shapes import PLACED, SIZE, draw

PATCH = 3


class FlowTransformer(nn.Module):
    """Images (N, 3, SIZE, SIZE) and times (N,) to velocities, by attention among patches."""

    def __init__(self, width: int = 64, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.width = width
        tokens, channels = (SIZE // PATCH) ** 2, 3 * PATCH**2
        self.read = nn.Linear(channels, width, **PLACED)
        self.places = nn.Parameter(0.02 * torch.randn(tokens, width, **PLACED))
        self.times = nn.Sequential(
            nn.Linear(width, width, **PLACED), nn.SiLU(), nn.Linear(width, width, **PLACED)
        )
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                *(width, heads, 2 * width),
                dropout=0.0,
                batch_first=True,
                norm_first=True,
                **PLACED,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, **PLACED)
        self.write = nn.Linear(width, channels, **PLACED)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        tokens = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        hidden = self.read(tokens) + self.places + self.times(self._waves(times))[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        tokens = self.write(self.norm(hidden)).transpose(1, 2)
        return F.fold(tokens, (SIZE, SIZE), PATCH, stride=PATCH)

    def _waves(self, times: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(
            math.log(1000) * torch.arange(half, dtype=times.dtype, device=times.device) / half
        )
        angles = times[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], 1)


def noised(images: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """What the model sees at those times, and the velocity there."""
    share = times.view(-1, 1, 1, 1)
    return (1 - share) * images + share * noise, noise - images


def flow_loss(model: nn.Module, images: Tensor) -> Tensor:
    """The mean squared error of the velocity, at times drawn at random."""
    times = torch.rand(images.shape[0], **PLACED)
    seen, velocity = noised(images, torch.randn_like(images), times)
    return F.mse_loss(model(seen, times), velocity)


@torch.no_grad()
def sample(model: nn.Module, count: int, steps: int = 24, seed: int = 0) -> Tensor:
    """Images (count, 3, SIZE, SIZE) that the flow makes of noise, by Euler's method."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator, **PLACED)
    for step in range(steps, 0, -1):
        times = torch.full((count,), step / steps, **PLACED)
        images = images - model(images, times) / steps
    return images


def fit(model: nn.Module, steps: int, progress: Callable[[int, int, float], None]) -> None:
    """Train the model on red and blue images alike; ``progress`` is told step, steps and loss."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        loss = flow_loss(model, draw(torch.rand(48, **PLACED) < 0.5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1, steps, loss.item())


def noised_pairs(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the model sees of (2P, ...) images, chosen ones first, their times and velocities: the
    two of a pair share noise and time."""
    count = images.shape[0] // 2
    times = torch.rand(count, **PLACED).repeat(2)
    noise = torch.randn(images[:count].shape, **PLACED).repeat(2, 1, 1, 1)
    seen, velocity = noised(images, noise, times)
    return seen, times, velocity
