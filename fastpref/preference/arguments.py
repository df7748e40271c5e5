# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of ``preference_loss``.

Every error names the argument, what came, what was expected, and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..objectives import Objective
from ..scoring.head import Lora
from .filling import Batch
from .output import OUTPUTS

REDUCTIONS = ("mean", "sum", "none")


def is_sums(ref_logps: Tensor, batch: Batch) -> bool:
    """Whether these are one number a row, and not one a token."""
    return ref_logps.shape == (batch.rows,)


def check_tensors(**tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor) and (value is not None or name in ("target", "weight")):
            raise TypeError(
                f"{name} must be a torch.Tensor, got {type(value).__name__}; use torch.tensor()"
            )
    cu_seqlens, ref_logps = tensors["cu_seqlens"], tensors["ref_logps"]
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or not cu_seqlens.numel()):
        raise ValueError(f"cu_seqlens must be (B + 1,), got {tuple(cu_seqlens.shape)}")
    if ref_logps is not None and not ref_logps.is_floating_point():
        raise TypeError(f"ref_logps must be floating point, got {ref_logps.dtype}")


def check_extras(extras: Mapping[str, Tensor] | None) -> None:
    if extras is not None and not isinstance(extras, Mapping):
        raise TypeError(f"extras must map names to tensors, got {type(extras).__name__}")
    for name, value in (extras or {}).items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(
                "extras must map names to tensors, got "
                f"{type(name).__name__} {name!r}: {type(value).__name__}"
            )


def check_reduction(reduction: str, denominator: float | Tensor | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if denominator is not None and reduction == "none":
        raise ValueError("denominator divides a sum: with reduction='none' leave it None")
    if isinstance(denominator, Tensor):
        if denominator.dim() or denominator.dtype == torch.bool:
            raise ValueError(
                "denominator must be a number or a 0-dim tensor of one, got "
                f"{tuple(denominator.shape)} of {denominator.dtype}"
            )
        # Elsewhere reading it would wait for the device.
        if denominator.device.type != "cpu" or torch.compiler.is_compiling():
            return
    elif isinstance(denominator, bool) or not isinstance(denominator, int | float | None):
        raise TypeError(f"denominator must be a number, got {type(denominator).__name__}")
    if denominator is not None and not denominator > 0:
        raise ValueError(f"denominator must be positive, got {float(denominator)}")


def check_outputs(outputs: tuple[str, ...]) -> None:
    if not isinstance(outputs, tuple | list) or any(name not in OUTPUTS for name in outputs):
        hint = f"; write ({outputs!r},)" if isinstance(outputs, str) else ""
        raise ValueError(f"outputs must be a tuple of names among {OUTPUTS}, got {outputs!r}{hint}")


def check_rows(
    objective: Objective,
    target: Tensor,
    cu_seqlens: Tensor | None,
    seq_group: dist.ProcessGroup | None,
    token_weights: Tensor | None,
) -> None:
    wanted = 2 if cu_seqlens is None else 1
    if target.dim() != wanted:
        raise ValueError(
            "target must be (B, T), or (N,) with cu_seqlens, got "
            f"{tuple(target.shape)} {'without' if cu_seqlens is None else 'with'} cu_seqlens"
        )
    if objective.unit == "token" and (cu_seqlens is not None or seq_group is not None):
        given = "cu_seqlens" if cu_seqlens is not None else "seq_group"
        raise ValueError(
            f"{objective.name} works on tokens of padded (B, T) rows, got {given}; pad the batch"
        )
    if token_weights is not None and token_weights.shape != target.shape:
        raise ValueError(
            f"token_weights must be shaped like target, {tuple(target.shape)}, "
            f"got {tuple(token_weights.shape)}"
        )
    if token_weights is not None and objective.unit == "token":
        raise ValueError(
            f"{objective.name} weighs tokens by its advantages: give those as (B, T) instead of "
            "token_weights"
        )


def check_reference(
    objective: Objective,
    batch: Batch,
    weight: Tensor,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_lora: Lora | None,
    token_weights: Tensor | None,
) -> None:
    if ref_logps is not None and ref_hidden is not None:
        raise ValueError("ref_logps and ref_hidden both say what the reference does; pass one")
    if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
        name = "ref_weight" if ref_weight is not None else "ref_bias"
        raise ValueError(f"{name} scores ref_hidden, which is None; pass both")
    if ref_weight is None and ref_bias is not None:
        raise ValueError("ref_bias belongs to ref_weight, which is None; pass both")
    if ref_weight is not None and ref_weight.shape[:1] != weight.shape[:1]:
        raise ValueError(
            f"ref_weight must have the vocabulary of weight, {weight.shape[0]} rows, got "
            f"{tuple(ref_weight.shape)}; cut both heads to the ids they share, or pass ref_logps"
        )
    if ref_hidden is None and ref_lora is not None:
        raise ValueError(
            "ref_lora updates the head that scores ref_hidden, which is None; pass both"
        )
    none = ref_logps is None and ref_hidden is None
    if none and objective.needs_reference:
        raise ValueError(
            f"{objective.name} compares with a reference: pass ref_hidden (and ref_weight), or "
            "ref_logps; zeros for a uniform one"
        )
    if not none and not objective.needs_reference and objective.unit != "token":
        raise ValueError(
            f"{objective.name} takes no reference; leave ref_logps and ref_hidden None"
        )
    if ref_logps is None:
        return
    shape, allowed = tuple(ref_logps.shape), [tuple(batch.target.shape)]
    if objective.unit != "token":
        allowed.append((batch.rows,))
    if shape not in allowed:
        wanted = " or ".join(map(str, allowed))
        raise ValueError(f"ref_logps must be {wanted}, got {shape}")
    if token_weights is not None and is_sums(ref_logps, batch):
        raise ValueError(
            "token_weights weigh the reference's tokens too, and sums cannot be weighed: got "
            f"ref_logps of shape {shape}; pass them per token, {tuple(batch.target.shape)}, or "
            "ref_hidden"
        )
