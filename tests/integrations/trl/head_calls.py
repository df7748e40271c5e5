# SPDX-License-Identifier: Apache-2.0
"""A small head, and TRL's fused function and fastpref's called with it alike."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.integrations.trl import OUTPUTS
from tests.integrations.trl.runs import RELEASE, plain_head

ALL = tuple(OUTPUTS)
WITHOUT_TRL = 'TRL is not installed (pip install "fastpref[trl]")'
N, H, V = 60, 24, 259
TILE = 128  # narrower than the vocabulary: TRL folds three tiles


def stock() -> Any:
    """TRL's function."""
    utils = pytest.importorskip("trl.trainer.utils", reason=WITHOUT_TRL)
    if RELEASE < (1, 15):
        pytest.skip("this TRL's has two outputs: test_older_trainers.py")
    return PlainHead if RELEASE == (1, 15) else utils._ChunkedLogProbFunction


class PlainHead:
    """In the place of TRL 1.15's, which runs on GPUs only."""

    apply = staticmethod(plain_head)


def make_inputs(
    dtype: torch.dtype = torch.float32, bias: bool = False, n: int = N
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    pytest.importorskip("transformers", reason=WITHOUT_TRL)  # the adapter asks it about ZeRO-3
    torch.manual_seed(0)
    hidden = torch.randn(n, H).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(V, H)).to(dtype).requires_grad_()
    b = torch.randn(V).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(0, V, (n,))
    targets[:1], targets[1:2] = 0, V - 1
    return hidden, weight, b, targets


def scores_and_gradients(
    apply: Any, inputs: tuple[Any, ...], upstream: dict[str, Tensor], **head: Any
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The five outputs by TRL's name, and the gradients of whatever of the inputs takes one."""
    hidden, weight, bias, targets = inputs
    out = apply(
        hidden,
        weight,
        bias,
        targets,
        head.get("temperature", 1.0),
        TILE,
        head.get("softcap"),
        head.get("logit_scale", 1.0),
        ALL,
    )
    values = dict(zip(OUTPUTS, out, strict=True))
    trained = [value for value in (hidden, weight, bias) if value is not None]
    trained = [value for value in trained if value.requires_grad]
    loss = sum((values[name] * grad).sum() for name, grad in upstream.items())
    return values, list(torch.autograd.grad(loss, trained))
