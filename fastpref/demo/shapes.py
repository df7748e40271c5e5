# SPDX-License-Identifier: Apache-2.0
"""Images for trainings that are over in a minute: a disk or a square somewhere on a dark ground,
red or blue."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZE = 12  # pixels a side
PLACED: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
RED, BLUE = (1.0, 0.25, 0.05), (0.05, 0.25, 1.0)


def draw(red: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Images (N, 3, SIZE, SIZE) in [-1, 1], each of another shape and place.

    Args:
        red: (N,) bool, else blue.
    """
    count = red.shape[0]
    places, sizes, kinds = torch.rand(3, count, 2, generator=generator, **PLACED)
    centre = 3.5 + places * (SIZE - 8)
    radius = 2 + 1.5 * sizes[:, :1, None]
    pixels = torch.arange(SIZE, **PLACED)
    down = (pixels[:, None] - centre[:, :1, None]).abs()
    right = (pixels - centre[:, 1:, None]).abs()
    square = torch.maximum(down, right)
    disk = (down.square() + right.square()).sqrt()
    distance = torch.where(kinds[:, :1, None] < 0.5, square, disk)
    inside = (radius - distance + 0.5).clamp(0, 1)[:, None]
    colours = torch.where(red[:, None], torch.tensor(RED, **PLACED), torch.tensor(BLUE, **PLACED))
    images: Tensor = 2 * (0.05 + 0.9 * inside * colours[:, :, None, None]) - 1
    return images


def pairs(count: int, generator: torch.Generator | None = None) -> Tensor:
    """(2 count, 3, SIZE, SIZE): red images, which are preferred, then blue ones."""
    return draw(torch.arange(2 * count, **PLACED) < count, generator)


def red_share(images: Tensor) -> float:
    """How many of the images are rather red than blue."""
    red, _, blue = (images + 1).sum((2, 3)).unbind(1)
    return float((red > blue).float().mean())


def picture(samples: Mapping[str, Tensor], path: Path, columns: int = 8) -> None:
    """A PNG of panels side by side, each of some images (N, 3, SIZE, SIZE) under its title.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(samples), figsize=(3.6 * len(samples), 3.4), squeeze=False, layout="constrained"
    )
    for panel, (title, images) in zip(panels.flat, samples.items(), strict=True):
        rows = images[: images.shape[0] // columns * columns].clamp(-1, 1) / 2 + 0.5
        rows = torch.nn.functional.pad(rows, (1, 1, 1, 1), value=1.0)
        tiles = rows.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        panel.imshow(tiles.numpy(), interpolation="nearest")
        panel.set_title(title, fontsize=10)
        panel.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)
