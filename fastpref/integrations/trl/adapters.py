# SPDX-License-Identifier: Apache-2.0
"""What stands where TRL has its fused head, one class a form of it."""

from __future__ import annotations

import contextlib
import importlib
import logging
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ...preference import explain
from ...scoring import Plan, ScoringOptions, WeightContext, linear_logprob
from .budget import default_budget
from .library import trl_utils
from .sharding import with_mean_gradient

logger = logging.getLogger("fastpref")

# TRL's names of the outputs, in the order of its tuple, and fastpref's.
OUTPUTS = {
    "log_probs": "logp",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logits",
    "is_top1": "is_top1",
}
BUDGET_FROM = "as TRL's own head, or what holds the exponentials"  # see default_budget


class LogProbAdapter:
    """Stands for the autograd function of TRL 1.15 and newer; only ``apply`` is ever used of it."""

    # Packing and schedules are chosen on the host: under torch.compile the graph breaks here.
    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(OUTPUTS),
    ) -> tuple[Tensor | None, ...]:
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1) of every row.

        Args:
            hidden: (N, H). Products run in the autocast dtype where autocast is on, else in
                hidden's.
            weight: (V, H), any of the four dtypes.
            bias: (V,), or None.
            targets: (N,) int64 in [0, V). Every row is scored.
            temperature, softcap, logit_scale: the logit is ``softcap * tanh(logit_scale * z /
                softcap) / temperature``, without a cap ``logit_scale * z / temperature``.
            chunk_size: width of TRL's tiles. fastpref chooses its own, in no more memory.
            outputs: what to compute beside ``log_probs``.

        Returns:
            (N,) float32, ``is_top1`` bool (a tie counts for the first of the greatest logits), None
            where not asked for. ``log_probs`` and ``entropy`` are differentiable.

        Raises:
            ValueError: an output that is none of the five, or what ``linear_logprob`` refuses.
        """
        unknown = [name for name in outputs if name not in OUTPUTS]
        if unknown:
            raise ValueError(
                f"outputs must be among {', '.join(OUTPUTS)}; got {', '.join(map(repr, unknown))}. "
                "This TRL may be newer than this fastpref: upgrade fastpref, or call "
                "fastpref.integrations.trl.unpatch()"
            )
        weight, bias = cast(Tensor, with_mean_gradient(weight)), with_mean_gradient(bias)
        given: dict[str, Any] = {
            "bias": bias,
            "ignore_index": -1,  # no token: TRL has put 0 where it does not score
            "temperature": float(temperature),
            "logit_scale": logit_scale,
            "softcap": softcap,
            "outputs": ("logp", *(OUTPUTS[name] for name in outputs if name != "log_probs")),
            "weight_context": weight_context(),
        }
        with products_in_hidden_dtype(hidden, weight):
            options = _options(explain(hidden, weight, targets, **given), weight.dtype, chunk_size)
            given["options"] = options
            if logger.isEnabledFor(logging.DEBUG):
                plan = explain(hidden, weight, targets, **given)
                source = plan.budget_from if options.memory_budget is None else BUDGET_FROM
                logger.debug("TRL's fused head: %s", replace(plan, budget_from=source))
            scores = linear_logprob(hidden, weight, targets, **given)
        values = [getattr(scores, name) for name in OUTPUTS.values()]
        # TRL differentiates no other.
        values = [
            one if one is None or name in ("logp", "entropy") else one.detach()
            for name, one in zip(OUTPUTS.values(), values, strict=True)
        ]
        # float64 products give float64 scores; TRL's are float32 always.
        return tuple(
            value.float() if value is not None and value.is_floating_point() else value
            for value in values
        )


class PairAdapter:
    """Stands for the autograd function of TRL 1.13 and 1.14, which gives two outputs."""

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> tuple[Tensor | None, ...]:
        """(log_probs, entropy) of every row; otherwise as ``LogProbAdapter.apply``."""
        head = (temperature, chunk_size, softcap, logit_scale)
        scores = LogProbAdapter.apply(hidden, weight, bias, targets, *head, ("entropy",))
        return scores[:2]  # type: ignore[no-any-return]


def _options(plan: Plan, weight_dtype: torch.dtype, tile_cols: int) -> ScoringOptions:
    """For a call that would run by ``plan`` without any.

    On CPU TRL hands over unscored positions too and drops their scores afterwards. They are known
    by their gradient of 0, hence only in backward: every product with a gradient in it belongs
    there. Elsewhere TRL compacts the batch, and the automatic choice is best.
    """
    if plan.device_type == "cpu":
        return ScoringOptions(schedule="keep")
    budget = default_budget(
        plan.scored,
        plan.hidden_size,
        plan.vocab_size,
        plan.dtype,
        weight_dtype,
        trains_weight=plan.needs_weight,
        keeps=plan.needs_weight or plan.needs_bias or (plan.needs_hidden and not plan.only_logp),
        device_memory=plan.total_memory,
        tile_cols=tile_cols,
    )
    return ScoringOptions(memory_budget=budget)


def products_in_hidden_dtype(
    hidden: Tensor, weight: Tensor
) -> contextlib.AbstractContextManager[Any]:
    """Without autocast TRL multiplies in hidden's dtype, also when the weight's is wider."""
    device = hidden.device.type
    half = hidden.dtype in (torch.bfloat16, torch.float16)
    if half and weight.dtype != hidden.dtype and not torch.is_autocast_enabled(device):
        return torch.autocast(device, dtype=hidden.dtype)
    return contextlib.nullcontext()


def weight_context() -> WeightContext | None:
    """Under ZeRO-3 the head is partitioned again before backward and must be gathered there."""
    deepspeed = importlib.import_module("transformers.integrations.deepspeed")
    if not deepspeed.is_deepspeed_zero3_enabled():
        return None
    gather = trl_utils().maybe_gather_lm_head_ctx

    def context(weight: Tensor, bias: Tensor | None) -> contextlib.AbstractContextManager[Any]:
        # TRL has gathered it around the forward pass, and to leave twice would partition it twice.
        found: contextlib.AbstractContextManager[Any]
        found = contextlib.nullcontext() if weight.numel() else gather(weight, bias)
        return found

    return context
