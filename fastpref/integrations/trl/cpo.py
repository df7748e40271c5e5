# SPDX-License-Identifier: Apache-2.0
"""Contrastive preference optimization (Xu et al., arXiv:2401.08417) and what TRL runs with it:
SimPO (arXiv:2405.14734), AlphaPO (arXiv:2501.03884), hinge and IPO."""

from __future__ import annotations

from typing import Any

import torch
from trl.experimental.cpo import CPOTrainer

from .pairs import FusedPairs


class FastCPOTrainer(FusedPairs, CPOTrainer):  # type: ignore[misc]
    """TRL's CPOTrainer without logits: its arguments, losses, gradients and metrics."""

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
        """Of chosen and rejected: log-probabilities of completions, summed or averaged as the loss
        has it, and means of logits; and the negative log-likelihood of the chosen completions."""
        scored = self._score(model, batch, self.pad_token_id)
        logps = scored.logps(average=self.loss_type in ("ipo", "simpo"))
        nll = scored.nll(scored.labels) if self.cpo_alpha else torch.zeros_like(logps[0])
        return self._outputs(scored, logps, scored.mean_logits, nll)
