# SPDX-License-Identifier: Apache-2.0
"""Batches that a model is given in another form than row beside row, filled up with padding.

Each form relies on what the model makes of masks and positions; a model that makes something else
of them would score other numbers and say nothing. So one sample is run both ways before the first
batch is, on every rank, whatever its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Fused = Callable[..., Any]  # a model's forward that scores labels
BY_TOKEN = ("input_ids", "attention_mask", "labels", "fused_labels")


class Rows(NamedTuple):
    """What a fused call was given, as a batch of padded rows."""

    ids: Tensor  # (B, T)
    kept: Tensor  # (B, T) bool, False where there is padding
    ahead: Tensor  # (B, T), the label of the token after each, -100 where none is scored
    others: dict[str, Any]  # no tensor by token


class Form(NamedTuple):
    """One such form."""

    setting: str  # of the trainer, that asks for it
    needs: str  # what a model must do, to follow "a model that"
    call: Callable[[nn.Module, Fused, Rows], dict[str, Any]]  # outputs by name, as of padded rows
    sample: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor] | None]
    """Of ids and mask those of a few rows and their labels; None where there are none to try."""


def rows_of(setting: str, arguments: dict[str, Any]) -> Rows:
    """The rows among the arguments of a fused call.

    Raises:
        ValueError: other tensors beside them, or none of these.
    """
    others = {name: value for name, value in arguments.items() if name not in BY_TOKEN}
    odd = [name for name, value in others.items() if isinstance(value, Tensor) and value.dim()]
    odd += [name for name in ("past_key_values",) if others.get(name) is not None]  # PEFT's prefix
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    labels = arguments.get("labels")
    labels = arguments.get("fused_labels") if labels is None else labels
    if odd or ids is None or mask is None or labels is None:
        raise ValueError(
            f"{setting}=True joins input_ids, attention_mask and labels; got "
            f"{', '.join(arguments)}. Set {setting}=False for batches of anything else"
        )
    ahead = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), dim=1)
    return Rows(ids, mask.bool(), ahead, others)


def check(model: nn.Module, fused: Fused, form: Form, rows: Rows) -> bool:
    """Whether a sample was seen to score the same both ways; not where the form has none to try.

    Raises:
        RuntimeError: it does not.
    """
    some = form.sample(rows.ids, rows.kept)
    if some is None:
        return False
    others = {**rows.others, "num_items_in_batch": 1}
    given = {"input_ids": some[0], "attention_mask": some[1].long(), "labels": some[2], **others}
    problem = None
    with _undisturbed(model):
        padded = fused(**given).log_probs
        try:
            joined = form.call(model, fused, rows_of(form.setting, given))["log_probs"]
        except Exception as error:
            # What a model raises that expects another mask, or other positions.
            problem = f"it raised {error!r}"
    if problem is None:
        device = padded.device.type
        dtype = next(model.parameters()).dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        far, size = float((padded - joined).abs().amax()), float(padded.abs().amax())
        if far <= 1e-4 + 8 * torch.finfo(dtype).eps * size:
            return True
        problem = f"log-probabilities are {far:.1e} away from those of padded rows"
    raise RuntimeError(
        f"{form.setting}=True needs a model that {form.needs}; {type(model).__name__} with "
        f"attn_implementation={attention_of(model)!r} does not: {problem}. Set "
        f"{form.setting}=False, or load the model with another attn_implementation"
    )


def attention_of(model: nn.Module) -> str | None:
    """The name of its implementation."""
    config = getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None)


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
