# SPDX-License-Identifier: Apache-2.0
"""What a reference model says, as columns of the data set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...sequences import sequence_logp
from .collator import PreferenceCollator
from .outputs import log_probs_of


def add_reference_logps(
    dataset: Any, model: torch.nn.Module, collator: PreferenceCollator, *, batch_size: int = 8
) -> Any:
    """The data set with the summed log-probability of each response under ``model`` beside it.

    Once before the training, with the reference as it is: the policy before its first step, as a
    rule, or with ``model.disable_adapter()`` around the call that of a PEFT model.

    Args:
        dataset: a ``datasets.Dataset`` with the collator's columns of token ids.
        model: with a fused head, on the device where it shall run.
        collator: the one of the training: what it cuts off must be cut off here.
        batch_size: rows of the data set at a time.

    Returns:
        A ``datasets.Dataset``, with ``ref_chosen_logps`` and ``ref_rejected_logps`` of pairs,
        ``ref_logps`` of single responses, and lists of them in ``ref_logps`` of lists.

    Raises:
        ValueError: the collator's objective takes no reference, or as the collator raises.
    """
    columns = collator.columns
    if not columns.reference:
        raise ValueError(f"{columns.name} takes no reference; leave add_reference_logps out")
    values: dict[str, list[Any]] = {name: [] for name in columns.reference}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(dataset), batch_size):
            rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            inputs, lengths = collator.inputs(rows)
            sums = _sums(model, inputs)
            for name, column in zip(values, _columns(columns.unit, sums, lengths), strict=True):
                values[name] += column
    finally:
        model.train(was_training)
    for name, column in values.items():
        dataset = dataset.add_column(name, column)
    return dataset


@torch.no_grad()
def _sums(model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
    """(R,), on the CPU."""
    device = next(model.parameters()).device
    moved = {n: one.to(device) if isinstance(one, Tensor) else one for n, one in inputs.items()}
    return sequence_logp(log_probs_of(model(**moved))).cpu()


def _columns(unit: str, sums: Tensor, lengths: Tensor) -> list[list[Any]]:
    """What each column holds of these rows."""
    if unit == "pair":
        return [half.tolist() for half in sums.chunk(2)]
    if unit == "unit":
        return [sums.tolist()]
    return [[part.tolist() for part in sums.split((lengths > 0).sum(1).tolist())]]
