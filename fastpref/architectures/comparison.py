# SPDX-License-Identifier: Apache-2.0
"""One architecture's fused head against its full logits."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..integrations.causal_lm import fuse_lm_head
from ..integrations.causal_lm.fuse import STATE
from .configurations import FIRST_WORD, VOCABULARY, tiny

ROWS, LENGTH, UNSCORED = 2, 12, 4
SPREAD = 0.3  # of the head's weight, so that logits differ
TOLERANCE = 2e-5  # of log-probabilities, and of gradients relative to the largest

Verdict = Literal["exact", "falls back", "differs", "cannot be built", "cannot be run"]


class Result(NamedTuple):
    """Of one architecture."""

    name: str
    verdict: Verdict
    detail: str  # the largest error, or the reason


def compare(name: str) -> Result:
    """Log-probabilities of architecture ``name``, and their gradients at embeddings, the head's
    weight and its bias, in float32 and train mode without dropout."""
    try:
        model = _model(name)
    except Exception as error:
        return Result(name, "cannot be built", _short(error))
    try:
        ids, labels = _batch()
        expected = _expected(model, ids, labels)
    except Exception as error:
        return Result(name, "cannot be run", _short(error))
    try:
        fuse_lm_head(model)
        found = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
        gradients = torch.autograd.grad(_weighed(found), _leaves(model), allow_unused=True)
    except Exception as error:
        return Result(name, "differs", _short(error))
    errors = [_error(found, expected[0], 1.0)]
    for one, other in zip(gradients, expected[1:], strict=True):
        if one is not None and other is not None:
            errors.append(_error(one, other, float(other.abs().max())))
        elif one is not other:
            return Result(name, "differs", "in which parameters get a gradient")
    worst = max(errors)
    if not worst <= TOLERANCE:
        return Result(name, "differs", ", ".join(f"{error:.1e}" for error in errors))
    refusals = vars(model)[STATE].warned
    if refusals:
        return Result(name, "falls back", refusals[0])
    return Result(name, "exact", f"{worst:.1e}")


def _model(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(name), dtype=torch.float32).train()
    head = model.get_output_embeddings()
    for one in (getattr(head, "weight", None), getattr(head, "bias", None)):
        if isinstance(one, Tensor):
            torch.nn.init.normal_(one, std=SPREAD)
    return model


def _batch() -> tuple[Tensor, Tensor]:
    """Ids and labels, (ROWS, LENGTH)."""
    size = (ROWS, LENGTH)
    ids = torch.randint(FIRST_WORD, VOCABULARY, size, device="cpu", dtype=torch.int64)
    labels = ids.clone()
    labels[:, :UNSCORED] = -100
    return ids, labels


def _expected(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor | None, ...]:
    """Log-probabilities and gradients from the model's logits."""
    logits = model(input_ids=ids, return_dict=True).logits[:, :-1]
    if logits.shape[:2] != (ROWS, LENGTH - 1):
        raise ValueError(f"its logits are {tuple(logits.shape)} for {ROWS} rows of {LENGTH} ids")
    target = labels[:, 1:]
    logps = logits.float().log_softmax(-1)
    logps = logps.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    logps = torch.where(target != -100, logps, 0.0)
    gradients = torch.autograd.grad(_weighed(logps), _leaves(model), allow_unused=True)
    return logps.detach(), *gradients


def _weighed(logps: Tensor) -> Tensor:
    """A different weight for each token."""
    weights = torch.linspace(-1.0, 2.0, logps.numel(), device=logps.device, dtype=logps.dtype)
    return (logps * weights.view_as(logps)).sum()


def _leaves(model: Any) -> list[Tensor]:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    found = [getattr(embeddings, "weight", None), getattr(head, "weight", None)]
    found.append(getattr(head, "bias", None))
    return [one for one in found if isinstance(one, Tensor)]


def _error(found: Tensor, expected: Tensor | None, scale: float) -> float:
    if expected is None or not scale:
        return 0.0
    return float((found.detach() - expected).abs().max()) / scale


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:160]
