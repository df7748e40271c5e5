# SPDX-License-Identifier: Apache-2.0
"""Which of TRL's trainers score on fastpref, by release of TRL."""

from __future__ import annotations

# From the release on: trainers that score through TRL's fused head.
HEADS = (
    ((1, 15), "DPO, KTO, SFT, GRPO, RLOO, AsyncGRPO and what inherits from them"),
    ((1, 14), "AsyncGRPO; DPO, KTO and GRPO with use_liger_kernel"),
    ((1, 13), "AsyncGRPO"),
)


def reach(release: tuple[int, ...], *, fix_heads: bool = False) -> dict[str, str]:
    """What scores on fastpref once TRL of that release is patched, and what does not."""
    heads = next(trainers for since, trainers in HEADS if release >= since)
    reached = {"head": heads, "divergence": "Distillation"}
    if fix_heads:
        reached["heads of models"] = "by fuse_lm_head, for trainers made from now on"
    reached["subclasses instead"] = "ORPO, CPO, TPO, OnlineDPO (FastORPOTrainer, ...)"
    reached["not reached"] = (
        "Reward, which has no vocabulary; GKD, GOLD, AsyncDistillation and others from full logits"
    )
    return reached
