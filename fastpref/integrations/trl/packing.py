# SPDX-License-Identifier: Apache-2.0
"""A batch without its padding: all rows one after the other, in one row.

Positions start anew at each, by which transformers' attention (flash, flex, sdpa and eager alike)
keeps rows apart. A model that does not look at positions would let a row see the ones before it, so
that two rows are run both ways before the first batch is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Fused = Callable[..., Any]
TOGETHER = ("input_ids", "attention_mask", "labels", "fused_labels")
CHECKED = 32  # tokens a row


def packed_call(fused: Fused, arguments: dict[str, Any]) -> dict[str, Any]:
    """What ``fused(**arguments)`` returns, by name, of the same batch without padding.

    Args:
        fused: a model's forward that scores labels.
        arguments: ``input_ids``, ``attention_mask`` and ``labels`` or ``fused_labels``, each
            (B, T), and what is no tensor.

    Raises:
        ValueError: other tensors, which cannot be packed, or none of these.
    """
    others = {name: value for name, value in arguments.items() if name not in TOGETHER}
    odd = [name for name, value in others.items() if isinstance(value, Tensor) and value.dim()]
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    labels = arguments.get("labels")
    labels = arguments.get("fused_labels") if labels is None else labels
    if odd or ids is None or mask is None or labels is None:
        raise ValueError(
            "padding_free=True packs input_ids, attention_mask and labels; got "
            f"{', '.join(arguments)}. Set padding_free=False for batches of anything else"
        )
    kept = mask.bool()
    ahead = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), dim=1)
    output = fused(
        input_ids=ids[kept][None],
        position_ids=(kept.long().cumsum(1) - 1)[kept][None],
        shift_labels=ahead[kept][None],
        **others,
    )
    return {name: _in_rows(value, kept) for name, value in output.items()}


def _in_rows(value: Any, kept: Tensor) -> Any:
    """Of (1, N) by token (B, T - 1), 0 where there is padding."""
    if not isinstance(value, Tensor) or value.dim() != 2:
        return value
    rows = value.new_zeros(kept.shape).masked_scatter(kept.to(value.device), value)
    return rows[:, :-1]


def check_packing(model: nn.Module, fused: Fused, arguments: dict[str, Any]) -> bool:
    """Whether the model was seen to keep rows apart; not where there is one row only.

    Raises:
        RuntimeError: it does not.
    """
    mask = arguments["attention_mask"].bool()
    if len(mask) < 2:
        return False
    # The last row has others before it.
    some = {
        name: torch.cat((value[:1, :CHECKED], value[-1:, :CHECKED]))
        if isinstance(value, Tensor) and value.dim() == 2
        else value
        for name, value in arguments.items()
    }
    # Every token counts, also of a prompt.
    labels = some["input_ids"].masked_fill(~some["attention_mask"].bool(), -100)
    some = {**some, "labels": labels, "fused_labels": None, "num_items_in_batch": 1}
    with _undisturbed(model):
        padded = fused(**some).log_probs
        packed = packed_call(fused, some)["log_probs"]
    device = padded.device.type
    dtype = next(model.parameters()).dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    far, size = float((padded - packed).abs().amax()), float(padded.abs().amax())
    if far <= 1e-4 + 8 * torch.finfo(dtype).eps * size:
        return True
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    raise RuntimeError(
        f"padding_free=True needs a model that keeps packed rows apart by their positions; "
        f"{type(model).__name__} with attn_implementation={implementation!r} does not: "
        f"log-probabilities of packed rows are {far:.1e} away from those of padded ones. Set "
        "padding_free=False, or load the model with another attn_implementation"
    )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Without gradient and dropout, and with the random numbers as they were."""
    training = [module for module in model.modules() if module.training]
    with torch.no_grad(), torch.random.fork_rng():
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
