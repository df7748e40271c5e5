# SPDX-License-Identifier: Apache-2.0
"""Group relative policy optimization and its kin as a module."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import objectives
from ..objectives.checks import hint
from ..objectives.registry import loss_types, registered
from ..preference import preference_loss
from .checks import check_head, check_reference, check_rows

LOSS_TYPES = loss_types("token")
IGNORE_INDEX = -100


class FusedLinearGRPOLoss(torch.nn.Module):
    """Takes what Liger-Kernel 0.8.5's LigerFusedLinearGRPOLoss takes.

    The loss of "luspo" is a mean over responses of sums over their scored tokens, padding or not.
    A reference is scored only where ``beta`` weighs it. Tokens whose ``vllm_is_ratio`` is 0 do not
    count as clipped.

    Args:
        beta: weight of the divergence from the reference.
        compiled, chunk_size: without effect.
        use_ref_model: whether ``forward`` takes a reference; without one the divergence is 0.
        epsilon_low, epsilon_high: the clip range, 0.2 by default; ``epsilon_high`` of "cispo"
            bounds the ratio itself, and is 5.0 by default. Liger-Kernel takes 0.2 there too, which
            leaves every weight at 0.2 or below.
        loss_type: a key of ``LOSS_TYPES``.
        max_completion_length: what "dr_grpo" divides by, and needs.
        importance_sampling_level: "token", or "sequence" for the losses that clip; another loss
            refuses it when called.
        sapo_temperature_pos, sapo_temperature_neg: of "sapo".
        temperature: of the logits.
        delta: upper bound of the ratio in the unclipped term, for the losses that clip.
        use_bias_correction_kl: multiply the divergence by the importance ratio.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: of "vespo".

    Raises:
        ValueError, TypeError: naming the setting, what came, and what was expected.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float | None = None,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg
        name, hyperparameters = self.configuration()
        objectives.get(name, **hyperparameters)

    def configuration(self) -> tuple[str, dict[str, Any]]:
        """The name of the objective and its hyperparameters, as the attributes are now.

        Raises ValueError where these do not go together.
        """
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"Unknown loss type: loss_type must be one of {', '.join(LOSS_TYPES)}, got "
                f"{self.loss_type!r}{hint(self.loss_type, LOSS_TYPES)}"
            )
        self._check_positive()
        epsilon_high = self.epsilon_high
        if epsilon_high is None:
            epsilon_high = 5.0 if self.loss_type == "cispo" else 0.2
        settings = {
            "beta": self.beta if self.use_ref_model else 0.0,
            "epsilon_low": self.epsilon_low,
            "epsilon_high": epsilon_high,
            "delta": self.delta,
            "max_completion_length": self.max_completion_length,
            "importance_sampling_level": self.importance_sampling_level,
            "use_bias_correction_kl": self.use_bias_correction_kl,
            "tau_positive": self.sapo_temperature_pos,
            "tau_negative": self.sapo_temperature_neg,
            "k_positive": self.vespo_k_pos,
            "k_negative": self.vespo_k_neg,
            "lambda_positive": self.vespo_lambda_pos,
            "lambda_negative": self.vespo_lambda_neg,
        }
        name = LOSS_TYPES[self.loss_type]
        known = registered(name).signature.hyperparameters
        if self.delta is not None and "delta" not in known:
            raise ValueError(
                f"delta is no part of loss_type={self.loss_type!r}, got {self.delta!r}; leave it "
                "None"
            )
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError(
                "max_completion_length must be provided for loss_type 'dr_grpo', which divides by "
                "max_completion_length, got None; pass the longest completion that the sampler may "
                "return"
            )
        return name, {key: value for key, value in settings.items() if key in known}

    def _check_positive(self) -> None:
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "delta"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")

    def _check_level(self) -> None:
        """In ``forward`` alone, as in Liger-Kernel."""
        clips = "delta" in registered(LOSS_TYPES[self.loss_type]).signature.hyperparameters
        if not clips and self.importance_sampling_level != "token":
            raise ValueError(
                "Sequence-level importance sampling is not supported for "
                f"loss_type={self.loss_type!r}: importance_sampling_level must be 'token', got "
                f"{self.importance_sampling_level!r}"
            )

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of B completions.

        Args:
            _input: (B, T, H).
            lin_weight: (V, H), with bias (V,): the head.
            selected_token_ids: (B, T) int64, the completions.
            attention_mask: (B, T), nonzero at their scored tokens.
            advantages: (B,).
            ref_per_token_logps: (B, T), what the reference says; or
            ref_input: (B, T, H'), scored without gradient through
            ref_weight, ref_bias: its head; by default the policy's. Where both are given,
                a warning says that the log-probabilities count.
            old_per_token_logps: (B, T), of the policy that sampled; None: this one.
            vllm_is_ratio: (B,), (B, 1) or (B, T), old over sampler: a factor of the loss without
                the divergence; in "vespo" of the weight.
            num_items_in_batch: scored tokens of all ranks and accumulated batches, which "dapo",
                "cispo" and "vespo" divide by; None: those of this batch on all ranks.

        Returns:
            loss (0-dim), (mean of the divergence, only with ``beta``, and the share of clipped
            tokens).

        Raises:
            ValueError, TypeError: naming the argument, what came, what was expected, the remedy.
        """
        names = ("_input", "lin_weight", "selected_token_ids")
        check_head(_input, lin_weight, selected_token_ids, names)
        shape = tuple(selected_token_ids.shape)
        check_rows("attention_mask", attention_mask, shape)
        check_rows("advantages", advantages, shape[:1])
        scored = attention_mask != 0
        extras = self._weights(advantages, vllm_is_ratio, shape)
        if old_per_token_logps is not None:
            check_rows("old_per_token_logps", old_per_token_logps, shape)
            extras["old_token_logp"] = old_per_token_logps
        name, hyperparameters = self.configuration()
        self._check_level()
        output = preference_loss(
            _input,
            lin_weight,
            torch.where(scored, selected_token_ids, IGNORE_INDEX),
            name,
            bias=bias,
            ignore_index=IGNORE_INDEX,
            temperature=self.temperature,
            extras=extras,
            denominator=self._denominator(scored, num_items_in_batch),
            **self._reference(
                ref_per_token_logps, ref_input, ref_weight, ref_bias, selected_token_ids
            ),
            **hyperparameters,
        )
        clipped = output.metrics["clip_ratio/region_mean"]
        if self.beta == 0:
            return output.loss, (clipped,)
        return output.loss, (output.metrics.get("kl", torch.zeros_like(clipped)), clipped)

    def _weights(
        self, advantages: Tensor, ratio: Tensor | None, shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """The advantages, with the correction for the sampler."""
        if ratio is None:
            return {"advantages": advantages}
        check_rows("vllm_is_ratio", ratio, shape[:1], (shape[0], 1), shape)
        if ratio.numel() == shape[0]:
            ratio = ratio.reshape(shape[:1])
        if self.loss_type == "vespo":
            return {"advantages": advantages, "sampler_ratio": ratio}
        # Each of the other losses is proportional to the advantage, of a given sign.
        return {"advantages": (advantages if ratio.dim() == 1 else advantages[:, None]) * ratio}

    def _reference(
        self,
        logps: Tensor | None,
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        target: Tensor,
    ) -> dict[str, Any]:
        """As keywords of ``preference_loss``."""
        if not self.use_ref_model or self.beta == 0:
            return {}
        if logps is not None:
            if hidden is not None:
                warnings.warn(
                    "ref_per_token_logps and ref_input were both given. Using ref_per_token_logps; "
                    "leave ref_input None",
                    stacklevel=5,
                )
            check_rows("ref_per_token_logps", logps, tuple(target.shape))
            return {"ref_logps": logps}
        if hidden is None:
            raise ValueError(
                f"beta={self.beta:g} weighs the divergence from a reference: pass "
                "ref_per_token_logps or ref_input, got neither, or construct the loss with "
                "use_ref_model=False"
            )
        check_reference(hidden, weight, target)
        return {"ref_hidden": hidden, "ref_weight": weight, "ref_bias": bias}

    def _denominator(self, scored: Tensor, num_items: float | Tensor | None) -> Tensor | None:
        """What turns the objective's mean over this batch's tokens into one over all of them."""
        if self.loss_type not in ("dapo", "cispo", "vespo"):
            return None
        own = scored.sum().float()
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if num_items is not None:
            total = torch.as_tensor(num_items, dtype=own.dtype, device=own.device)
        else:
            total = own.clone()
            if ranks > 1:
                dist.all_reduce(total)
        return max(len(scored), 1) * (total / ranks).clamp(min=1) / own.clamp(min=1)
