# SPDX-License-Identifier: Apache-2.0
"""``linear_logprob``: the public face of scoring."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from . import autograd, operators
from .agreement import refused_together
from .autograd import Outputs
from .basis import WeightGradBasis
from .head import Form, Head, Lora, Model, WeightContext, opened
from .packing import Packing
from .request import Call, Planned, Request, make_model, make_request, plan_target
from .restricted import restricted_scores
from .rules import Rule
from .rules.scores import Scores
from .sharded import local_parts
from .signature import Kept, signature_of
from .statistics import DIFFERENTIABLE, TokenScores
from .temperature import check_temperature
from .transforms import needs_operators
from .types import ScoringOptions
from .validation import check_ids, check_measured, check_outputs


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: tuple[str, ...] = ("logp",),
    tp_group: dist.ProcessGroup | None = None,
    vocab_range: tuple[int, int] | None = None,
    options: ScoringOptions | None = None,
    lora: Lora | None = None,
    weight_context: WeightContext | None = None,
    restrict_to: Tensor | None = None,
    reduce_hidden_grad: bool = True,
    weight_grad_basis: WeightGradBasis | tuple[Tensor, Tensor] | None = None,
) -> TokenScores:
    """Per-token log-probabilities of a linear head, within a bounded workspace: of the (tokens,
    vocabulary) logits no more is in memory at a time than ``options.memory_budget`` allows.

    With z = hidden @ weight.T + bias the logit is ``softcap * tanh(logit_scale * z / softcap) /
    temperature``, or ``logit_scale * z / temperature`` without a cap; scores follow from its
    softmax.

    Args:
        hidden: (..., H), float64, float32, bfloat16 or float16; hidden state that predicts
            ``target``. Need not be contiguous. Unscored rows are never read.
        weight: (V, H), as ``nn.Linear`` stores it. Where its dtype differs from hidden's both are
            promoted as torch does (bfloat16 with float16 to float32); under autocast the autocast
            dtype is used, unless one of them is float64. It is cast once per call.
        target: (...) int64, already shifted. A target outside [0, V) that is not ``ignore_index``
            gives NaN in its row.
        bias: (V,), or None. -inf takes an entry out of the vocabulary; under a softcap, which maps
            it to -softcap, it does not.
        ignore_index: target of a position that is not scored.
        temperature: greater than 0; a number, or a floating-point tensor that broadcasts to
            ``target``, such as (B, 1) for one a row: what each token was sampled at. It is not
            read where a position is not scored. On CPU values are checked, elsewhere one that is
            not greater than 0 gives NaN in its row. A tensor gets no gradient, and
            backend="triton" then hands over to "rows", as ``explain`` shows.
        logit_scale: multiplies z before the cap.
        softcap: greater than 0, or None.
        outputs: fields of TokenScores to compute. ``logp``, ``entropy``, ``mean_logits`` and
            ``lse`` are differentiable, for any upstream gradient; rows whose upstream gradient is 0
            cost no backward product on CPU. Without a softcap ``mean_logits`` cost no product, nor
            does their gradient: label smoothing by s is ``-(1 - s) logp - s (mean_logits - lse)``.
        tp_group: process group over which the vocabulary is sharded, in rank order; ``weight`` and
            ``bias`` are the local shard, ``hidden`` and ``target`` (global ids) are the same on
            every rank. Gradients of hidden are summed over the group. Weight and bias may be
            DTensors, Shard(0) over exactly these ranks, and hidden one of Replicate(). Ranks
            compare what decides how they run once for each weight and signature, and all raise
            where they differ; see "Several ranks" in fastpref/scoring/README.md.
        vocab_range: vocabulary ids [start, stop) of the weight's rows; rows beyond stop - start
            (padding) take no part. None: all rows, shards in rank order. Ranks of ``tp_group`` must
            hold ranges that follow on one another, in any order.
        options: see ScoringOptions.
        lora: (A, B, scale), A (r, H), B (V, r): the head's weight is weight + scale B A, which is
            never formed. Gradients go to A and B; ``weight`` must not need one. Costs a copy of the
            weight widened by r columns. Hu et al., arXiv:2106.09685.
        weight_context: for a partitioned head, as ZeRO-3 has: ``weight_context(weight, bias)`` is a
            context within which both hold their data. It is entered around every use of them,
            backward included. The gradient of a trained weight, of the shape it has there, arrives
            after that.
        restrict_to: (..., K) int64 or int32, for each token the ids that it was drawn from, as by a
            top-k or top-p sampler. All outputs are those of the softmax over these alone; such a
            call gathers K rows of the weight for each token, see ``linear_logits``, and forms no
            product. Negative ids are left out (pad sets of different sizes with -1), repeated ones
            counted once. A target that is not among them, or an id of V or more, gives NaN without
            gradient in its row. All outputs but ``log_sum_sq_probs`` and ``is_top1`` are
            differentiable.
        reduce_hidden_grad: with ``tp_group``, whether gradients of hidden, and of A of a ``lora``,
            are summed over it. False leaves each rank its own part, for a framework that sums them.
        weight_grad_basis: (Q, out), Q (H, r) with orthonormal columns, out (V, r) float32: every
            backward adds (gradient of the weight) @ Q to ``out``, in place, at r / H of that
            gradient's product, and forms nothing of the weight's size; ``weight`` must not need a
            gradient itself. ``out`` is this rank's: the shard's rows under ``tp_group``, its own
            tokens' under data parallelism, where the caller reduces it. Ask for it with a
            ``WeightGradBasis`` and the sums of squares of the gradient's columns in a transform are
            added to ``norms`` too, for one product more; not of mean_logits' gradient. See
            ``fastpref.optim``.

    Returns:
        TokenScores, tensors shaped like ``target``, float32 (float64 for float64 products), 0 at
        unscored positions.

    Workspace: at most ``explain(...).workspace_bytes``. Tiles and kept exponentials stay within
    ``options.memory_budget``; on top come a few (N, H) copies of rows, seven numbers a row, a cast
    weight where one is needed, and a fixed amount for temporaries of the torch backend. Where
    memory runs out, in forward or in backward, the call runs again with less, see ScoringOptions;
    backward then gives kept exponentials back and recomputes their rows.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
        RuntimeError: on a second derivative, and on one in forward mode. torch.func's grad, vjp,
            jacrev and vmap are served, and batches of upstream gradients, one at a time.
        torch.OutOfMemoryError: where even the least tile does not fit.
    """
    arguments = locals()  # here those alone, by name
    del arguments["restrict_to"]
    with opened(weight_context, weight, bias):
        asked = ask(**arguments)
        if restrict_to is not None:
            if weight_grad_basis is not None:
                raise ValueError(
                    "weight_grad_basis does not go with restrict_to, which gathers rows of the "
                    "weight and forms no product; leave one of them None"
                )
            check_ids(restrict_to, hidden, "restrict_to")
            model, names = asked.models[0], asked.rule.outputs
            own = asked.temperature
            return restricted_scores(asked.request, model, target, restrict_to, names, own)
        return TokenScores._make(run(asked, target))


class _Checked(NamedTuple):
    """What follows from a call's signature."""

    request: Request
    rule: Rule
    form: Form
    plans: Kept[Planned]


