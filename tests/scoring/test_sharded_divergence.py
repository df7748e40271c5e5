# SPDX-License-Identifier: Apache-2.0
"""Divergences of heads whose vocabulary is spread over two ranks, against one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastpref import ScoringOptions, linear_divergence
from tests.ranks import Ranks
from tests.scoring.test_divergence import DIVERGENCES

pytestmark = pytest.mark.heavy

N, H, TEACHER, V = 150, 9, 13, 331
SPLIT = 100  # columns of the first rank


@dataclass(frozen=True)
class Sharded:
    kind: str
    dtype: torch.dtype = torch.float64
    needs: tuple[str, ...] = ("student_hidden", "student_weight", "student_bias")
    padding: int = 0  # rows of NaN beyond those in use
    apart: float = 1.0  # of the logits
    options: dict[str, Any] = field(default_factory=dict)
    map: dict[str, Any] = field(default_factory=dict)


LITTLE = {"memory_budget": 80 * V * 8}
CASES = {
    **{f"{kind}": Sharded(kind) for kind in DIVERGENCES},
    **{f"{kind}, far apart": Sharded(kind, apart=30.0) for kind in DIVERGENCES},
    **{
        f"{kind}, capped, recomputed": Sharded(
            kind, options=LITTLE | {"schedule": "recompute"}, map={"softcap": 4.0}
        )
        for kind in DIVERGENCES
    },
    "float32": Sharded("jsd", torch.float32),
    "bfloat16": Sharded("reverse_kl", torch.bfloat16),
    "frozen": Sharded("forward_kl", needs=("student_hidden",), options=LITTLE),
    "kept in part": Sharded("forward_kl", options={"memory_budget": 2 * N * V * 4}),
    "padded": Sharded("tv", padding=3),
    "without gradient": Sharded("jsd", needs=()),
}


def tensors(case: Sharded) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    return {
        "student_hidden": draw(N, H),
        "student_weight": case.apart * draw(V, H),
        "teacher_hidden": draw(N, TEACHER),
        "teacher_weight": case.apart * draw(V, TEACHER),
        "student_bias": draw(V),
        "mask": torch.rand(N, generator=generator) < 0.7,
    }


def divergence(case: Sharded, given: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    leaves = {name: one.clone().requires_grad_(name in case.needs) for name, one in given.items()}
    value = linear_divergence(
        **leaves,
        divergence=case.kind,
        beta=0.3,
        options=ScoringOptions(**case.options),
        **case.map,
        **changes,
    )
    if case.needs:
        (value * torch.linspace(-1, 2, N, dtype=value.dtype)).sum().backward()
    return {"value": value.detach()} | {f"d {name}": leaves[name].grad for name in case.needs}


def on_a_rank(rank: int, name: str) -> dict[str, Tensor]:
    case, own = CASES[name], slice(0, SPLIT) if rank == 0 else slice(SPLIT, V)
    given = tensors(case)
    for one in ("student_weight", "teacher_weight", "student_bias"):
        rows = given[one][own]
        padding = rows.new_full((case.padding, *rows.shape[1:]), torch.nan)
        given[one] = torch.cat([rows, padding])
    held = (own.start, own.stop) if case.padding else None
    return divergence(case, given, tp_group=dist.group.WORLD, vocab_range=held)


@pytest.mark.parametrize("name", CASES)
def test_as_in_one_process(name: str, two_ranks: Ranks) -> None:
    case = CASES[name]
    found, expected = two_ranks(on_a_rank, name), divergence(case, tensors(case))
    tolerance = {torch.float64: 1e-8, torch.float32: 2e-4}.get(case.dtype, 3e-2)
    for one, wanted in expected.items():
        parts = [rank[one] for rank in found]
        if one in ("d student_weight", "d student_bias"):
            held = [SPLIT, V - SPLIT]
            assert all(not part[rows:].any() for part, rows in zip(parts, held, strict=True))
            parts = [torch.cat([part[:rows] for part, rows in zip(parts, held, strict=True)])]
        for part in parts:
            torch.testing.assert_close(part, wanted, rtol=tolerance, atol=tolerance)


def refused(rank: int) -> str:
    """Of shards of which the teacher's has more rows."""
    group, hidden = dist.group.WORLD, torch.randn(2, 3)
    with pytest.raises(ValueError, match="rows") as error:
        linear_divergence(hidden, torch.randn(5, 3), hidden, torch.randn(6, 3), tp_group=group)
    return str(error.value)


def test_shards_of_different_rows_are_refused(two_ranks: Ranks) -> None:
    for said in two_ranks(refused):
        assert "same ids on each rank, got 5 and 6 rows; pass vocab_range with tp_group" in said
