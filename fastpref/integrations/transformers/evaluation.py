# SPDX-License-Identifier: Apache-2.0
"""An objective on the log-probabilities that a fused head returned and the labels beside them.

Rows of a batch are (R,), units with their responses (U, r): pairs (P, 2), lists (G, K), single
responses (B, 1). Of lists, rows are the responses that are there.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...objectives import Objective
from ...sequences import sequence_logp
from ...units import LayoutName, Numbers, PreferenceOutput, arrange, unit_loss
from .labels import LENGTHS, REFERENCE, PreferenceLabels

LAYOUTS: Mapping[str, LayoutName] = {"pair": "halves", "unit": "units", "list": "groups"}


def evaluate(
    objective: Objective,
    log_probs: Tensor,
    labels: PreferenceLabels,
    state: Mapping[str, Tensor],
    total: Tensor | int,
) -> PreferenceOutput:
    """The sum of the losses over ``total``, and what else ``unit_loss`` returns.

    Args:
        objective: of pairs, lists or single responses.
        log_probs: (R, T - 1), 0 where not scored.
        labels: of ``PreferenceCollator``.
        state: what the training keeps, by the names of the objective's extras.
        total: what the sum is divided by.
    """
    check_labels(objective, labels)
    unit, lengths, logps = objective.unit, labels.lengths, sequence_logp(log_probs)
    _check_rows(unit, lengths, len(logps))
    made = {LENGTHS[unit], REFERENCE}
    extras = {name: labels.numbers(name) for name in labels if name not in made}
    if unit == "list":
        present = lengths > 0
        logps = logps.new_zeros(lengths.shape).masked_scatter(present, logps).flatten()
        if "mask" in objective.extras:
            extras["mask"] = present
    ref_logps = None
    if REFERENCE in labels:
        ref_logps = by_row(unit, labels.numbers(REFERENCE)).to(logps.dtype)
    return unit_loss(
        objective,
        Numbers(logps=logps, ref_logps=ref_logps, lengths=lambda: by_row(unit, lengths)),
        arrange(LAYOUTS[unit], lengths.shape[1] if unit == "list" else None, len(logps), objective),
        extras={**extras, **state},
        reduction="sum",
        denominator=total,
    )


def by_row(unit: str, values: Tensor) -> Tensor:
    """(U, r) -> (R,): all chosen responses and then all rejected ones, else as they come."""
    return values.t().flatten() if unit == "pair" else values.flatten()


def by_unit(unit: str, values: Tensor, labels: PreferenceLabels) -> Tensor:
    """(R,) -> (U, r)."""
    return values.view(2, -1).t() if unit == "pair" else values.view(labels.lengths.shape)


def check_labels(objective: Objective, labels: object) -> None:
    """Raise unless ``labels`` are of a ``PreferenceCollator`` for objectives of this family."""
    remedy = (
        "pass the Trainer data_collator=PreferenceCollator(loss.objective, pad_token_id=...) and "
        "TrainingArguments(..., remove_unused_columns=False)"
    )
    if labels is None:
        raise ValueError(
            f"labels must be those of PreferenceCollator, got None: the batch had none; {remedy}"
        )
    if not isinstance(labels, PreferenceLabels):
        shape = f" of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else ""
        raise TypeError(
            f"labels must be those of PreferenceCollator, got {type(labels).__name__}{shape}. The "
            "Trainer counts the tokens of such labels, and a mean over pairs, lists or responses "
            f"would come out wrong under gradient accumulation and on several ranks; {remedy}"
        )
    if LENGTHS[objective.unit] not in labels:
        raise ValueError(
            f"labels were made for another family: got {', '.join(labels)}, and {objective.name} "
            f"takes {LENGTHS[objective.unit]}; {remedy}"
        )


def _check_rows(unit: str, lengths: Tensor, rows: int) -> None:
    if unit != "list":
        expected = lengths.numel()
    elif lengths.device.type == "cpu":
        expected = int((lengths > 0).sum())
    else:  # reading it would wait for the device
        return
    if rows != expected:
        raise ValueError(
            f"log_probs must have {expected} rows for {len(lengths)} units, got {rows}: the batch "
            "was cut or joined after it was collated. Of several processes each must collate its "
            'own: TrainingArguments(..., accelerator_config={"dispatch_batches": False})'
        )
