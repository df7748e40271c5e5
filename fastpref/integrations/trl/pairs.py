# SPDX-License-Identifier: Apache-2.0
"""``concatenated_forward`` of TRL's CPO and ORPO trainers, without logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import sequence_logp
from .fused import Fused


class Scored(NamedTuple):
    """A batch of chosen sequences, then rejected ones."""

    log_probs: Tensor  # (2P, T), of the token after each position
    mean_logits: Tensor  # (2P, T), over the vocabulary; detached
    input_ids: Tensor  # (2P, T)
    attention_mask: Tensor  # (2P, T)
    labels: Tensor  # (2P, T), -100 outside of completions
    aux_loss: Tensor | None

    def logps(self, *, average: bool) -> Tensor:
        """(2P,) sums of the completions' log-probabilities, or their means."""
        mask = self.labels[:, 1:] != -100
        reduction = "mean" if average else "sum"
        return sequence_logp(self.log_probs[:, :-1], mask=mask, reduction=reduction)  # type: ignore[arg-type]

    def nll(self, labels: Tensor) -> Tensor:
        """Mean negative log-likelihood of the chosen sequences' tokens that ``labels`` (2P, T)
        keeps."""
        pairs = len(labels) // 2
        mask = labels[:pairs, 1:] != -100
        return -torch.where(mask, self.log_probs[:pairs, :-1], 0).sum() / mask.sum()


class FusedPairs(Fused):
    """Scores a batch of pairs in one forward.

    TRL logs the mean of all logits, of every position, prompts and padding among them, so that
    every position is scored, as by TRL, but without logits. An empty completion has the mean
    log-probability 0, where TRL's is NaN.
    """

    is_encoder_decoder: bool
    aux_loss_enabled: bool

    def _score(self, model: Any, batch: dict[str, Any], padding_value: Any) -> Scored:
        trainer: Any = self
        inputs = trainer.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=padding_value,
            device=self.accelerator.device,
        )
        ids = inputs["concatenated_input_ids"]
        attended = inputs["concatenated_attention_mask"]
        more = {"output_router_logits": True} if self.aux_loss_enabled else {}
        output = model(
            input_ids=ids,
            attention_mask=attended,
            use_cache=False,
            # At the last position any token, for its logits.
            shift_labels=ids.roll(-1, dims=1),
            fused_lm_head=True,
            outputs=("mean_logits",),
            **more,
        )
        means = output.mean_logits.detach()
        labels = inputs["concatenated_labels"]
        return Scored(output.log_probs, means, ids, attended, labels, output.aux_loss)

    def _outputs(self, scored: Scored, logps: Tensor, logits: Tensor, nll: Tensor) -> Any:
        """In TRL's order; of logits nothing is used but their mean."""
        chosen, rejected = logps.chunk(2)
        chosen_logits, rejected_logits = logits.chunk(2)
        outputs = (chosen, rejected, chosen_logits, rejected_logits, nll)
        return (*outputs, scored.aux_loss) if self.aux_loss_enabled else outputs
