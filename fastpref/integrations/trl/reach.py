# SPDX-License-Identifier: Apache-2.0
"""Which of TRL's trainers score on fastpref, by release of TRL."""

from __future__ import annotations

# From the release on: trainers that score through TRL's fused head.
HEADS = (
    ((1, 15), "DPO, KTO, SFT, GRPO, RLOO, AsyncGRPO and what inherits from them"),
    ((1, 14), "AsyncGRPO; DPO, KTO and GRPO with use_liger_kernel"),
    ((1, 13), "AsyncGRPO"),
)


def reach(
    release: tuple[int, ...], *, divergence: bool = True, fix_heads: bool = False
) -> dict[str, str]:
    """What scores on fastpref once TRL of that release is patched, and what does not.

    Args:
        release: (major, minor, ...).
        divergence: whether that of distillation was found.
        fix_heads: whether TRL puts ``fuse_lm_head`` on models.
    """
    heads = next(trainers for since, trainers in HEADS if release >= since)
    reached = {"head": heads}
    reached["divergence"] = "Distillation" if divergence else "none: Distillation does not import"
    if fix_heads:
        reached["fix_heads=True"] = "fuse_lm_head on the models of trainers made from then on"
    reached["subclasses in its place"] = "ORPO, CPO, TPO, OnlineDPO (FastORPOTrainer, ...)"
    reached["not reached"] = (
        "Reward, which has no vocabulary; GKD, GOLD, AsyncDistillation and others from full logits"
    )
    return reached
