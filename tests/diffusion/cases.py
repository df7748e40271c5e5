# SPDX-License-Identifier: Apache-2.0
"""Predictions that lie in memory in many ways, and their squared errors in plain float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastpref._extension import ops_unavailable_reason
from fastpref.diffusion.backends import plain

BACKENDS = {"plain": plain}
if ops_unavailable_reason() is None:
    from fastpref.diffusion.backends import cpp

    BACKENDS["cpp"] = cpp
if not torch.cuda.is_available():
    from fastpref.diffusion.backends import triton

    BACKENDS["triton"] = triton  # in the interpreter

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Predictions = tuple[Tensor, Tensor, Tensor]


def predictions(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Predictions:
    """Model, reference and target: the two agree to a percent, and miss the target by a third."""
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    target, miss, apart = draw
    ref = target + 0.3 * miss
    return (ref + 0.01 * apart).to(dtype), ref.to(dtype), target.to(dtype)


def same(view: Callable[[Tensor], Tensor]) -> Callable[..., Predictions]:
    return lambda *given: tuple(view(one) for one in given)  # type: ignore[return-value]


def channels_last(one: Tensor) -> Tensor:
    order = torch.channels_last if one.dim() == 4 else torch.channels_last_3d
    return one.contiguous(memory_format=order)


def _half_of_channels(one: Tensor) -> Tensor:
    return torch.cat((one, one + 1), 1).chunk(2, dim=1)[0]


def _half_of_tokens(one: Tensor) -> Tensor:
    return torch.cat((one, one + 1), 2)[:, :, : one.shape[2]]


def _batch_inside(one: Tensor) -> Tensor:
    return one.transpose(0, 1).contiguous().transpose(0, 1)


def _cropped(one: Tensor) -> Tensor:
    return torch.nn.functional.pad(one, (1, 1, 1, 1))[..., 1:-1, 1:-1]


def _every_other(one: Tensor) -> Tensor:
    return one.repeat_interleave(2, -1)[..., ::2]


def _shared_noise(model: Tensor, ref: Tensor, target: Tensor) -> Predictions:
    return model, ref, target[:1].expand_as(target)


def _model_alone(view: Callable[[Tensor], Tensor]) -> Callable[..., Predictions]:
    return lambda model, ref, target: (view(model), ref, target)


# Of a batch (B, C, H, W); whether nothing is copied.
LAYOUTS: dict[str, tuple[Callable[..., Predictions], bool]] = {
    "contiguous": (same(torch.Tensor.contiguous), True),
    "channels_last": (same(channels_last), True),
    "half of channels": (same(_half_of_channels), True),
    "half of tokens": (same(_half_of_tokens), True),
    "batch inside": (same(_batch_inside), True),
    "batch inside, model alone": (_model_alone(_batch_inside), True),
    "half of channels, model alone": (_model_alone(_half_of_channels), True),
    "shared noise": (_shared_noise, True),
    "channels_last, model alone": (_model_alone(channels_last), False),
    "cropped": (same(_cropped), False),
    "cropped, model alone": (_model_alone(_cropped), False),
    "every other": (same(_every_other), False),
}

B, C, H, W = 3, 4, 6, 10
MASKS: dict[str, Callable[[], Tensor]] = {
    "spatial": lambda: _random_mask(B, 1, H, W),
    "one for all": lambda: _random_mask(1, 1, H, W),
    "without batch": lambda: _random_mask(H, W),
    "columns": lambda: _random_mask(W),
    "channels": lambda: _random_mask(B, C, 1, 1),
    "channels and columns": lambda: _random_mask(B, C, 1, W),
    "elements": lambda: _random_mask(B, C, H, W),
    "elements, strided": lambda: channels_last(_random_mask(B, C, H, W)),
    "samples": lambda: torch.tensor([True, False, True]).view(B, 1, 1, 1),
    "numbers": lambda: _random_mask(B, 1, H, W).float(),
    "a number": lambda: torch.tensor(1),
}


def _random_mask(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator) < 0.6


def exact_errors(
    model: Tensor, ref: Tensor, target: Tensor, mask: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(gap, model, reference) of float64 copies, sample by sample; differentiable."""
    found = []
    for b in range(model.shape[0]):
        p, r, t = (one[b].double() for one in (model, ref, target))
        if mask is not None:
            kept = mask.expand(model.shape)[b] != 0
            p, r, t = p[kept], r[kept], t[kept]
        errors = torch.stack([((p - t) ** 2).sum(), ((r - t) ** 2).sum()])
        if reduction == "mean":
            errors = errors / max(1, p.numel())
        found.append(torch.stack([errors[0] - errors[1], *errors]))
    return torch.stack(found, 1).unbind()
