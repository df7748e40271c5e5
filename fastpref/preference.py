# SPDX-License-Identifier: Apache-2.0
"""One call from hidden states to the preference loss.

Tokens are scored (scoring), summed by row (sequences), arranged as the objective's units (layouts),
and evaluated (pair_head, objectives). Every step is differentiable by itself, so any objective and
any upstream gradient go through; two passes over the weight where only hidden needs a gradient,
three where both do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .evaluation import Evaluated, evaluate
from .filling import Batch, Material, filled_extras, policy_scores, reference_scores
from .layouts import Arrangement, LayoutName, arrange
from .objectives import Objective, as_objective
from .scoring import ScoringOptions, TokenScores, linear_logprob
from .scoring.vocab_parallel import vocabulary_size

OUTPUTS = ("entropy", "mean_logits", "accuracy")
REDUCTIONS = ("mean", "sum", "none")


class _Fields(NamedTuple):
    loss: Tensor
    losses: Tensor
    rewards: Tensor
    logps: Tensor
    ref_logps: Tensor | None
    metrics: dict[str, Tensor]


class PreferenceOutput(_Fields):
    """What ``preference_loss`` returns.

    - ``loss``: 0-dim, or one a unit with ``reduction="none"``. Differentiable.
    - ``losses``: one a unit, (P,), (B,) or (G,). Detached.
    - ``rewards``: (B,), in row order. Detached.
    - ``logps``: (B,), the policy's sums in row order. Differentiable.
    - ``ref_logps``: (B,), or None without a reference. Detached.
    - ``metrics``: 0-dim tensors by the names that TRL logs. Detached.
    """

    arrangement: Arrangement | None = None

    @property
    def chosen_logps(self) -> Tensor:
        """(P,), of pairs."""
        return self._side(self.logps, 0)

    @property
    def rejected_logps(self) -> Tensor:
        """(P,), of pairs."""
        return self._side(self.logps, 1)

    @property
    def chosen_rewards(self) -> Tensor:
        """(P,), of pairs."""
        return self._side(self.rewards, 0)

    @property
    def rejected_rewards(self) -> Tensor:
        """(P,), of pairs."""
        return self._side(self.rewards, 1)

    def _side(self, rows: Tensor, side: int) -> Tensor:
        if self.arrangement is None:
            raise AttributeError(
                "an output that was rebuilt from its fields no longer knows its layout; take "
                "chosen and rejected rows from what preference_loss returned"
            )
        sides = self.arrangement.split(rows)
        if len(sides) != 2:
            raise AttributeError("chosen and rejected rows are those of a pairwise objective")
        return sides[side]


def preference_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    objective: str | Objective | Callable[..., Any],
    *,
    layout: LayoutName | Tensor = "halves",
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    extras: Mapping[str, Tensor] | None = None,
    outputs: tuple[str, ...] = (),
    reduction: Literal["mean", "sum", "none"] = "mean",
    denominator: float | Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    seq_group: dist.ProcessGroup | None = None,
    dp_group: dist.ProcessGroup | None = None,
    options: ScoringOptions | None = None,
    **hyperparameters: Any,
) -> PreferenceOutput:
    """The preference loss of a batch, from the hidden states that its head would take.

    Args:
        hidden: (B, T, H), or packed (N, H) with ``cu_seqlens``.
        weight, bias, ignore_index, temperature, logit_scale, softcap, tp_group, options: as in
            ``linear_logprob``.
        target: (B, T) or (N,) int64, already shifted.
        objective: the name of one, an ``Objective``, or a pairwise function.
        layout: which rows are compared, see layouts.py. Objectives of single responses and of
            tokens take each row by itself.
        group_size: K, with layout="groups".
        cu_seqlens: (B + 1,) integer boundaries of packed rows.
        ref_logps: what the reference says, (B,) sums, or one a token like ``target`` (packed rows
            of one token each: sums); or
        ref_hidden: its hidden states, (..., H'), scored here without gradient, through
        ref_weight, ref_bias: its head; by default ``weight`` and ``bias``.
        token_weights: like ``target``, a factor of each token in the sums of policy and reference.
            Differentiable.
        extras: what else the objective takes, by name. Lengths and the like are filled in.
        outputs: further metrics: "entropy", "mean_logits", "accuracy" (share of tokens that the
            policy finds likeliest).
        reduction: of the losses, over units.
        denominator: what the sum of the losses is divided by instead of their number, for
            accumulation over several batches: the number of units in all of them. Objectives that
            divide by the batch's scored tokens (``bnpo``, ``dapo``, ``cispo``) take B N / n, with
            B rows and n tokens in this batch and N tokens in all.
        seq_group: process group over which the tokens of each row are spread.
        dp_group: process group of batch-wide statistics.
        hyperparameters: of the objective.

    Returns:
        PreferenceOutput. No host sync on CUDA beyond that of ``linear_logprob``.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
    """
    _check_tensors(
        target=target,
        cu_seqlens=cu_seqlens,
        ref_logps=ref_logps,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        token_weights=token_weights,
    )
    _check_extras(extras)
    run = _configured(objective, dp_group, hyperparameters)
    _check_reduction(reduction, denominator)
    _check_outputs(outputs)
    _check_rows(run, target, cu_seqlens, seq_group, token_weights)
    batch = Batch(target, ignore_index, cu_seqlens, seq_group)
    arrangement = arrange(layout, group_size, batch.rows, run)
    _check_reference(run, batch, ref_logps, ref_hidden, ref_weight, ref_bias, token_weights)
    given = dict(extras or {})

    def score(states: Tensor, head: Tensor, shift: Tensor | None, names: set[str]) -> TokenScores:
        return linear_logprob(
            states,
            head,
            target,
            bias=shift,
            ignore_index=ignore_index,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            outputs=tuple(sorted(names)),
            tp_group=tp_group,
            options=options,
        )

    ref_tokens = None
    if ref_hidden is not None:
        ref_head = (weight, bias) if ref_weight is None else (ref_weight, ref_bias)
        with torch.no_grad():
            ref_tokens = score(ref_hidden, *ref_head, reference_scores(run, given))
    elif ref_logps is not None and not _is_sums(ref_logps, batch):
        ref_tokens = TokenScores(logp=ref_logps.detach())
    policy = score(hidden, weight, bias, policy_scores(run, given) | _scores_of(outputs))
    sums = batch.sums(_logp(policy), token_weights)
    ref_sums = None if ref_logps is None else ref_logps.detach()
    if ref_tokens is not None:
        ref_sums = batch.sums(_logp(ref_tokens), token_weights)
    scored_by = weight if ref_weight is None else ref_weight
    material = Material(
        batch,
        arrangement,
        sums,
        policy,
        ref_tokens,
        lambda: vocabulary_size(tp_group, scored_by.shape[0], weight.device),
    )
    evaluated = evaluate(run, sums, ref_sums, material, filled_extras(run, given, material))
    return _output(evaluated, sums, ref_sums, material, outputs, reduction, denominator)


def _is_sums(ref_logps: Tensor, batch: Batch) -> bool:
    """Whether these are one number a row, and not one a token."""
    return ref_logps.shape == (batch.rows,)


def _configured(
    objective: str | Objective | Callable[..., Any],
    dp_group: dist.ProcessGroup | None,
    hyperparameters: Mapping[str, Any],
) -> Objective:
    run = as_objective(objective, **hyperparameters)
    if dp_group is not None and "dp_group" in run.signature.hyperparameters:
        run = run.replace(dp_group=dp_group)
    return run


def _output(
    evaluated: Evaluated,
    sums: Tensor,
    ref_sums: Tensor | None,
    material: Material,
    outputs: tuple[str, ...],
    reduction: str,
    denominator: float | Tensor | None,
) -> PreferenceOutput:
    losses = evaluated.losses
    if reduction == "mean" and denominator is None:
        loss = losses.mean()
    else:
        loss = losses if reduction == "none" else losses.sum()
        loss = loss if denominator is None else loss / denominator
    metrics = evaluated.metrics | _further_metrics(outputs, material)
    output = PreferenceOutput(loss, losses.detach(), evaluated.rewards, sums, ref_sums, metrics)
    output.arrangement = material.arrangement
    return output


def _scores_of(outputs: tuple[str, ...]) -> set[str]:
    names = {"entropy": "entropy", "mean_logits": "mean_logits", "accuracy": "is_top1"}
    return {names[name] for name in outputs}


def _further_metrics(outputs: tuple[str, ...], material: Material) -> dict[str, Tensor]:
    """Means over all scored tokens; of pairs, logits by side and accuracy on the chosen one, as
    TRL has them."""
    policy, batch, split = material.policy, material.batch, material.arrangement.split
    metrics = {}
    if "entropy" in outputs and policy.entropy is not None:
        metrics["entropy"] = _mean(batch.sums(policy.entropy.detach()), batch.lengths)
    if "mean_logits" in outputs and policy.mean_logits is not None:
        sides = zip(split(batch.sums(policy.mean_logits)), split(batch.lengths), strict=True)
        means = [_mean(sums, lengths) for sums, lengths in sides]
        names = ("logits/chosen", "logits/rejected") if len(means) == 2 else ("logits/mean",)
        metrics |= dict(zip(names, means, strict=True))
    if "accuracy" in outputs and policy.is_top1 is not None:
        hits = batch.sums(policy.is_top1.float())
        metrics["mean_token_accuracy"] = _mean(split(hits)[0], split(batch.lengths)[0])
    return metrics


def _mean(sums: Tensor, lengths: Tensor) -> Tensor:
    return sums.sum() / lengths.sum().clamp(min=1)


def _logp(scores: TokenScores) -> Tensor:
    if scores.logp is None:
        raise RuntimeError("logp was not asked for")
    return scores.logp


def _check_tensors(**tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor) and (value is not None or name == "target"):
            raise TypeError(
                f"{name} must be a torch.Tensor, got {type(value).__name__}; use torch.tensor()"
            )
    cu_seqlens, ref_logps = tensors["cu_seqlens"], tensors["ref_logps"]
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or not cu_seqlens.numel()):
        raise ValueError(f"cu_seqlens must be (B + 1,), got {tuple(cu_seqlens.shape)}")
    if ref_logps is not None and not ref_logps.is_floating_point():
        raise TypeError(f"ref_logps must be floating point, got {ref_logps.dtype}")


def _check_extras(extras: Mapping[str, Tensor] | None) -> None:
    if extras is not None and not isinstance(extras, Mapping):
        raise TypeError(f"extras must map names to tensors, got {type(extras).__name__}")
    for name, value in (extras or {}).items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(
                "extras must map names to tensors, got "
                f"{type(name).__name__} {name!r}: {type(value).__name__}"
            )


def _check_reduction(reduction: str, denominator: float | Tensor | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if isinstance(denominator, Tensor):
        if denominator.dim():
            raise ValueError(
                f"denominator must be a number or a 0-dim tensor, got {tuple(denominator.shape)}"
            )
    elif isinstance(denominator, bool) or not isinstance(denominator, int | float | None):
        raise TypeError(f"denominator must be a number, got {type(denominator).__name__}")
    elif denominator is not None and not denominator > 0:
        raise ValueError(f"denominator must be positive, got {denominator!r}")
    if denominator is not None and reduction == "none":
        raise ValueError("denominator divides a sum: with reduction='none' leave it None")


def _check_outputs(outputs: tuple[str, ...]) -> None:
    if not isinstance(outputs, tuple | list) or any(name not in OUTPUTS for name in outputs):
        raise ValueError(f"outputs must be a tuple of names among {OUTPUTS}, got {outputs!r}")


def _check_rows(
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


def _check_reference(
    objective: Objective,
    batch: Batch,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    token_weights: Tensor | None,
) -> None:
    if ref_logps is not None and ref_hidden is not None:
        raise ValueError("ref_logps and ref_hidden both say what the reference does; pass one")
    if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
        name = "ref_weight" if ref_weight is not None else "ref_bias"
        raise ValueError(f"{name} scores ref_hidden, which is None; pass both")
    if ref_weight is None and ref_bias is not None:
        raise ValueError("ref_bias belongs to ref_weight, which is None; pass both")
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
    if token_weights is not None and _is_sums(ref_logps, batch):
        raise ValueError(
            "token_weights weigh the reference's tokens too, and sums cannot be weighed: got "
            f"ref_logps of shape {shape}; pass them per token, {tuple(batch.target.shape)}, or "
            "ref_hidden"
        )
