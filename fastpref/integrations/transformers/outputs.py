# SPDX-License-Identifier: Apache-2.0
"""What the forward of a model with a fused head returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def log_probs_of(outputs: Any) -> Tensor:
    """(R, T - 1), 0 where not scored.

    Raises:
        ValueError: there are none.
    """
    found = _field(outputs, "log_probs")
    if found is None:
        got = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(
            f"outputs must have log_probs, as those of a model with a fused head; got {got}. "
            "Prepare the model with fastpref.fuse_lm_head(model)"
        )
    return found


def aux_loss_of(outputs: Any) -> Tensor | None:
    """0-dim, of a mixture of experts that returns one."""
    return _field(outputs, "aux_loss")


def _field(outputs: Any, name: str) -> Tensor | None:
    found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
    return found if isinstance(found, Tensor) else None
