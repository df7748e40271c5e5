# SPDX-License-Identifier: Apache-2.0
"""Triple preference optimization (Saeidi et al., arXiv:2405.16681): a contrast of two responses
without a reference model, and the likelihood of a third, the gold one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.experimental.tpo import TPOTrainer

from ... import objectives, sequence_logp
from .fused import Fused
from .metrics import log_pairs, log_tokens


class FastTPOTrainer(Fused, TPOTrainer):
    """TRL's TPOTrainer without logits: its arguments, losses, gradients and metrics.

    Raises:
        ValueError: ``compute_metrics``, which TRL gives logits; or as ``Fused``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("compute_metrics") is not None:
            raise ValueError(
                "compute_metrics is given logits, which FastTPOTrainer does not make; expected "
                "None. Leave it out, or use trl.experimental.tpo.TPOTrainer"
            )
        super().__init__(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        mask = inputs["completion_mask"]
        given = {name: value for name, value in inputs.items() if name != "completion_mask"}
        output = model(
            **given,
            use_cache=False,
            labels=inputs["input_ids"].masked_fill(mask == 0, -100),
            fused_lm_head=True,
            outputs=("entropy", "mean_logits", "is_top1"),
        )
        mask = mask[:, 1:] != 0
        branches = 3 if self.tpo_alpha != 0.0 else 2  # chosen, rejected, gold
        lengths = mask.sum(dim=1).clamp(min=1)
        sums = sequence_logp(output.log_probs, mask=mask)
        chosen, rejected = sums.chunk(branches)[:2]
        lengths = torch.cat(lengths.chunk(branches)[:2])
        loss = self._contrast(chosen, rejected, *lengths.chunk(2)).mean()
        if branches == 3:
            gold = mask.chunk(branches)[2].sum()
            loss = loss - self.tpo_alpha * output.log_probs.chunk(branches)[2].sum() / gold
        logps = torch.cat((chosen, rejected)).detach()
        if self.loss_type in ("ipo", "tpo-l"):
            logps = logps / lengths
        logps = logps.view(2, -1)
        log_tokens(self, output, mask, inputs["attention_mask"])
        log_pairs(self, output, mask, self.beta * logps, logps, branches)
        return (loss, output) if return_outputs else loss

    def _contrast(
        self, chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
    ) -> Tensor:
        """(P,) losses of sums of log-probabilities."""
        objective = _objective(self)
        logps = [chosen, rejected]
        if objective.needs_reference:
            logps += [torch.zeros_like(chosen), torch.zeros_like(rejected)]  # a uniform one
        lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
        given = {name: lengths[name] for name in objective.extras}
        losses: Tensor = objective(*logps, **given).losses
        return losses


def _objective(trainer: Any) -> objectives.Objective:
    """The contrast of two responses that the trainer's ``loss_type`` names.

    Raises:
        ValueError: it names none.
    """
    beta, smoothing = trainer.beta, trainer.label_smoothing
    if trainer.loss_type == "sigmoid":
        return objectives.get("dpo", beta=beta, label_smoothing=smoothing)
    if trainer.loss_type in ("hinge", "ipo"):
        return objectives.get(trainer.loss_type, beta=beta)
    if trainer.loss_type == "tpo-l":
        margin = trainer.tpo_l_gamma
        return objectives.get("simpo", beta=beta, gamma=margin, label_smoothing=smoothing)
    raise ValueError(
        f"loss_type must be one of sigmoid, hinge, ipo, tpo-l; got {trainer.loss_type!r}"
    )
