# SPDX-License-Identifier: Apache-2.0
"""Diffusion-DPO as in diffusers' script, of a U-Net that makes red and blue images, where red ones
are preferred:

    python examples/diffusion_dpo.py

Wallace et al. 2023, arXiv:2311.12908. The U-Net is diffusers' where that is installed (pip install
"fastpref[visual]"), else a few convolutions here. What the script has between its noise and its
backward is ``loss_of``. Says how many samples are red before and after, and draws them to
diffusion_dpo.png.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpref import PreferenceOutput
from fastpref.demo.shapes import SIZE, draw, pairs, picture, red_share
from fastpref.diffusion import DATA, NOISE, convert, preset
from fastpref.reference import frozen_copy

TIMES, FIT_STEPS, STEPS, PAIRS, SAMPLES = 100, 350, 40, 24, 64
# Shares of the image and of the noise at each time.
BAR = torch.cumprod(1 - torch.linspace(1e-3, 0.08, TIMES), 0)


class Block(nn.Module):
    """Two convolutions beside what they are added to, told the time."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.times = nn.Embedding(TIMES, out)
        self.first = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.second = nn.Sequential(
            nn.GroupNorm(8, out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1)
        )
        self.beside = nn.Conv2d(channels, out, 1)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        told = self.first(images) + self.times(times)[:, :, None, None]
        return self.beside(images) + self.second(told)


class ConvUNet(nn.Module):
    """Images (N, 3, SIZE, SIZE) and times (N,) to the noise in them, by way of a half and a quarter
    of their size."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.read = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList([Block(width, width), Block(width, 2 * width)])
        self.middle = Block(2 * width, 2 * width)
        self.up = nn.ModuleList([Block(4 * width, width), Block(2 * width, width)])
        self.write = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        images, kept = self.read(images), []
        for block in self.down:
            images = block(images, times)
            kept.append(images)
            images = F.avg_pool2d(images, 2)
        images = self.middle(images, times)
        for block in self.up:
            images = torch.cat([F.interpolate(images, scale_factor=2.0), kept.pop()], 1)
            images = block(images, times)
        return self.write(images)


class DiffusersUNet(nn.Module):
    """The same of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.net = UNet2DModel(
            sample_size=SIZE,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            add_attention=False,
        )

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        return self.net(images, times).sample


def build() -> nn.Module:
    return ConvUNet() if find_spec("diffusers") is None else DiffusersUNet()


def path(times: Tensor) -> tuple[Tensor, Tensor]:
    return BAR[times].sqrt(), (1 - BAR[times]).sqrt()


def noised(images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    alpha, sigma = (one.view(-1, 1, 1, 1) for one in path(times))
    return alpha * images + sigma * noise


def fit(model: nn.Module) -> None:
    """On red and blue images alike."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=FIT_STEPS)
    for _ in range(FIT_STEPS):
        images = draw(torch.rand(32) < 0.5)
        times, noise = torch.randint(TIMES, (32,)), torch.randn_like(images)
        loss = F.mse_loss(model(noised(images, noise, times), times), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def sample(model: nn.Module, steps: int = 20) -> Tensor:
    """By DDIM, from the same noise every time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 3, SIZE, SIZE, generator=generator)
    places = torch.linspace(TIMES - 1, 0, steps).long()
    for now, after in zip(places, [*places[1:], None], strict=True):
        times = now.expand(SAMPLES)
        noise = model(images, times)
        data = convert(noise, images, path=path(times), source=NOISE, target=DATA).clamp(-1, 1)
        images = data if after is None else noised(data, noise, after.expand(SAMPLES))
    return images


def loss_of(
    model: nn.Module, reference: nn.Module, images: Tensor, beta: float
) -> PreferenceOutput:
    """Of (2P, ...) images, chosen ones first; the two of a pair share noise and time."""
    count = images.shape[0] // 2
    noise = torch.randn(images[:count].shape).repeat(2, 1, 1, 1)
    times = torch.randint(TIMES, (count,)).repeat(2)
    seen = noised(images, noise, times)
    with torch.no_grad():
        ref_pred = reference(seen, times)
    return preset("diffusers_dpo_sdxl", beta=beta)(model(seen, times), ref_pred, noise)


def main() -> None:
    torch.manual_seed(0)
    model = build()
    fit(model)
    before, reference = sample(model), frozen_copy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)
    for step in range(STEPS):
        output = loss_of(model, reference, pairs(PAIRS), beta=2000.0)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == STEPS - 1:
            logged = output.metrics
            print(
                f"step {step:2}   loss {output.loss.item():.4f}   "
                f"raw_model_loss {logged['loss/model'].item():.4f}   "
                f"raw_ref_loss {logged['loss/reference'].item():.4f}   "
                f"implicit_acc {logged['rewards/accuracies'].item():.2f}"
            )
    after = sample(model)
    print(f"red before {red_share(before):.2f}   after {red_share(after):.2f}")
    picture({"before": before, "after Diffusion-DPO": after}, Path("diffusion_dpo.png"))


if __name__ == "__main__":
    main()
