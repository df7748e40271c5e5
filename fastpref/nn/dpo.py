# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimization and its kin as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..objectives.checks import hint
from ..objectives.registry import loss_types, registered
from ..objectives.signature import Hyperparameter
from .checks import check_reference
from .paired import PairedLoss, Results, check_pairs

LOSS_TYPES = loss_types("pair")
_OBJECTIVES = {name: loss_type for loss_type, name in LOSS_TYPES.items()}

_SMOOTHED = {  # what label_smoothing must do, in the words of Liger-Kernel
    "exo_pair": "be > 0",
    "robust": "lie in [0.0, 0.5)",
}


class FusedLinearDPOLoss(PairedLoss):
    """Takes what Liger-Kernel 0.8.5's LigerFusedLinearDPOLoss takes.

    ``loss_type`` may also be "ipo", "sigmoid_norm", "aot" and "aot_unpaired"; the first two divide
    by the length whatever ``average_log_prob`` says. ``label_smoothing`` counts for "sigmoid" too,
    which is then conservative DPO, and for "robust", "exo_pair", "aot" and "aot_unpaired"; with
    another loss it is refused.

    Args:
        ignore_index: target of a position that is not scored.
        beta, label_smoothing, discopop_tau: of the objective.
        alpha: weight of the mean negative log-likelihood of the chosen responses' tokens,
        compute_nll_loss: which this adds.
        use_ref_model: whether ``forward`` takes a reference; False is a uniform one.
        average_log_prob: compare means over tokens instead of sums.
        compiled, chunk_size: without effect.
        loss_type: a key of ``LOSS_TYPES``.

    Raises:
        ValueError, TypeError: naming the setting, what came, and what was expected.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__(
            ignore_index, alpha, compute_nll_loss, average_log_prob, compiled, chunk_size
        )
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau
        self.check_configuration()

    def configuration(self) -> tuple[str, dict[str, Any]]:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"Unsupported loss_type: loss_type must be one of {', '.join(LOSS_TYPES)}, got "
                f"{self.loss_type!r}{hint(self.loss_type, LOSS_TYPES, _OBJECTIVES)}"
            )
        name, hyperparameters = LOSS_TYPES[self.loss_type], {"beta": self.beta}
        if name == "discopop":
            hyperparameters["tau"] = self.discopop_tau
        smoothing = registered(name).signature.hyperparameters.get("label_smoothing")
        if smoothing is not None:
            self._check_smoothing(name, smoothing)
            hyperparameters["label_smoothing"] = self.label_smoothing
        elif self.label_smoothing:
            raise ValueError(
                f"label_smoothing is no part of loss_type={self.loss_type!r}, got "
                f"{self.label_smoothing!r}; leave it 0"
            )
        return name, hyperparameters

    def _check_smoothing(self, name: str, smoothing: Hyperparameter) -> None:
        words = _SMOOTHED.get(self.loss_type)
        if words is None:
            return  # which the objective checks
        try:
            smoothing.check(f"{name}: label_smoothing", self.label_smoothing)
        except ValueError as error:
            raise ValueError(
                f"label_smoothing must {words} for loss_type={self.loss_type!r}: {error}"
            ) from None

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> Results:
        """The mean loss of P pairs.

        Args:
            lin_weight: (V, H), with bias (V,): the head.
            _input: (2 P, T, H), chosen rows first.
            target: (2 P, T) int64, already shifted.
            ref_input: (2 P, T, H'), scored without gradient through
            ref_weight, ref_bias: its head; by default the policy's.

        Returns:
            loss (0-dim), (chosen_logps (P,), rejected_logps (P,), mean logit of the chosen and of
            the rejected rows over all positions, scored or not, nll_loss, chosen_rewards (P,),
            rejected_rewards (P,)). Loss, log-probabilities and nll_loss are differentiable.

        Raises:
            ValueError, TypeError: naming the argument, what came, what was expected, the remedy.
        """
        check_pairs(lin_weight, _input, target)
        if self.use_ref_model:
            check_reference(ref_input, ref_weight, target)
            reference: dict[str, Any] = {
                "ref_hidden": ref_input,
                "ref_weight": ref_weight,
                "ref_bias": ref_bias,
            }
        else:
            zeros = torch.zeros(target.shape, dtype=torch.float32, device=target.device)
            reference = {"ref_logps": zeros}
        return self.run(lin_weight, _input, target, bias, **reference)
