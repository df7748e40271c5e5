# SPDX-License-Identifier: Apache-2.0
"""The arguments of ``preference_loss`` as one value, and their checks.

Every error names the argument, what came, what was expected, and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..objectives import Objective
from ..objectives.checks import check_group, closest, no_tensor
from ..objectives.registry import extra_names, unset
from ..scoring import ScoringOptions
from ..scoring.basis import WeightGradBasis
from ..scoring.head import Lora
from ..scoring.validation import check_order
from ..scoring.whole import check_whole
from ..sequences.sums import check_boundaries
from ..units.filling import check_extras
from ..units.layouts import LayoutName
from ..units.loss import LossReduction, check_reduction
from .batch import Batch
from .metrics import check_outputs

_NEEDED = ("hidden", "weight", "target")
_TENSORS = (
    "hidden",
    "weight",
    "target",
    "cu_seqlens",
    "ref_logps",
    "ref_hidden",
    "ref_weight",
    "ref_bias",
    "token_weights",
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """By the names that they have there."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    objective: str | Objective | Callable[..., Any]
    layout: LayoutName | Tensor
    group_size: int | None
    cu_seqlens: Tensor | None
    bias: Tensor | None
    ignore_index: int
    temperature: float | Tensor
    logit_scale: float
    softcap: float | None
    ref_logps: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    token_weights: Tensor | None
    extras: Mapping[str, Tensor] | None
    outputs: tuple[str, ...]
    reduction: LossReduction
    denominator: float | Tensor | None
    tp_group: dist.ProcessGroup | None
    seq_group: dist.ProcessGroup | None
    dp_group: dist.ProcessGroup | None
    options: ScoringOptions | None
    lora: Lora | None
    ref_lora: Lora | None
    vocab_range: tuple[int, int] | None
    reduce_hidden_grad: bool
    weight_grad_basis: WeightGradBasis | tuple[Tensor, Tensor] | None
    hyperparameters: Mapping[str, Any]

    @property
    def scoring(self) -> dict[str, Any]:
        """What policy and reference are both scored with, as keywords of ``ask``."""
        names = ("ignore_index", "temperature", "logit_scale", "softcap", "options")
        ranks = ("tp_group", "vocab_range", "reduce_hidden_grad")
        return {name: getattr(self, name) for name in names + ranks}

    def are_sums(self, batch: Batch) -> bool:
        """Whether ``ref_logps`` are one number a row, and not one a token."""
        return self.ref_logps is not None and self.ref_logps.shape == (batch.rows,)


def flattened(given: Arguments) -> Arguments:
    """Packed rows of shape (1, N), as collators give them, as (N,)."""
    if given.cu_seqlens is None:
        return given
    tokens = {"target": 2, "token_weights": 2, "ref_logps": 2, "temperature": 2}
    tokens |= {"hidden": 3, "ref_hidden": 3}
    flat: dict[str, Any] = {}
    for name, dims in tokens.items():
        value = getattr(given, name)
        if isinstance(value, Tensor) and value.dim() == dims and value.shape[0] == 1:
            flat[name] = value[0]
    return replace(given, **flat) if flat else given


def check_kinds(given: Arguments) -> None:
    """What can be said without the objective."""
    for name in _TENSORS:
        value = getattr(given, name)
        if not isinstance(value, Tensor) and (value is not None or name in _NEEDED):
            raise no_tensor(name, value)
        # Of a sharded head ``ask`` takes the parts, and checks those.
        if value is not None and name in ("weight", "ref_weight") and given.tp_group is None:
            check_whole(name, value)
    ref_logps = given.ref_logps
    if ref_logps is not None and not ref_logps.is_floating_point():
        raise TypeError(f"ref_logps must be floating point, got {ref_logps.dtype}")
    check_extras(given.extras)
    check_group(given.seq_group, "seq_group")
    check_group(given.dp_group, "dp_group")
    check_reduction(given.reduction, given.denominator)
    check_outputs(given.outputs)


def check_hyperparameters(given: Arguments) -> None:
    """Raise TypeError where one is another argument misspelt; the objective refuses the others."""
    if not given.hyperparameters or torch.compiler.is_compiling():
        return
    objective = unset(given.objective)
    known = {*objective.signature.hyperparameters, *extra_names(objective)}
    for name in given.hyperparameters:
        if name in known:
            continue
        arguments = {field.name for field in fields(Arguments)} - {"hyperparameters"}
        found = closest(name, [*known, *arguments], {"ref_per_token_logps": "ref_logps"})
        if found and found[0] not in known:
            raise TypeError(
                f"preference_loss has no argument {name!r}, and {objective.name} no such "
                f"hyperparameter; did you mean {found[0]!r}?"
            )


