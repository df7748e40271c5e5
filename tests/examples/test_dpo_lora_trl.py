# SPDX-License-Identifier: Apache-2.0
"""The example's training with and without its one call: the same losses and the same adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.integrations import trl as integration
from tests.examples.loading import load

pytestmark = pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning")
KEYS = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy")


@pytest.mark.heavy
def test_as_stock_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("dpo_lora_trl")
    made: list[Any] = []
    make, score = example.make_trainer, integration.LogProbAdapter.apply
    calls: list[None] = []

    def make_and_keep(folder: str) -> Any:
        made.append(make(folder))
        return made[-1]

    def count(*args: Any) -> Any:
        calls.append(None)
        return score(*args)

    integration.unpatch()
    stock = make(str(tmp_path))
    stock.train()
    monkeypatch.setattr(example, "make_trainer", make_and_keep)
    monkeypatch.setattr(integration.LogProbAdapter, "apply", staticmethod(count))
    try:
        example.main()
    finally:
        integration.unpatch()
    (fast,) = made
    assert len(calls) == 12  # policy and reference, six times
    rows = [
        torch.tensor([[float(entry[key]) for key in KEYS] for entry in one.state.log_history[:-1]])
        for one in (fast, stock)
    ]
    torch.testing.assert_close(*rows, rtol=1e-3, atol=1e-4)
    losses = rows[0][:, 0].tolist()
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.2 * losses[0]
    trained = [
        torch.cat([value.flatten() for value in one.model.parameters() if value.requires_grad])
        for one in (fast, stock)
    ]
    torch.testing.assert_close(*trained, rtol=1e-2, atol=1e-4)
