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
        self._log(output, mask, branches, inputs["attention_mask"], *logps.chunk(2))
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

    def _log(
        self,
        output: Any,
        mask: Tensor,
        branches: int,
        attended: Tensor,
        chosen: Tensor,  # (P,) log-probabilities
        rejected: Tensor,  # (P,)
    ) -> None:
        mode = "train" if self.model.training else "eval"
        metrics, gathered = self._metrics[mode], self.accelerator.gather_for_metrics
        entropy = output.entropy.detach()[mask].mean()
        metrics["entropy"].append(gathered(entropy).mean().item())
        if mode == "train":
            self._total_train_tokens += gathered(attended.sum()).sum().item() // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        means, masks = output.mean_logits.detach().chunk(branches), mask.chunk(branches)
        for name, values, kept in zip(("chosen", "rejected"), means, masks, strict=False):
            total, count = gathered(values[kept].sum()).sum(), gathered(kept.sum()).sum()
            metrics[f"logits/{name}"].append((total / count.clamp(min=1)).item())
        correct = gathered((output.is_top1.chunk(branches)[0] & masks[0]).sum()).sum()
        count = gathered(masks[0].sum()).sum()
        metrics["mean_token_accuracy"].append((correct / count.clamp(min=1)).item())
        gathered = self.accelerator.gather
        rewards = self.beta * chosen, self.beta * rejected
        numbers = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/accuracies": (rewards[0] > rewards[1]).float(),
            "rewards/margins": rewards[0] - rewards[1],
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        for name, values in numbers.items():
            metrics[name].append(gathered(values).mean().item())


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
