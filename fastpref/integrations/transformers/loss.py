# SPDX-License-Identifier: Apache-2.0
"""An objective as the ``compute_loss_func`` of transformers' Trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...objectives import Objective, as_objective
from .columns import columns_of
from .evaluation import by_unit, check_labels, evaluate
from .labels import PreferenceLabels
from .outputs import aux_loss_of, log_probs_of
from .state import RunningState, state_callback

ABSENT = -100  # with which the Trainer fills up predictions


def loss_func(
    objective: str | Objective | Callable[..., Any],
    *,
    aux_loss_coef: float | None = None,
    **hyperparameters: Any,
) -> PreferenceLoss:
    """The loss of an objective for ``Trainer(compute_loss_func=...)``.

    Args:
        objective: the name of one of pairs, lists or single responses, an ``Objective`` or a
            pairwise function.
        aux_loss_coef: the weight of the load-balancing loss, where the forward of a mixture of
            experts returns one (``output_router_logits=True``): needed there, as a rule
            ``model.config.router_aux_loss_coef``.
        hyperparameters: of the objective; among them ``dp_group=torch.distributed.group.WORLD``
            where it takes statistics of the batch and these shall be those of all ranks.

    Raises:
        ValueError, TypeError: as ``objectives.get`` does; and for an objective of tokens, or one
            that takes more of the policy than its log-probabilities (``wpo``, ``tdpo``,
            ``epsilon_dpo``).
    """
    return PreferenceLoss(as_objective(objective, **hyperparameters), aux_loss_coef)


class PreferenceLoss:
    """``loss(outputs, labels, num_items_in_batch=None)``: what ``loss_func`` returns.

    The sum of the losses of a micro-batch's units over the number of units of the whole optimizer
    step, which the Trainer counts over micro-batches and, with ``average_tokens_across_devices``
    (its default), ranks. The Trainer divides by nothing else, so the gradients of a step are those
    of one large batch, uneven micro-batches included.

    - An objective of scope "batch" (``kto``, ``aot``, ...) takes each micro-batch for the batch, of
      all ranks where it is given a ``dp_group``: with accumulation its losses are not those of the
      larger batch.
    - One of scope "running" (``bco``, ``alpha_dpo``, ...) is given the averages that earlier
      optimizer steps left, and ``callback`` must be among the Trainer's callbacks. ``beta_dpo``
      takes the mean of its batch beside them, as one of scope "batch" does.
    - In evaluation a batch is whole by itself. ``eval_loss`` is the mean over all units.
    - On several ranks the Trainer fills an uneven last batch up with rows from the first, in
      training and in evaluation, where ``eval_loss`` is then the mean but for a few rows. In
      training ``accelerator_config={"even_batches": False}`` leaves it uneven.

    ``objective`` has its hyperparameters set, and is what ``PreferenceCollator`` takes;
    ``aux_loss_coef`` is the weight of a mixture of experts' load-balancing loss.
    """

    def __init__(self, objective: Objective, aux_loss_coef: float | None = None) -> None:
        columns_of(objective)  # which refuses those that cannot run here
        self.objective = objective
        self.aux_loss_coef = aux_loss_coef
        self._state = RunningState(objective)

    @functools.cached_property
    def callback(self) -> Any:
        """A ``TrainerCallback`` that keeps the running state of the objective: ``delta`` of ``bco``
        and ``bco_pair``, ``running_mean`` and ``running_std`` of ``beta_dpo`` and ``alpha_dpo``.

        After each optimizer step it takes in all micro-batches and ranks of it together. It is
        saved with the Trainer's state in every checkpoint, and a resumed run goes on to the bit.
        For objectives without state it does nothing.
        """
        return state_callback(self._state)

    def __call__(
        self,
        outputs: Any,
        labels: PreferenceLabels,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """0-dim, differentiable.

        Args:
            outputs: of a model with a fused head: ``log_probs`` (R, T - 1), 0 where not scored, and
                ``aux_loss`` where it has one.
            labels: of ``PreferenceCollator``, on the device of ``log_probs``.
            num_items_in_batch: units of the whole step; None: of this batch.

        Raises:
            ValueError, TypeError, RuntimeError: where ``outputs`` or ``labels`` are others, and as
                the objective does.
        """
        check_labels(self.objective, labels)
        units = len(labels.lengths)
        total = units if num_items_in_batch is None else num_items_in_batch
        if isinstance(total, Tensor) and total.dim():
            raise ValueError(
                f"num_items_in_batch must be one number, got a tensor {tuple(total.shape)}, as "
                "under nn.DataParallel; start one process a device, with torchrun"
            )
        state = self._state.extras()
        output = evaluate(self.objective, log_probs_of(outputs), labels, state, total)
        if output.loss.requires_grad and output.ref_logps is not None:
            ratios = output.logps.detach() - output.ref_logps
            self._state.collect(by_unit(self.objective.unit, ratios, labels), labels)
        aux_loss = aux_loss_of(outputs)
        if aux_loss is None:
            return output.loss
        if self.aux_loss_coef is None:
            raise ValueError(
                "the model returned the load-balancing loss of its router, whose weight is not "
                "known here; pass loss_func(..., aux_loss_coef=model.config.router_aux_loss_coef), "
                "or 0.0 to leave it out"
            )
        # Over micro-batches a mean, as the loss is one.
        return output.loss + self.aux_loss_coef * aux_loss * (units / total)

    @torch.no_grad()
    def rewards(self, logits: tuple[Tensor, ...], labels: PreferenceLabels) -> Tensor:
        """Of each response, for ``Trainer(preprocess_logits_for_metrics=loss.rewards)``: then
        ``compute_metrics`` is handed rewards as ``predictions``, not log-probabilities of tokens.

        Args:
            logits: what the Trainer makes of the model's outputs: ``log_probs`` and ``label_mask``.
            labels: of ``PreferenceCollator``.

        Returns:
            (P, 2) of pairs, chosen first; (B, 1) of single responses; (G, K) of lists, -100 where a
            list has no response. Of an objective with a reference, beta times the log-ratio.
        """
        check_labels(self.objective, labels)
        log_probs, mask, *_ = logits
        # Where ranks differ in length the Trainer has filled up both with -100.
        log_probs = log_probs.masked_fill(mask != 1, 0)
        output = evaluate(self.objective, log_probs, labels, self._state.extras(), 1)
        rewards = by_unit(self.objective.unit, output.rewards, labels)
        return rewards.masked_fill(labels.lengths <= 0, ABSENT)
