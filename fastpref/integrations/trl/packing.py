# SPDX-License-Identifier: Apache-2.0
"""A batch without its padding: all rows one after the other, in one row.

Positions start anew at each, by which transformers' attention (flash, flex, sdpa and eager alike)
keeps rows apart. A model that does not look at positions would let a row see the ones before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .joined import Form, Fused, Rows

CHECKED = 32  # tokens a row


def packed_call(model: nn.Module, fused: Fused, rows: Rows) -> dict[str, Any]:
    """What ``fused`` returns of padded rows, by name."""
    kept = rows.kept
    output = fused(
        input_ids=rows.ids[kept][None],
        position_ids=(kept.long().cumsum(1) - 1)[kept][None],
        shift_labels=rows.ahead[kept][None],
        **rows.others,
    )
    return {name: _in_rows(value, kept) for name, value in output.items()}


def _in_rows(value: Any, kept: Tensor) -> Any:
    """Of (1, N) by token (B, T - 1), 0 where there is padding."""
    if not isinstance(value, Tensor) or value.dim() != 2:
        return value
    rows = value.new_zeros(kept.shape).masked_scatter(kept.to(value.device), value)
    return rows[:, :-1]


def _two_rows(ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The first, and the last, which has others before it; every token counts, also of a prompt."""
    if len(ids) < 2:
        return None
    ids, kept = (torch.cat((one[:1, :CHECKED], one[-1:, :CHECKED])) for one in (ids, kept))
    return ids, kept, ids.masked_fill(~kept, -100)


PADDING_FREE = Form(
    "padding_free", "keeps packed rows apart by their positions", packed_call, _two_rows
)
