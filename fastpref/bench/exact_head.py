# SPDX-License-Identifier: Apache-2.0
"""The mean negative log-probability of a head's targets, known in float64 for a few rows and a few
vocabulary entries: at the size of a real head all of it would take longer than what is measured."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .work import ROWS_OF_A_BLOCK

ROWS, LAST, COLUMNS = 64, 8, 256
SLAB = 16384  # of the vocabulary


class Sample(NamedTuple):
    rows: Tensor  # which of the N
    columns: Tensor  # which of the V
    loss: Tensor  # minus the mean log-probability of all N
    scores: tuple[Tensor, ...]  # log-probability, entropy and mean logit of ``rows``
    d_hidden: Tensor  # of the loss, (rows, H)
    d_weight: Tensor  # of the loss, (columns, H)


@torch.no_grad()
def sample(hidden: Tensor, weight: Tensor, target: Tensor) -> Sample:
    """Of hidden (N, H), weight (V, H) and target (N,), all scored.

    In float64, but for the other rows' log-sum-exp: of products in float32, exact to about 1e-6.
    """
    count, device = len(target), hidden.device
    generator = torch.Generator().manual_seed(0)
    # The last ones lie where an index that is too narrow goes astray.
    last = torch.arange(max(count - LAST, 0), count, dtype=torch.int64, device="cpu")
    rows = torch.cat(
        [torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")[:ROWS], last]
    ).to(device)
    anywhere = torch.randint(
        len(weight), (COLUMNS // 2,), generator=generator, dtype=torch.int64, device="cpu"
    ).to(device)
    columns = torch.cat([target[: COLUMNS // 2], anywhere])

    wide = hidden[rows].double()
    logits = torch.cat([wide @ slab.double().t() for slab in weight.split(SLAB)], 1)
    log_probs = logits.log_softmax(-1)
    gradient = log_probs.exp()
    entropy = -(gradient * log_probs).sum(-1)
    own = target[rows][:, None]
    logp = log_probs.gather(1, own)[:, 0]
    gradient.scatter_add_(1, own, torch.full_like(own, -1, dtype=torch.float64))
    d_hidden = torch.zeros_like(wide)
    for part, slab in zip(gradient.split(SLAB, 1), weight.split(SLAB), strict=True):
        d_hidden += part @ slab.double()

    lse = _log_sum_exp(hidden, weight)
    probs = (hidden.double() @ weight[columns].double().t() - lse[:, None]).exp()
    d_weight = (probs - (target[:, None] == columns).double()).t() @ hidden.double()
    target_logits = torch.cat(
        [
            (block.double() * weight[ids].double()).sum(-1)
            for block, ids in zip(
                hidden.split(ROWS_OF_A_BLOCK), target.split(ROWS_OF_A_BLOCK), strict=True
            )
        ]
    )
    loss = (lse - target_logits).mean()
    scores = logp, entropy, logits.mean(-1)
    return Sample(rows, columns, loss, scores, d_hidden / count, d_weight / count)


def _log_sum_exp(hidden: Tensor, weight: Tensor) -> Tensor:
    exact = torch.promote_types(weight.dtype, torch.float32)
    head = weight.to(exact).t()
    blocks = hidden.split(ROWS_OF_A_BLOCK)
    return torch.cat([(block.to(exact) @ head).double().logsumexp(-1) for block in blocks])