# A plan takes two kilobytes, and where batches differ in what they score hardly one returns.
MOST_SIGNATURES, MOST_PLANS = 256, 8
_KEPT: Kept[_Checked] = Kept(MOST_SIGNATURES)


class Asked(NamedTuple):
    """What is asked of which models, checked."""

    request: Request
    rule: Rule
    models: list[Model]
    temperature: Tensor | None = None  # like the target, where positions have their own
    plans: Kept[Planned] | None = None  # of the same request, rule and heads

    def planned(self, target: Tensor, packing: Packing | None = None, active: float = 1.0) -> Call:
        """As ``plan_target``."""
        request, rule, models, temperature, kept = self
        return plan_target(request, rule, models, target, packing, False, active, temperature, kept)


def ask(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("logp",),
    differentiable: tuple[str, ...] = DIFFERENTIABLE,
    options: ScoringOptions | None = None,
    temperature: float | Tensor = 1.0,
    **head: Any,
) -> Asked:
    """The arguments of ``linear_logprob``, checked, those in ``head`` by ``make_model``;
    ``differentiable`` are the outputs that can receive a gradient.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
    """
    asked = functools.partial(
        _asked,
        target=target,
        ignore_index=ignore_index,
        outputs=outputs,
        differentiable=differentiable,
        options=options,
        temperature=temperature,
    )
    if head.get("tp_group") is None:
        return asked(hidden, weight, head)
    with refused_together(head["tp_group"]):
        return asked(*local_parts(hidden, weight, head))


def _asked(
    hidden: Tensor,
    weight: Tensor,
    head: dict[str, Any],
    *,
    target: Tensor,
    ignore_index: int,
    outputs: tuple[str, ...],
    differentiable: tuple[str, ...],
    options: ScoringOptions | None,
    temperature: float | Tensor,
) -> Asked:
    by_row = temperature if isinstance(temperature, Tensor) else None
    number = 1.0 if isinstance(temperature, Tensor) else temperature

    def checked() -> _Checked:
        model = make_model(hidden, weight, target, temperature=number, **head)
        names = check_outputs(outputs)
        if "mean_logits" in names and "mean_logits" in differentiable:
            check_measured(model.head.form.basis)
        rule = Scores(names, tuple(name for name in differentiable if name in names))
        request = make_request([model], ignore_index=ignore_index, options=options)
        return _Checked(request, rule, model.head.form, Kept(MOST_PLANS))

    signature = signature_of(
        {
            "hidden": hidden,
            "weight": weight,
            "target": target,
            "ignore_index": ignore_index,
            "outputs": outputs,
            "differentiable": differentiable,
            "options": options,
            "temperature": number,
            **head,
        }
    )
    request, rule, form, plans = _KEPT.of(signature, checked)
    own = None if by_row is None else check_temperature(by_row, target)
    lora_a, lora_b, _ = head.get("lora") or (None, None, None)
    model = Model(hidden, Head(weight, head.get("bias"), lora_a, lora_b, form))
    return Asked(request, rule, [model], own, plans)


def run(asked: Asked, target: Tensor) -> Outputs:
    """The outputs of the rule that is asked for."""
    if needs_operators(asked.models[0].hidden):
        return run_traced(asked, target)
    return autograd.run(asked.planned(target), asked.models)


def run_traced(asked: Asked, target: Tensor) -> Outputs:
    """As an operator, which chooses its schedule when it runs."""
    found = operators.OF_RULE[type(asked.rule)].run(*asked[:3], target, asked.temperature)
    names = zip(asked.rule.output_names, found, strict=True)
    return tuple(one if name in asked.rule.outputs else None for name, one in names)
