# SPDX-License-Identifier: Apache-2.0
"""Layer by layer, after SPINAL (arXiv:2601.06238): how fast the spectrum of a layer's activations
falls off, and how far its next layer moves the distribution that the head reads in them.

Of the paper it is contraction and transport; SPINALScore is not, since the weights of its parts and
the window of its fit are not known to us: the window is an argument here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.causal_lm.transform import LogitTransform
from ..objectives.checks import is_number, no_tensor
from ..scoring import ScoringOptions, linear_divergence
from .checks import check_batch, check_floats
from .responses import fused, moved, scored_labels

TAIL = 0.5


@torch.no_grad()
def layer_transport(
    hidden_a: Tensor,
    hidden_b: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    options: ScoringOptions | None = None,
) -> Tensor:
    """How far apart on the sphere of distributions two layers lie, as one head reads them, token by
    token: the Fisher-Rao length 2 arccos(BC), BC = sum_v sqrt(p q), in [0, pi].

    Streamed through the head: nothing of (N, V) is kept. With D = -log BC it is
    4 asin(sqrt(-expm1(-D) / 2)), which keeps the small angles that arccos(exp(-D)) loses.

    Args:
        hidden_a, hidden_b: (..., H), after whatever stands before the head, such as a final norm.
        weight, bias, softcap, logit_scale, temperature, options: as in ``linear_logprob``.
        mask: (...) bool, tokens that count; others are 0.

    Returns:
        (...) float32 (float64 for float64 products), without gradient.
    """
    # By the names that they have here.
    if not isinstance(weight, Tensor):
        raise no_tensor("weight", weight)
    for name, one in (("hidden_a", hidden_a), ("hidden_b", hidden_b)):
        if not isinstance(one, Tensor):
            raise no_tensor(name, one)
        if not one.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {one.dtype}; use {name}.float()")
        if one.dim() == 0 or weight.dim() != 2 or one.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{name} must be (..., H) and weight (V, H), got {tuple(one.shape)} and "
                f"{tuple(weight.shape)}"
            )
    if hidden_a.shape != hidden_b.shape:
        raise ValueError(
            f"hidden_b must have the shape of hidden_a, {tuple(hidden_a.shape)}, got "
            f"{tuple(hidden_b.shape)}; they are layers of the same tokens"
        )
    divergence = linear_divergence(
        hidden_a,
        weight,
        hidden_b,
        weight,
        mask,
        divergence="bhattacharyya",
        student_bias=bias,
        teacher_bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        options=options,
    )
    # Rounding may leave one below 0.
    share: Tensor = -torch.expm1(-divergence.clamp(min=0)) / 2
    angle: Tensor = 4 * torch.asin(share.sqrt())
    return angle


def layer_contraction(hidden: Tensor, *, tail: float = TAIL) -> Tensor:
    """By which power the singular values of activations fall off: minus the slope of log sigma_k
    over log k, by least squares over the last ``tail`` of them, 0-dim float64.

    Args:
        hidden: (N, H), a token a row, as they are: not centred.
        tail: in (0, 1], the share of the singular values, smallest ones, that is fitted. Those of
            rounding are left out first; where fewer than two are left the result is NaN.
    """
    check_floats(2, "(N, H)", hidden=hidden)
    _check_tail(tail)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    values: Tensor = torch.linalg.svdvals(hidden.detach().to(exact)).to(torch.float64)
    least = values[0] * torch.finfo(exact).eps * max(hidden.shape)
    values = values[values > least]
    count = len(values)
    if count < 2:
        return values.new_full((), torch.nan)
    first = count - min(count, max(2, math.ceil(tail * count)))
    ranks = torch.arange(1, count + 1, dtype=torch.float64, device=values.device)
    x, y = ranks[first:].log(), values[first:].log()
    x_off = x - x.mean()
    slope: Tensor = (x_off * (y - y.mean())).sum() / x_off.square().sum()
    return -slope


@dataclass(frozen=True)
class SpinalTrace:
    """From the embeddings (0) to the last layer, as the head reads it.

    - ``contraction``: of each of L + 1 layers.
    - ``transport``: from each layer to the next, L of them: means over tokens, in radians.
    - ``tokens``: how many the means are over.
    """

    contraction: list[float]
    transport: list[float]
    tokens: int

    def plot(self, path: str | Path, *, label: str = "model", others: Any = None) -> Path:
        """A picture of contraction and transport by layer. Needs matplotlib.

        Args:
            path: of the PNG.
            label: what this trace is called in it.
            others: further traces by their labels.

        Returns:
            ``path``.
        """
        from .pictures import draw_layers

        return draw_layers({label: self, **(others or {})}, Path(path))


@torch.no_grad()
def spinal(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    tail: float = TAIL,
    options: ScoringOptions | None = None,
) -> SpinalTrace:
    """Contraction and transport of each layer of a model of transformers, on a batch.

    Every layer is read through the model's final norm, which is found where its output is the last
    hidden state, the weight and bias of its head, and the scale and cap of its logits, which are
    measured as ``fuse_lm_head`` does.

    Args:
        model: a causal language model; it runs once, without its head.
        batch: ``input_ids`` (B, T), ``attention_mask`` or None; tokens that count are those of
            ``labels`` (or ``fused_labels``, ``completion_mask``) where there are any, else those
            attended to.
        tail: as in ``layer_contraction``.
        options: of scoring.
    """
    check_batch("batch", batch)
    _check_tail(tail)
    states, norm = _states(model, batch)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    logits = _logit_transform(model, batch)
    weight = head.weight[: logits.size]
    bias = None if head.bias is None else head.bias[: logits.size]
    labels = scored_labels(batch, required=False)
    attended = batch.get("attention_mask")
    mask = torch.ones(states[0].shape[:2], dtype=torch.bool, device=states[0].device)
    if labels is not None:
        mask[:, -1], mask[:, :-1] = False, labels.to(mask.device)[:, 1:] != -100
    elif attended is not None:
        mask = attended.to(mask.device).bool()
    count = int(mask.sum())
    if not count:
        raise ValueError("batch must have a token that counts; its labels are all -100")
    read = [norm(one)[mask] for one in states]
    given: dict[str, Any] = {"softcap": logits.softcap, "logit_scale": logits.scale}
    transport = [
        layer_transport(a, b, weight, bias=bias, options=options, **given)
        for a, b in itertools.pairwise(read)
    ]
    return SpinalTrace(
        contraction=[float(layer_contraction(one[mask], tail=tail)) for one in states],
        transport=[float(one.mean(dtype=torch.float64)) for one in transport],
        tokens=count,
    )


def _check_tail(tail: Any) -> None:
    if not is_number(tail) or not 0 < tail <= 1:
        raise ValueError(f"tail must be a number in (0, 1], got {tail!r}; 0.5 fits the lower half")


def _logit_transform(model: nn.Module, batch: Mapping[str, Any]) -> LogitTransform:
    """What the model makes of its head's outputs."""
    row = moved({"input_ids": batch["input_ids"][:1]}, model)["input_ids"]
    known: list[Any] = []
    with fused(model, known) as own:
        own(input_ids=row, labels=row, fused_lm_head=True)
    ((transform, _),) = known
    if not isinstance(transform, LogitTransform):
        raise ValueError(
            f"model must make logits of its head's outputs by a scale and a cap: {transform}; "
            "measure its hidden states with layer_transport"
        )
    return transform


