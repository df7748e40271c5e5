# SPDX-License-Identifier: Apache-2.0
"""preference_loss under ``dp_group`` on ranks that hold different numbers of rows, or none, against
one process with all rows: sums of the losses, and gradients."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastpref import preference_loss
from tests.ranks import Ranks

pytestmark = pytest.mark.heavy

T, H, V = 6, 5, 22
OBJECTIVES = ("aot", "dr_dpo", "relative_po", "kto", "bco", "dapo", "disco")
BY_ROW = ("kto", "bco", "dapo", "disco")
SPLITS = [(3, 5), (2, 4), (0, 4), (8, 0)]  # in units


def make_batch(name: str, units: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Arguments by row, pairs interleaved, and extras by unit."""
    generator = torch.Generator().manual_seed(units)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = units if name in BY_ROW else 2 * units
    target = torch.randint(V, (rows, T), generator=generator)
    target[torch.rand(rows, T, generator=generator) < 0.3] = -100
    given = {"hidden": draw(rows, T, H), "target": target}
    if name not in ("dapo", "disco"):
        given["ref_logps"] = -10 + draw(rows)
    extras = {
        "relative_po": {"prompt_embeddings": draw(units, 3)},
        "kto": {"labels": torch.arange(units) % 3 == 0},
        "bco": {"labels": torch.arange(units) % 3 == 0},
        "dapo": {"advantages": draw(units), "old_token_logp": -3 + draw(rows, T)},
        "disco": {"rewards": torch.arange(units) % 2, "group_ids": torch.arange(units) // 3},
    }
    return given, extras.get(name, {})


def loss_and_gradients(
    name: str, given: dict[str, Tensor], extras: dict[str, Tensor], **changes: Any
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).requires_grad_()
    given["hidden"].requires_grad_()
    output = preference_loss(
        **given,
        weight=weight,
        objective=name,
        layout="halves" if name in BY_ROW else "interleaved",
        extras=extras,
        reduction="sum",
        **changes,
    )
    d_hidden, d_weight = torch.autograd.grad(output.loss, (given["hidden"], weight))
    found = {"losses": output.losses, "rewards": output.rewards, "hidden": d_hidden}
    return found | {"loss": output.loss.detach(), "weight": d_weight}


def on_a_rank(rank: int, split: tuple[int, int]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name in OBJECTIVES:
        given, extras = make_batch(name, sum(split))
        rows = split if name in BY_ROW else [2 * units for units in split]
        given = {key: one.split(rows)[rank] for key, one in given.items()}
        extras = {key: one.split(split)[rank] for key, one in extras.items()}
        found[name] = loss_and_gradients(name, given, extras, dp_group=dist.group.WORLD)
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_the_ranks_add_up_to_one_process(two_ranks: Ranks, split: tuple[int, int]) -> None:
    ranks = two_ranks(on_a_rank, split)
    for name in OBJECTIVES:
        whole = loss_and_gradients(name, *make_batch(name, sum(split)))
        for key, want in whole.items():
            parts = [one[name][key] for one in ranks]
            got = sum(parts) if key in ("loss", "weight") else torch.cat(parts)
            torch.testing.assert_close(got, want)
