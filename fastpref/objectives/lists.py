# SPDX-License-Identifier: Apache-2.0
"""The terms of the list objectives, of ``(G, K)`` responses some of which may be absent.

Responses are compared in pairs, ``[g, i, j]``: lists are short, nothing has to be sorted and put
back, and an absent response is in no pair. What stands in its place is replaced before anything is
computed from it, so that a NaN there reaches no value and no gradient.
"""

import torch
from torch import Tensor

from .terms import softplus


def masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """``values``, 0 where absent."""
    return values if mask is None else torch.where(mask.bool(), values, 0)


def compared(mask: Tensor | None, logps: Tensor) -> Tensor:
    """(G, K) bool: present, and not alone. A list of one compares nothing and its loss is 0."""
    present = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask.bool()
    return present & (present.sum(-1, keepdim=True) > 1)


def numbers(extra: Tensor, members: Tensor, utilities: Tensor) -> Tensor:
    """An extra in the precision of the loss; 0 where not among ``members``."""
    return torch.where(members, extra, 0).to(utilities.dtype)


def pairs(members: Tensor) -> Tensor:
    """(G, K, K) bool: i and j are both among ``members``, and not the same."""
    same = torch.eye(members.shape[-1], dtype=torch.bool, device=members.device)
    return members.unsqueeze(-1) & members.unsqueeze(-2) & ~same


def gaps(values: Tensor) -> Tensor:
    """(G, K, K): value i minus value j."""
    return values.unsqueeze(-1) - values.unsqueeze(-2)


def ranked_before(scores: Tensor | None, ranks: Tensor | None, members: Tensor) -> Tensor:
    """(G, K, K) bool: i is ranked before j. Ties keep input order."""
    if scores is not None and ranks is None:
        here, there = scores.unsqueeze(-1), scores.unsqueeze(-2)
    elif ranks is not None and scores is None:
        here, there = ranks.unsqueeze(-2), ranks.unsqueeze(-1)
    else:
        raise ValueError(
            "the order of a list is given by scores (larger is better) or ranks (1 = best), "
            f"exactly one of them, got {'neither' if scores is None else 'both'}"
        )
    place = torch.arange(members.shape[-1], dtype=torch.int64, device=members.device)
    earlier = place.unsqueeze(-1) < place
    return pairs(members) & ((here > there) | ((here == there) & earlier))


def positions(order: Tensor) -> Tensor:
    """(G, K): 1 for the first of ``order``, and for what it leaves out."""
    return 1 + order.sum(-2)


def first(order: Tensor) -> Tensor:
    """(G, K) bool: the best response of each list; none where nothing is compared."""
    return order.any(-1) & ~order.any(-2)


def lse_gap(utilities: Tensor, rivals: Tensor) -> Tensor:
    """(G, K): log of the sum over the rivals j of i of exp(u_j - u_i); very low without rivals."""
    # Not -inf: a row of them has a gradient of NaN, which the mask then drops but anomaly
    # detection reports.
    lowest = torch.finfo(utilities.dtype).min
    return torch.where(rivals, -gaps(utilities), lowest).logsumexp(-1)


def plackett_luce_nll(utilities: Tensor, order: Tensor) -> Tensor:
    """(G,): -log of the probability of ``order``, where each place goes to one of those left."""
    return softplus(lse_gap(utilities, order)).sum(-1)


def softmax(values: Tensor, members: Tensor) -> Tensor:
    """Over ``members``; 0 elsewhere."""
    lowest = torch.finfo(values.dtype).min
    return torch.where(members, torch.where(members, values, lowest).softmax(-1), 0)


def log_softmax(values: Tensor, members: Tensor) -> Tensor:
    """Over ``members``; 0 elsewhere."""
    lowest = torch.finfo(values.dtype).min
    return torch.where(members, torch.where(members, values, lowest).log_softmax(-1), 0)


def mean(values: Tensor, members: Tensor) -> Tensor:
    """(G,): over ``members``; 0 where there are none."""
    return torch.where(members, values, 0).sum(-1) / members.sum(-1).clamp(min=1)


def gains(scores: Tensor) -> Tensor:
    """What a response adds to the discounted cumulative gain (DCG) of a list at no discount."""
    return torch.exp2(scores) - 1


def lambda_nll(utilities: Tensor, scores: Tensor, order: Tensor, members: Tensor) -> Tensor:
    """(G,): the logistic losses of all pairs, each times the change in DCG if the two exchanged
    their places in ``order``. Equal scores make no pair."""
    discounts = 1 / positions(order).to(utilities.dtype).log1p()
    weights = gaps(gains(scores)).relu() * gaps(discounts).abs()
    losses = weights * softplus(-gaps(utilities))
    return torch.where(pairs(members), losses, 0).sum((-2, -1))