def _states(model: nn.Module, batch: Mapping[str, Any]) -> tuple[list[Tensor], Any]:
    """(B, T, H) from embeddings to the last layer before the final norm, and that norm."""
    body = getattr(model, "base_model", None)
    if not isinstance(body, nn.Module) or not hasattr(model, "get_output_embeddings"):
        raise TypeError(
            f"model must be a transformers causal language model, got {type(model).__name__}; of "
            "a wrapped one pass what is wrapped, of PEFT's model.get_base_model()"
        )
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def look(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if len(given) == 1 and isinstance(output, Tensor) and isinstance(given[0], Tensor):
            if given[0].shape == output.shape:
                seen[:] = [(module, given[0], output)]

    # Whatever runs last among the body's own modules, without its layers.
    hooks = [module.register_forward_hook(look) for module in body.modules() if module is not body]
    was_training = model.training
    model.eval()
    try:
        inputs = moved({n: batch.get(n) for n in ("input_ids", "attention_mask")}, model)
        output = body(**inputs, output_hidden_states=True, use_cache=False, return_dict=True)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    states = list(output.hidden_states)
    if seen and seen[0][2].data_ptr() == states[-1].data_ptr():
        module, before, _ = seen[0]
        return [*states[:-1], before], module
    return states, nn.Identity()
