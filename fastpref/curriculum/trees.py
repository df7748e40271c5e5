# SPDX-License-Identifier: Apache-2.0
"""Pairs and weights of steps from trees of partial responses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives.reading import readable
from .checks import integers, numbers, same_shape, tensor


class StepPairs(NamedTuple):
    """Pairs of steps, in the order of their parents.

    - ``parent``: (S,) int64, the node whose text both continue.
    - ``chosen``: (S,) int64, the node of the better step.
    - ``rejected``: (S,) int64, that of the worse.
    - ``chosen_value``: (S,), the value of the chosen node.
    - ``rejected_value``: (S,), that of the rejected.
    """

    parent: Tensor
    chosen: Tensor
    rejected: Tensor
    chosen_value: Tensor
    rejected_value: Tensor


def tree_steps(parents: Tensor, values: Tensor) -> StepPairs:
    """Of every node with several continuations, the best and the worst.

    The step pairs of MCTS-DPO (Xie et al. 2024, arXiv:2405.00451), by the values Q that its tree
    search gave them: for the objective ``mcts_dpo`` with ``chosen_q_values`` and
    ``rejected_q_values``, on the tokens after the common prefix (``divergence_mask``). The search
    is not here, and the authors walk the selected path alone, where this takes every node. They
    rank by visits before Q, this by the values alone: of equal ones the first is the best and the
    last the worst. Nodes whose continuations all have one value make no pair. Waits for the device,
    as S depends on the tree.

    Args:
        parents: (N,) integer, the node that each continues; negative at roots.
        values: (N,), Q, higher is better.
    """
    parents = integers("parents", parents, "(N,)")
    values = numbers("values", values, "(N,)")
    same_shape("values", values, "parents", parents.shape)
    size = len(parents)
    places = torch.arange(size, dtype=torch.int64, device=parents.device)
    if readable(parents):
        wrong = ((parents >= size) | (parents == places)).nonzero()
        if len(wrong):
            node = int(wrong[0])
            raise ValueError(
                f"parents must be other nodes below N = {size}, got {int(parents[node])} for {node}"
            )
    # By parent, within it from the best on; of equal values the first first.
    order = values.argsort(descending=True, stable=True)
    order = order[parents[order].argsort(stable=True)]
    order = order[parents[order] >= 0]
    parent, counts = parents[order].unique_consecutive(return_counts=True)
    last = counts.cumsum(0) - 1
    chosen, rejected = order[last - counts + 1], order[last]
    apart = values[chosen] > values[rejected]
    parent, chosen, rejected = parent[apart], chosen[apart], rejected[apart]
    return StepPairs(parent.long(), chosen, rejected, values[chosen], values[rejected])


def step_rewards(hidden: Tensor, step_ids: Tensor, best: Tensor) -> Tensor:
    """TPO's adaptive weight of each step: how like the same step of the best response it is.

        v_k = 1 + cos(mean hidden state of step k, that of step k of the best response)

    Liao et al. 2024, arXiv:2410.12854, as in the authors' code but without gradient; the
    ``step_values`` of ``fastpref.sequences.step_weights``, for the objective ``tpo``. 0 for a step
    that the response or the best one does not have.

    Args:
        hidden: (B, T, H), of any floating dtype.
        step_ids: (B, T) integer, the step of each token, from 0; negative = none.
        best: (B,) integer, the row of the best response to the same prompt.

    Returns:
        (B, S) in [0, 2], S one more than the largest step. Waits for the device to know it.
    """
    tensor("hidden", hidden, "(B, T, H)")
    if not hidden.is_floating_point():
        raise TypeError(f"hidden must be floating point, got {hidden.dtype}")
    step_ids = integers("step_ids", step_ids, "(B, T)")
    same_shape("step_ids", step_ids, "the tokens of hidden", hidden.shape[:2])
    best = integers("best", best, "(B,)")
    same_shape("best", best, "the rows of hidden", hidden.shape[:1])
    if readable(best) and bool(((best < 0) | (best >= len(hidden))).any()):
        raise ValueError(f"best must be rows below B = {len(hidden)}, got {best.tolist()}")
    steps = int(step_ids.max()) + 1 if step_ids.numel() else 0
    steps = max(steps, 0)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # Tokens of no step are summed in a column of their own, the last one.
    columns = torch.where(step_ids < 0, steps, step_ids).long()
    states = hidden.detach().to(wide)
    states = states.masked_fill((step_ids < 0)[..., None], 0)
    sums = states.new_zeros(len(states), steps + 1, states.shape[2])
    sums = sums.scatter_add(1, columns[..., None].expand_as(states), states)[:, :-1]
    counts = states.new_zeros(len(states), steps + 1)
    counts = counts.scatter_add(1, columns, torch.ones_like(columns, dtype=wide))[:, :-1]
    cosine = torch.nn.functional.cosine_similarity(sums, sums[best], dim=-1)  # of sums as of means
    there = (counts > 0) & (counts[best] > 0)
    return torch.where(there, (1 + cosine).clamp(0, 2), 0)  # rounding leaves the range
