# SPDX-License-Identifier: Apache-2.0
"""TRL's DPOTrainer with any objective of fastpref as its loss, on pairs or on lists."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer

from .. import objectives, sequence_logp
from .objective import columns, config_arguments
from .tokens import pad


class ObjectiveTrainer(DPOTrainer):
    """A DPOTrainer whose loss is an objective of fastpref.

    The model's fused head scores the tokens, `sequence_logp` sums them, and the objective makes
    the loss. `extras` names what the collator gives beside the tokens.
    """

    objective: objectives.Objective
    extras: tuple[str, ...]
    _signature_columns: Any

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        extras = {name: inputs.pop(name) for name in self.extras}
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


class PairTrainer(ObjectiveTrainer):
    """Of pairs, taken as such or as two responses each; its data set is that of DPOTrainer, and
    has the columns that the objective needs."""

    def __init__(self, *, objective: objectives.Objective, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.objective = objective
        self.extras = tuple(columns(objective))
        self.data_collator = _WithColumns(self.data_collator, self.extras)

    def _set_signature_columns_if_needed(self) -> None:
        base: Any = super()
        base._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, *self.extras]


class ListTrainer(ObjectiveTrainer):
    """Of lists, which need not be of one length; its data set has ``prompt_ids``,
    ``completion_ids`` (K of them) and ``scores`` (K)."""

    def __init__(self, *, objective: objectives.Objective, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.objective = objective
        self.extras = ("mask", "scores")
        self.data_collator = _Lists(arguments["processing_class"].pad_token_id)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "completion_ids", "scores"]


class _WithColumns:
    """A collator that keeps some columns as tensors."""

    def __init__(self, collate: Any, names: Sequence[str]) -> None:
        self.collate, self.names = collate, names

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = self.collate(examples)
        for name in self.names:
            batch[name] = torch.tensor(
                [example[name] for example in examples], dtype=torch.float32, device="cpu"
            )
        return batch


class _Lists:
    """A collator of G lists: a row for every completion that there is, and in the places of
    ``(G, K)``, K that of the longest, whether there is one and its score."""

    def __init__(self, filler: int) -> None:
        self.filler = filler

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [
            (example["prompt_ids"], completion)
            for example in examples
            for completion in example["completion_ids"]
        ]
        ids, attended, labels = pad(rows, self.filler, torch.device("cpu"))
        sizes = torch.tensor(
            [len(example["scores"]) for example in examples], dtype=torch.int64, device="cpu"
        )
        mask = torch.arange(int(sizes.max()), dtype=torch.int64, device="cpu") < sizes.unsqueeze(1)
        scores = torch.tensor(
            [score for example in examples for score in example["scores"]],
            dtype=torch.float32,
            device="cpu",
        )
        return {
            "input_ids": ids,
            "attention_mask": attended,
            "completion_mask": (labels != -100).long(),
            "mask": mask,
            "scores": _in_lists(scores, mask),
        }


def _in_lists(values: Tensor, mask: Tensor) -> Tensor:
    """A value for every completion that there is -> (G, K), 0 where there is none."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _losses(
    objective: objectives.Objective,
    policy: Tensor,  # (N,), of pairs the chosen rows first
    reference: Tensor | None,  # (N,)
    lengths: Tensor,  # (N,)
    extras: dict[str, Tensor],
) -> Tensor:
    """The objective's losses of N/2 pairs, of their N responses, or of the lists of ``mask``."""
    logps: Iterable[Tensor] = [policy] if reference is None else [policy, reference]
    if objective.unit == "pair":
        logps = [half for row in logps for half in row.chunk(2)]
        chosen, rejected = lengths.chunk(2)
        filled = {"chosen_lengths": chosen, "rejected_lengths": rejected}
    elif objective.unit == "list":
        logps = [_in_lists(row, extras["mask"]) for row in logps]
        filled = {"lengths": _in_lists(lengths, extras["mask"])}
    elif "labels" in objective.extras:
        preferred = (
            torch.arange(len(policy), device=policy.device, dtype=torch.int64) < len(policy) // 2
        )
        filled = {"lengths": lengths, "labels": preferred}
    else:  # without labels it unlearns whatever it is given
        logps = [row.chunk(2)[1] for row in logps]
        filled = {"lengths": lengths.chunk(2)[1]}
    given = {name: value for name, value in filled.items() if name in objective.extras}
    return objective(*logps, **given, **extras).losses


def make_trainer(objective: objectives.Objective, **arguments: Any) -> Any:
    """A trainer of preferences for `objective`; `arguments` are those of DPOTrainer."""
    if objective.unit == "list":
        return ListTrainer(objective=objective, **arguments)
    if config_arguments(objective):
        return DPOTrainer(**arguments)
    return PairTrainer(objective=objective, **arguments)