def check_rows(given: Arguments, objective: Objective) -> None:
    target, cu_seqlens, token_weights = given.target, given.cu_seqlens, given.token_weights
    check_order(given.hidden, given.weight, target)
    wanted = 2 if cu_seqlens is None else 1
    if target.dim() != wanted:
        raise ValueError(
            "target must be (B, T), or (N,) or (1, N) with cu_seqlens, got "
            f"{tuple(target.shape)} {'without' if cu_seqlens is None else 'with'} cu_seqlens"
        )
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, target.shape[0])
    if objective.unit == "token" and cu_seqlens is not None:
        raise ValueError(
            f"{objective.name} works on tokens of padded (B, T) rows, got cu_seqlens; pad the batch"
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


def extras_of_tokens(given: Arguments, objective: Objective) -> tuple[str, ...]:
    """Those that ``seq_group`` spreads as it does the tokens: one value for each of this rank's.

    Raises:
        ValueError: naming one whose tokens are not those of ``target``.
    """
    if given.seq_group is None or objective.unit != "token":
        return ()
    found, shape = [], given.target.shape
    for name, value in (given.extras or {}).items():
        facts = objective.extras.get(name)
        if value.dim() < 2 or (facts is not None and "rows" in facts.shapes):
            continue
        if value.shape != shape:
            raise ValueError(
                f"extras: under seq_group {name} must be shaped like target, {tuple(shape)}, got "
                f"{tuple(value.shape)}; pass what belongs to this rank's own tokens"
            )
        found.append(name)
    return tuple(found)


def check_reference(given: Arguments, objective: Objective, batch: Batch) -> None:
    ref_logps, ref_hidden, ref_weight = given.ref_logps, given.ref_hidden, given.ref_weight
    if ref_logps is not None and ref_hidden is not None:
        raise ValueError("ref_logps and ref_hidden both say what the reference does; pass one")
    if ref_hidden is None and (ref_weight is not None or given.ref_bias is not None):
        name = "ref_weight" if ref_weight is not None else "ref_bias"
        raise ValueError(f"{name} scores ref_hidden, which is None; pass both")
    if ref_weight is None and given.ref_bias is not None:
        raise ValueError("ref_bias belongs to ref_weight, which is None; pass both")
    if ref_weight is not None and ref_weight.shape[:1] != given.weight.shape[:1]:
        raise ValueError(
            f"ref_weight must have the vocabulary of weight, {given.weight.shape[0]} rows, got "
            f"{tuple(ref_weight.shape)}; cut both heads to the ids they share, or pass ref_logps"
        )
    if ref_hidden is None and given.ref_lora is not None:
        raise ValueError(
            "ref_lora updates the head that scores ref_hidden, which is None; pass both"
        )
    none = ref_logps is None and ref_hidden is None
    if not none and "ref_token_logp" in (given.extras or {}):
        raise ValueError(
            f"{'ref_hidden' if ref_logps is None else 'ref_logps'} and "
            "extras={'ref_token_logp': ...} both say what the reference does; pass one"
        )
    if none and objective.needs_reference:
        raise ValueError(
            f"{objective.name} compares with a reference: pass ref_hidden (and ref_weight), or "
            "ref_logps; zeros for a uniform one"
        )
    if not none and not objective.needs_reference and objective.unit != "token":
        raise ValueError(
            f"{objective.name} takes no reference; leave ref_logps and ref_hidden None"
        )
    if ref_logps is not None:
        _check_ref_logps(given, ref_logps, objective, batch)


def _check_ref_logps(
    given: Arguments, ref_logps: Tensor, objective: Objective, batch: Batch
) -> None:
    shape, allowed = tuple(ref_logps.shape), [tuple(batch.target.shape)]
    if objective.unit != "token":
        allowed.append((batch.rows,))
    if shape not in allowed:
        wanted = " or ".join(map(str, allowed))
        rows = {"pair": "chosen and rejected rows in their order"}.get(objective.unit, "in order")
        remedy = f"one sum a row, {rows}" if objective.unit != "token" else "one value a token"
        raise ValueError(f"ref_logps must be {wanted}, got {shape}; {remedy}")
    if given.token_weights is not None and given.are_sums(batch):
        raise ValueError(
            "token_weights weigh the reference's tokens too, and sums cannot be weighed: got "
            f"ref_logps of shape {shape}; pass them per token, {tuple(batch.target.shape)}, or "
            "ref_hidden"
        )
