# SPDX-License-Identifier: Apache-2.0
"""Odds ratio preference optimization as a module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..objectives.reference_free import log_odds_ratio
from .checks import check_rows
from .paired import PairedLoss, Pairs, Results, check_pairs


class FusedLinearORPOLoss(PairedLoss):
    """Takes what Liger-Kernel 0.8.5's LigerFusedLinearORPOLoss takes.

    The log-probabilities that it compares and returns are means over tokens. Where the policy is
    certain of a response the log odds stay finite.

    Args:
        ignore_index: target of a position that is not scored.
        beta: of the objective.
        compute_nll_loss: whether to add the mean negative log-likelihood of the chosen tokens.
        compiled, chunk_size: without effect.

    Raises:
        ValueError, TypeError: naming the setting, what came, and what was expected.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, 1.0, compute_nll_loss, True, compiled, chunk_size)
        self.beta = beta
        self.check_configuration()

    def configuration(self) -> tuple[str, dict[str, Any]]:
        # Its own likelihood term is a mean over responses, not over all their tokens.
        return "orpo", {"beta": self.beta, "sft_weight": 0.0}

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Results:
        """The mean loss of P pairs, as ``FusedLinearDPOLoss.forward`` without a reference:
        ``lin_weight`` (V, H) and ``bias`` (V,) of the head, ``_input`` (2 P, T, H) and ``target``
        (2 P, T), chosen rows first.

        ``nll_target`` (2 P, T), of which the first half is read, are the targets of the likelihood
        term, by default ``target``: prompt and response, say. Tokens in both are scored once. The
        tuple ends in the means over pairs of log sigmoid(log odds ratio) and of the log odds ratio.
        """
        check_pairs(lin_weight, _input, target)
        if nll_target is None or not self.compute_nll_loss:
            return self.run(lin_weight, _input, target, bias)
        check_rows("nll_target", nll_target, tuple(target.shape))
        rows, chosen = len(target), len(target) // 2
        ours, theirs = target[:chosen], nll_target[:chosen]
        shared = ((ours == self.ignore_index) | (ours == theirs)).all(-1)
        rest = torch.where(shared[:, None] & (ours == theirs), self.ignore_index, theirs)
        places = torch.arange(rows, dtype=torch.int64, device=target.device)
        pairs = self.evaluate(
            lin_weight,
            torch.cat([_input, _input[:chosen]]),
            torch.cat([target, rest]),
            bias,
            with_likelihood=False,
            layout=places.view(2, chosen).t(),
        )
        logps = torch.where(shared, pairs.sums[:chosen], 0) + pairs.sums[rows:]
        tokens = (theirs != self.ignore_index).sum()
        nll = -logps.sum() / tokens.clamp(min=1)
        return self.results(pairs, pairs.output.loss + nll, nll)

    def results(self, pairs: Pairs, loss: Tensor, nll: Tensor) -> Results:
        loss, common = super().results(pairs, loss, nll)
        gaps = log_odds_ratio(common[0].detach(), common[1].detach())
        return loss, (*common, F.logsigmoid(gaps).mean(), gaps.mean())
