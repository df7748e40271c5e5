# SPDX-License-Identifier: Apache-2.0
"""One call from hidden states to the preference loss, and what it will cost.

Tokens are scored (scoring), summed by row (sequences), and compared (units). Every step is
differentiable by itself, so any objective and any upstream gradient go through in two passes; where
that would mean scoring rows twice and the loss is a sum over groups of rows, one pass does it batch
by batch (plan).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..objectives import Objective
from ..scoring import Plan, ScoringOptions, autograd, batches, linear_logprob
from ..scoring.api import ask, run_traced
from ..scoring.basis import WeightGradBasis
from ..scoring.head import Lora, opened
from ..scoring.transforms import needs_operators
from ..units import PreferenceOutput
from ..units.layouts import LayoutName
from ..units.loss import LossReduction
from .arguments import Arguments
from .plan import PreferencePlan, in_two_passes, plan_task
from .result import result_of
from .task import Task, compare_ranks, make_task


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
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    extras: Mapping[str, Tensor] | None = None,
    outputs: tuple[str, ...] = (),
    reduction: LossReduction = "mean",
    denominator: float | Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    seq_group: dist.ProcessGroup | None = None,
    dp_group: dist.ProcessGroup | None = None,
    options: ScoringOptions | None = None,
    lora: Lora | None = None,
    ref_lora: Lora | None = None,
    vocab_range: tuple[int, int] | None = None,
    reduce_hidden_grad: bool = True,
    weight_grad_basis: WeightGradBasis | tuple[Tensor, Tensor] | None = None,
    **hyperparameters: Any,
) -> PreferenceOutput:
    """The preference loss of a batch, from the hidden states that its head would take.

    Args:
        hidden: (B, T, H), or packed (N, H) or (1, N, H) with ``cu_seqlens``.
        weight: (V, H), the head, as ``nn.Linear`` stores it.
        target: (B, T), or packed (N,) or (1, N); int64, already shifted.
        objective: the name of one, an ``Objective``, or a pairwise function. It may be called
            several times for one loss: once a batch of one pass, before that at scores of 0 where
            its gradient's direction is fixed, and where memory runs out there again in two passes,
            with the random state of before.
        layout: which rows are compared. "halves": rows 0 to P - 1 are chosen, row P + p is rejected
            against row p, as TRL has them; "interleaved": row 2 p is chosen, row 2 p + 1 rejected;
            an index tensor (P, 2): the rows of each pair, chosen first; "groups": each
            ``group_size`` rows in turn are a list; "units": every row by itself. Objectives of
            single responses and of tokens take each row by itself.
        group_size: K, with layout="groups".
        cu_seqlens: (B + 1,) integer boundaries of packed rows. Not for objectives of tokens, whose
            rows are padded.
        bias: (V,), or None.
        ignore_index: target of a position that is not scored.
        temperature: greater than 0, of the policy and the reference; a number, or a tensor that
            broadcasts to ``target``, such as (B, 1) for one a row.
        logit_scale: multiplies the logits before the cap.
        softcap: greater than 0: the logit z becomes softcap tanh(z / softcap), or None.
        ref_logps: what the reference says, (B,) sums, or one a token like ``target`` (packed rows
            of one token each: sums); or
        ref_hidden: its hidden states, (..., H'), scored here without gradient, at one product, that
            rows of both at once would not spare, through
        ref_weight, ref_bias, ref_lora: its head; by default ``weight`` and ``bias``, not updated
            by ``lora``.
        token_weights: like ``target``, a factor of each token in the sums of policy and reference.
            Differentiable. A token of weight 0 contributes nothing, whatever its score, to loss,
            metrics and gradients, and is not even scored unless the weights need a gradient;
            lengths count it.
        extras: what else the objective takes, by name. Lengths and the like are filled in. A
            response without a scored token has log-probability 0, and mean 0 where an objective
            divides by lengths: it counts, as one that the policy is certain of.
        outputs: further metrics: "entropy", "mean_logits", "accuracy" (share of tokens that the
            policy finds likeliest).
        reduction: of the losses, over units: "mean", "sum" or "none".
        denominator: what the sum of the losses is divided by instead of their number, for
            accumulation over several batches: the number of units in all of them. A pipeline's
            schedule cuts micro-batches from rows in their order, between pairs where these are
            "interleaved"; "halves" would be cut apart. Objectives that divide by the batch's
            scored tokens (``bnpo``, ``dapo``, ``cispo``, ``vespo``) take
            B N / n, with B rows and n tokens in this batch and N tokens in all.
        seq_group: process group over which the tokens of each row are spread, in any way:
            contiguous parts, the pairs of parts of ring attention, whole rows, none on some ranks.
            Every rank passes its own tokens of all B rows, in the same order, and everything that
            is one a row alike. Shift before you spread: ``target`` of a rank's last token is the
            first token of the next part. A rank's gradients are those of its own tokens: those of
            the head and the model add up over the group (where DDP or FSDP average over it,
            multiply the loss by its size). For objectives of tokens each rank passes the extras of
            its own tokens, shaped like ``target``; every rank evaluates the loss of whole rows,
            whose tokens are gathered in the order of the ranks, which only a function of one's own
            may care for. They alone wait on the host, for the number of tokens of each rank.
        dp_group: process group of batch-wide statistics. Its ranks hold any number of rows each,
            none too, and every one of them must make the call, and run backward. With
            ``reduction="sum"`` the ranks' losses add up to that of one process with the whole
            batch, and so do the gradients; where gradients are averaged over W ranks, as by DDP,
            ``denominator`` P / W, of P units in all, makes it the mean. Objectives that sort or
            compare all pairs (``aot``, ``aot_unpaired``, ``relative_po``, ``disco``) wait on the
            host for the number of units of each rank; no others do.
        tp_group: process group over which the vocabulary is sharded, in rank order; ``weight``,
            ``bias`` and the reference's are local shards, all else is the same on every rank.
        options: backend, memory budget and schedule: ``ScoringOptions``.
        lora: (A, B, scale), A (r, H), B (V, r): the head's weight is weight + scale B A.
        vocab_range: vocabulary ids [start, stop) of the rows of ``weight``; the reference's head
            holds the same. None: all rows, shards in rank order.
        reduce_hidden_grad: with ``tp_group``, whether the gradient of hidden is summed over it.
        weight_grad_basis: (Q, out), Q (H, r) with orthonormal columns, out (V, r) float32, to which
            backward adds the weight's gradient times Q; ``weight`` must not need a gradient.
        hyperparameters: of the objective; those that are numbers may be one value a unit, (P,),
            (B,) or (G,), on the device of ``hidden``, 0 being allowed for ``beta`` (no weight).
            Differentiable.

    Returns:
        PreferenceOutput. No rows give loss 0, still connected to the graph. No host sync on CUDA
        beyond that of ``linear_logprob``.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
        torch.OutOfMemoryError: as ``linear_logprob``.
    """
    return _run(make_task(Arguments(**locals())))  # here the arguments alone, by name


def _run(task: Task) -> PreferenceOutput:
    if needs_operators(task.given.hidden):
        return _traced(task)
    compare_ranks(task)
    call = plan_task(task)
    reference = None
    if task.reference is not None and call.reference is not None:
        reference = autograd.run(call.reference, task.reference.models)
    models = task.main.models
    if call.batches is None or call.positions is None:
        return result_of(task, autograd.run(call.main, models), reference)
    loss, found = batches.score_with_loss(
        call.main,
        call.batches,
        call.positions,
        lambda outputs: result_of(task, outputs, reference).loss,
        models,
    )
    return result_of(task, found, reference, loss)


def _traced(task: Task) -> PreferenceOutput:
    """Two passes, whose operators choose their schedules when they run."""
    if torch.compiler.is_compiling() and task.main.request.options.schedule == "batches":
        raise ValueError("schedule='batches' is not traced by torch.compile; use schedule='auto'")
    objective, group = task.objective, task.given.seq_group
    if torch.compiler.is_compiling() and objective.unit == "token" and group is not None:
        raise ValueError(
            f"{objective.name} under seq_group is not traced by torch.compile: it waits for the "
            "number of tokens of each rank; call it outside what is compiled"
        )
    target, reference = task.batch.to_score, None
    if task.reference is not None:
        with torch.no_grad():
            reference = run_traced(in_two_passes(task.reference), target)
    return result_of(task, run_traced(in_two_passes(task.main), target), reference)


@overload
def explain(
    hidden: Tensor, weight: Tensor, target: Tensor, objective: None = None, **arguments: Any
) -> Plan: ...


@overload
def explain(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    objective: str | Objective | Callable[..., Any],
    **arguments: Any,
) -> PreferencePlan: ...


def explain(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    objective: str | Objective | Callable[..., Any] | None = None,
    **arguments: Any,
) -> Plan | PreferencePlan:
    """How ``linear_logprob`` would run for the same arguments, or with an objective
    ``preference_loss``: the schedule, its cost in u (one u is a product of 2 N H V flop) and its
    working memory in bytes.

    ``print(explain(...))`` gives one line. Nothing is computed.

    Args:
        hidden, weight, target: of that call. Their shapes, dtypes and devices and whether they need
            a gradient count, of ``target`` also which positions are scored.
        objective: a name, an ``Objective`` or a function, for ``preference_loss``; None for
            ``linear_logprob``.
        arguments: the call's further ones, by keyword.

    Returns:
        Plan, or PreferencePlan: ``schedule``, ``units`` and ``workspace_bytes``.

    Raises:
        ValueError, TypeError: as the call would.
    """
    function: Callable[..., Any] = linear_logprob if objective is None else preference_loss
    given = (hidden, weight, target, *(() if objective is None else (objective,)))
    bound = inspect.signature(function).bind(*given, **arguments)
    bound.apply_defaults()
    if objective is None:
        taken = bound.arguments
        if taken.pop("restrict_to") is not None:
            raise ValueError(
                "restrict_to has no schedule to explain: such a call forms no product and gathers "
                "K rows of the weight for each token; leave it None"
            )
        with opened(taken["weight_context"], weight, taken["bias"]):
            return ask(**taken).planned(target).plan
    return plan_task(make_task(Arguments(**bound.arguments))).explanation
