# SPDX-License-Identifier: Apache-2.0
"""Odds ratio preference optimization (Hong et al., arXiv:2403.07691)."""

from __future__ import annotations

from typing import Any

import torch
from trl.experimental.orpo import ORPOTrainer

from .pairs import FusedPairs


class FastORPOTrainer(FusedPairs, ORPOTrainer):  # type: ignore[misc]
    """TRL's ORPOTrainer without logits: its arguments, losses, gradients and metrics."""

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
        """Of chosen and rejected: mean log-probabilities of completions, means of logits; and the
        negative log-likelihood of the chosen prompts and completions."""
        scored = self._score(model, batch, self.padding_value)
        logps = scored.logps(average=True)
        nll = scored.nll(torch.where(scored.attention_mask == 1, scored.input_ids, -100))
        return self._outputs(scored, logps, scored.mean_logits[:, :-1], nll)
