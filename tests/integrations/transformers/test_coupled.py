# SPDX-License-Identifier: Apache-2.0
"""Objectives whose losses depend on their batch take each micro-batch for the batch."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from fastpref.integrations.transformers import loss_func
from tests.integrations.transformers.plain_losses import kto
from tests.integrations.transformers.trainings import check_step, make_rows, train


@pytest.mark.heavy
@pytest.mark.parametrize("accumulated", [1, 3])
def test_kto_with_the_baseline_of_each_micro_batch(accumulated, tmp_path):
    rows = make_rows("unit")
    loss = loss_func("kto", beta=0.3)
    gradients, logged = train(loss, rows, tmp_path, gradient_accumulation_steps=accumulated)
    batches = [rows[start : start + 2] for start in range(0, len(rows), 2)]
    steps = [batches[start : start + accumulated] for start in range(0, len(batches), accumulated)]

    def plain(scores, step):
        total = sum(len(batch) for batch in step)
        return torch.stack([len(b) / total * kto(scores, b, beta=0.3) for b in step]).sum()

    for gradient, number, step in zip(gradients, logged, steps, strict=True):
        check_step(gradient, number, lambda scores, step=step: plain(scores, step))
