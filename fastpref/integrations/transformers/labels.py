# SPDX-License-Identifier: Apache-2.0
"""What a batch holds beside its tokens, in the place of the ``labels`` that the Trainer hands to
the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# By family, so that labels made for one are no other's.
LENGTHS: Mapping[str, str] = {
    "pair": "pair_lengths",
    "unit": "response_lengths",
    "list": "list_lengths",
}
REFERENCE = "ref_logps"


class PreferenceLabels(dict[str, Any]):
    """Tensors by name, one row a unit: a pair, a list or a response.

    - ``pair_lengths`` (P, 2), ``response_lengths`` (B, 1) or ``list_lengths`` (G, K), the first of
      all: int64, the scored tokens of each response, chosen first; 0 where a list has none.
    - ``ref_logps``, shaped likewise: what the reference says, where the objective takes one.
    - further columns of the data set, by the names of the objective's extras, (U, ...).

    All but the first are float32 numbers, carried as the int32 of the same bits: under DeepSpeed
    the Trainer casts every floating tensor of a batch to the model's dtype, and a sum of
    log-probabilities keeps two digits in bfloat16. ``put`` and ``numbers`` write and read them.

    A dict, so that what moves, pads, gathers or concatenates batches makes another of its class.
    The Trainer counts the items of a batch as ``labels.ne(-100).sum()``, and newer ones, where the
    model's own loss shifts labels, as ``labels[..., 1:].ne(-100).sum()``: here both are the number
    of units.
    """

    @property
    def lengths(self) -> Any:
        """(U, r), the first tensor."""
        return next(iter(self.values()))

    def ne(self, other: Any) -> Tensor:
        """(U,) bool, True: each unit counts."""
        return torch.ones(len(self.lengths), dtype=torch.bool, device=self.lengths.device)

    def __getitem__(self, key: Any) -> Any:
        # A slice of positions, which units do not have.
        return self if isinstance(key, tuple) else super().__getitem__(key)

    def put(self, name: str, numbers: Tensor) -> None:
        """Store (U, ...) numbers."""
        self[name] = numbers.float().contiguous().view(torch.int32)

    def numbers(self, name: str) -> Any:
        """(U, ...) float32, as they were put; of numpy arrays, which ``compute_metrics`` gets as
        ``label_ids``, an array."""
        stored = self[name]
        return stored.view(torch.float32 if isinstance(stored, Tensor) else "float32")
