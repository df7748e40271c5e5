# SPDX-License-Identifier: Apache-2.0
"""What ranks of a ``seq_group`` and of a ``dp_group`` compare at their first call of a kind, and
what each of them raises."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastpref import preference_loss
from tests.ranks import Ranks

pytestmark = pytest.mark.heavy

B, T, H, V = 4, 3, 5, 11
ZEROS = torch.zeros(B)
# What the second rank passes otherwise, and what is said of it.
DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "objective": ({"objective": "cpo"}, "in objective: 'simpo' on rank 0, 'cpo' on rank 1"),
    "reduction": ({"reduction": "sum"}, "in reduction: 'mean' on rank 0, 'sum' on rank 1"),
    "layout": ({"layout": "interleaved"}, "in layout: 'halves' on rank 0, 'interleaved' on rank 1"),
    "outputs": ({"outputs": ("entropy",)}, r"in outputs: \(\) on rank 0, \('entropy',\) on rank 1"),
    "token_weights": (
        {"token_weights": torch.ones(B, T)},
        "in token_weights: False on rank 0, True on rank 1",
    ),
    "extras": (
        {"extras": {"chosen_lengths": torch.full((B // 2,), 2 * T)}},
        r"in extras: \(\) on rank 0, .*chosen_lengths.* on rank 1",
    ),
    "dtype": ({"dtype": torch.float64}, "in dtype: torch.float32 on rank 0, torch.float64 on"),
    "rows": ({"rows": 2}, "in rows: 4 on rank 0, 2 on rank 1"),
    "packed": ({"packed": True}, "in cu_seqlens: False on rank 0, True on rank 1"),
}
REFERENCE = (
    {"objective": "dpo", "ref_logps": ZEROS},
    {"objective": "dpo", "ref_hidden": torch.zeros(B, T, H)},
    r"in ref_logps and ref_hidden: \(True, False\) on rank 0, \(False, True\) on rank 1",
)
OF_PAIRS = ("objective", "reduction")


def call(rank: int, kind: str, given: dict[str, Any]) -> str:
    group = dist.new_group([0, 1])
    dtype, rows = given.pop("dtype", torch.float32), given.pop("rows", B)
    hidden = torch.ones(rows, T, H, dtype=dtype)
    target = torch.zeros(rows, T, dtype=torch.int64)
    if given.pop("packed", False):
        hidden, target = hidden.flatten(0, 1), target.flatten()
        given["cu_seqlens"] = torch.arange(0, B * T + 1, T)
    try:
        weight = torch.ones(V, H, dtype=dtype)
        preference_loss(hidden, weight, target, **({"objective": "simpo", kind: group} | given))
    except ValueError as error:
        return str(error)
    return "nothing raised"


def second_differs(rank: int, kind: str, name: str) -> str:
    return call(rank, kind, dict(DIFFERENT[name][0]) if rank == 1 else {})


def references_differ(rank: int) -> str:
    return call(rank, "seq_group", dict(REFERENCE[rank]))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("seq_group", name) for name in DIFFERENT] + [("dp_group", name) for name in OF_PAIRS],
)
def test_what_differs_is_raised_on_every_rank(kind: str, name: str, two_ranks: Ranks) -> None:
    first, second = two_ranks(second_differs, kind, name)
    assert first == second and f"the ranks of {kind} must make the same call" in first
    with pytest.raises(ValueError, match=DIFFERENT[name][1]):
        raise ValueError(first)


def test_references(two_ranks: Ranks) -> None:
    first, second = two_ranks(references_differ)
    assert first == second
    with pytest.raises(ValueError, match=REFERENCE[2]):
        raise ValueError(first)
