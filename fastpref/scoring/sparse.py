# SPDX-License-Identifier: Apache-2.0
"""``sparse_divergence``: how far a student's distribution over the vocabulary lies from a teacher's
of which the log-probabilities of some ids are stored.

With t the student's logits, y the chosen id with the largest one and k any chosen id,

    log q[k] = (t[k] - t[y]) + log q[y].

log q[y] comes from ``linear_logprob``: one product, in any schedule. By way of lse, gradients would
cost a product more, and those of a token that both models are sure of would be the difference of
two large numbers, each rounded to the dtype of the parameters.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import refused_together
from .api import linear_logprob
from .chosen import chosen_logits
from .head import Lora, WeightContext, opened
from .request import make_model, make_request
from .sharded import local_parts
from .types import ScoringOptions
from .validation import check_ids, check_mask, check_teacher_logps

SparseKind = Literal["forward_kl", "reverse_kl"]
Tail = Literal["ignore", "bucket"]

_KINDS, _TAILS = ("forward_kl", "reverse_kl"), ("ignore", "bucket")
_IGNORED = -1  # pseudo-target of a position that is not wanted


def sparse_divergence(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    teacher_logps: Tensor,
    mask: Tensor | None = None,
    *,
    divergence: SparseKind = "forward_kl",
    tail: Tail = "ignore",
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_range: tuple[int, int] | None = None,
    options: ScoringOptions | None = None,
    lora: Lora | None = None,
    weight_context: WeightContext | None = None,
    reduce_hidden_grad: bool = True,
) -> Tensor:
    """The divergence of a student from a teacher of which only the log-probabilities of K ids a
    token are known, such as its top-k, stored once; per token, within a workspace that is bounded
    by ``options.memory_budget``.

    With p = exp(teacher_logps) and q the student's softmax over the whole vocabulary, sums running
    over the K ids alone:

    - "forward_kl": sum p log(p / q).
    - "reverse_kl": sum q log(q / p).

    What the teacher has beside these ids is its tail, 1 - sum p:

    - tail="ignore": it takes no part. p is used as given, not renormalised, so that the result is
      no divergence of two distributions and may be negative.
    - tail="bucket": all other ids count as one more, of probability 1 - sum p and 1 - sum q, so
      that both sum to 1 and the result is at least 0. Each tail counts for no less than the
      machine epsilon (1.2e-7 for float32), below which it gives no gradient.

    Args:
        hidden: (..., H), float64, float32, bfloat16 or float16, the student's.
        weight: (V, H), the student's.
        ids: (..., K) int64 or int32, distinct for each token. Negative ones are left out: pad with
            -1 where numbers differ. One of V or more gives NaN without gradient in its row.
        teacher_logps: (..., K) floating point, the teacher's log-probability of each id; -inf is a
            probability of 0. Never given a gradient.
        mask: (...) bool, True where the divergence is wanted; elsewhere hidden, ids and
            teacher_logps are not read. None: everywhere.
        bias, temperature, logit_scale, softcap, lora, weight_context: the student's, as in
            ``linear_logprob``; ``teacher_logps`` must have been taken at the same temperature, a
            number.
        tp_group, vocab_range, reduce_hidden_grad: as there; ids are global and the same on every
            rank.
        options: see ScoringOptions.

    Returns:
        (...) float32 (float64 for float64 products), 0 where masked and where all ids are left out;
        differentiable with respect to hidden, weight, bias and lora. Infinite, with no gradient of
        that id, where an id has weight on one side and a probability of 0 on the other.

    Cost: that of ``linear_logprob`` for ``logp``, one product of 2 N H V flop and one for each of
    hidden and weight that needs a gradient, in the schedule that ``explain(hidden, weight,
    ids[..., 0])`` shows, and that of ``linear_logits``.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
        RuntimeError: on a second derivative.
        torch.OutOfMemoryError: where even the least tile does not fit.
    """
    head: dict[str, Any] = {
        "bias": bias,
        "temperature": temperature,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "tp_group": tp_group,
        "vocab_range": vocab_range,
        "lora": lora,
        "weight_context": weight_context,
        "reduce_hidden_grad": reduce_hidden_grad,
    }
    with refused_together(tp_group), opened(weight_context, weight, bias):
        if divergence not in _KINDS:
            raise ValueError(f"divergence must be one of {', '.join(_KINDS)}; got {divergence!r}")
        if tail not in _TAILS:
            raise ValueError(f"tail must be one of {', '.join(_TAILS)}; got {tail!r}")
        hidden, weight, head = local_parts(hidden, weight, head)
        check_ids(ids, hidden, "ids")
        check_teacher_logps(teacher_logps, ids)
        check_mask(mask, hidden, "hidden")
        given = ids >= 0
        wanted = given.any(-1) if mask is None else given.any(-1) & mask
        target = torch.zeros_like(wanted, dtype=torch.int64).masked_fill(~wanted, _IGNORED)
        model = make_model(hidden, weight, target, **head)
        request = make_request([model], ignore_index=_IGNORED, options=options)
        logits = chosen_logits(request, model, ids, target)
    # A row with an id outside the vocabulary has no answer, and must make none of the others NaN.
    known = wanted & ~(given & logits.isnan()).any(-1)
    counted = given & known[..., None]
    first = _largest(logits, counted)
    target = ids.gather(-1, first)[..., 0].to(torch.int64).masked_fill(~known, _IGNORED)
    own = {"ignore_index": _IGNORED, "options": options, **head}
    logp = linear_logprob(hidden, weight, target, **own).logp
    if logp is None:
        raise RuntimeError("no log-probabilities were asked for")
    log_q = (logits - logits.gather(-1, first)) + logp[..., None]
    log_q = log_q.masked_fill(~counted | (logits == -torch.inf), -torch.inf)
    log_p = teacher_logps.detach().to(log_q.dtype).masked_fill(~counted, -torch.inf)
    value = _terms(divergence, log_q, log_p).sum(-1)
    if tail == "bucket":
        log_tail_p = _log_tail(log_p, _largest(log_p, counted))
        value = value + _terms(divergence, _log_tail(log_q, first), log_tail_p)
    return value.masked_fill(~known, torch.nan).masked_fill(~wanted, 0)


def _largest(values: Tensor, counted: Tensor) -> Tensor:
    """(..., 1) place of the largest of each row's values that are counted, -inf too."""
    lowest = torch.finfo(values.dtype).min
    return values.detach().clamp(min=lowest).masked_fill(~counted, -torch.inf).argmax(-1, True)


def _terms(divergence: SparseKind, log_q: Tensor, log_p: Tensor) -> Tensor:
    """What each id adds: nothing where its weight is 0, and infinity, without gradient, where the
    other side's probability is."""
    weight, ratio = log_p.exp(), log_p - log_q
    if divergence == "reverse_kl":
        weight, ratio = log_q.exp(), log_q - log_p
    without, infinite = weight == 0, ratio.isinf()
    # 0 times infinity, in the gradient too, would be NaN.
    terms = weight * ratio.masked_fill(without | infinite, 0)
    return terms.masked_fill(infinite & ~without, torch.inf)


def _log_tail(log_probs: Tensor, largest: Tensor) -> Tensor:
    """log(1 - sum exp(log_probs)), the tail being epsilon at least."""
    # 1 less the largest is exact, and all that is subtracted from it is small beside 1.
    top = log_probs.gather(-1, largest)[..., 0]
    others = log_probs.exp().scatter(-1, largest, 0).sum(-1)
    rest = -torch.expm1(top) - others
    return rest.clamp(min=torch.finfo(rest.dtype).eps).log()
