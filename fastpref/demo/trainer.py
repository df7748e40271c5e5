# SPDX-License-Identifier: Apache-2.0
"""TRL's DPOTrainer with any objective of fastpref as its loss."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer

from .. import objectives, sequence_logp
from .objective import LOSS_TYPES, columns


class ObjectiveTrainer(DPOTrainer):
    """A DPOTrainer whose loss is an objective of fastpref.

    The model's fused head scores the tokens, `sequence_logp` sums them, and the objective makes
    the loss. Lengths, labels and scores come from the batch; other extras are columns of the data.
    """

    objective: objectives.Objective
    columns: tuple[str, ...]
    _signature_columns: Any

    def __init__(self, *, objective: objectives.Objective, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.objective = objective
        self.columns = columns(objective)
        self.data_collator = _WithColumns(self.data_collator, self.columns)

    def _set_signature_columns_if_needed(self) -> None:
        base: Any = super()
        base._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, *self.columns]

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        extras = {name: inputs.pop(name) for name in self.columns}
        mask = inputs["completion_mask"]
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            labels=inputs["input_ids"].masked_fill(mask == 0, -100),
            fused_lm_head=True,
        )
        policy = sequence_logp(outputs.log_probs, mask=mask[:, 1:])
        reference = None
        if self.objective.needs_reference:
            untyped: Any = self
            reference = torch.cat(untyped.compute_ref_log_probs(self.ref_model, inputs))
        losses = _losses(self.objective, policy, reference, mask[:, 1:].sum(dim=1), extras)
        return (losses.mean(), outputs) if return_outputs else losses.mean()


class _WithColumns:
    """A collator that keeps some columns as tensors."""

    def __init__(self, collate: Any, names: Sequence[str]) -> None:
        self.collate, self.names = collate, names

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = self.collate(examples)
        for name in self.names:
            batch[name] = torch.tensor([example[name] for example in examples])
        return batch


def _losses(
    objective: objectives.Objective,
    policy: Tensor,  # (2P,), chosen rows first
    reference: Tensor | None,  # (2P,)
    lengths: Tensor,  # (2P,)
    extras: dict[str, Tensor],
) -> Tensor:
    """The objective's losses of P pairs, taken as pairs, as 2P units or as P lists of two."""
    rows = [policy] if reference is None else [policy, reference]
    if objective.unit == "pair":
        logps = [half for row in rows for half in row.chunk(2)]
        chosen, rejected = lengths.chunk(2)
        filled = {"chosen_lengths": chosen, "rejected_lengths": rejected}
    elif objective.unit == "unit":
        logps = rows
        preferred = torch.arange(len(policy), device=policy.device) < len(policy) // 2
        filled = {"lengths": lengths, "labels": preferred}
    else:
        logps = [torch.stack(row.chunk(2), dim=1) for row in rows]
        scores = torch.tensor([1.0, 0.0], device=policy.device).expand(len(policy) // 2, 2)
        filled = {"lengths": torch.stack(lengths.chunk(2), dim=1), "scores": scores}
    given = {name: value for name, value in filled.items() if name in objective.extras}
    return objective(*logps, **given, **extras).losses


def make_trainer(objective: objectives.Objective, **arguments: Any) -> Any:
    """A trainer of preference pairs for `objective`; `arguments` are those of DPOTrainer."""
    if objective.name in LOSS_TYPES:
        return DPOTrainer(**arguments)
    return ObjectiveTrainer(objective=objective, **arguments)
