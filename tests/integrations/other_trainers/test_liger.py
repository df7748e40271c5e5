# SPDX-License-Identifier: Apache-2.0
"""Users of Liger-Kernel's losses: the import changes. All of its classes: tests/nn/."""

from typing import Any

import torch
from torch import Tensor

from tests.integrations.other_trainers.page import run_lines
from tests.integrations.other_trainers.stand_ins import (
    BETA,
    IGNORED,
    by_token,
    expect_same_training,
    make_batch,
    make_model,
    plain_dpo,
)


def test_liger_kernel() -> None:
    """As TRL up to 1.12 calls it, with the hidden states and the heads of both models."""
    model, ref_model, batch = make_model(), make_model(seed=1), make_batch()
    target = batch.labels[:, 1:]

    def hidden(one: Any) -> Tensor:
        return one.model(**batch.inputs()).last_hidden_state[:, :-1]

    def plain() -> tuple[Tensor, ...]:
        logps = by_token(model.lm_head(hidden(model)), target).sum(-1)
        with torch.no_grad():
            ref = by_token(ref_model.lm_head(hidden(ref_model)), target).sum(-1)
        losses, *rewards = plain_dpo(*logps.chunk(2), *ref.chunk(2))
        return losses.mean(), *logps.chunk(2), *rewards

    def changed() -> tuple[Tensor, ...]:
        names = run_lines("Liger-Kernel", 0)
        loss_fn = names["LigerFusedLinearDPOLoss"](ignore_index=IGNORED, beta=BETA)
        with torch.no_grad():
            ref_hidden = hidden(ref_model)
        loss, (chosen, rejected, _, _, _, chosen_rewards, rejected_rewards) = loss_fn(
            model.lm_head.weight,
            hidden(model),
            target,
            None,
            ref_hidden,
            ref_model.lm_head.weight,
            None,
        )
        return loss, chosen, rejected, chosen_rewards, rejected_rewards

    expect_same_training(model, changed(), plain())
