# SPDX-License-Identifier: Apache-2.0
"""What the choice of a backend depends on, beside the device."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Size(NamedTuple):
    """Of a projection."""

    dtype: torch.dtype
    rows: int  # N
    hidden_size: int  # H
    vocab_size: int  # V
    heavy: bool = False  # statistics or a cap, which a fused epilogue pays for
    # Whatever was tuned on this machine does not count: ranks that share a vocabulary must choose
    # alike, and two heads side by side are no projection that ``tune`` looks at.
    static: bool = False
