# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set to batches, for a model with a fused head and for ``PreferenceLoss``."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...objectives import Objective, as_objective
from .columns import RENAMED, columns_of
from .labels import LENGTHS, REFERENCE, PreferenceLabels
from .loss import PreferenceLoss
from .tokens import HOST, Response, model_inputs, response_of

Row = Mapping[str, Any]


class PreferenceCollator:
    """Batches of pairs, lists or single responses, for the objective that is trained.

    A row of the data set holds token ids by TRL's names, a sequence of integers each:

    - pairs: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``;
    - single responses: ``prompt_ids``, ``completion_ids``, and where the objective takes labels
      ``label``, True for a desirable one;
    - lists: ``prompt_ids``, ``completions_ids``, a list of responses, of any number where the
      objective takes a mask (fastpref's own do), and ``scores`` or ``ranks``, one each.

    Where the objective compares with a reference: ``ref_chosen_logps`` and ``ref_rejected_logps``,
    of lists and single responses ``ref_logps``. Each is a response's summed log-probability, or one
    number for each of its tokens, of which those that ``max_length`` leaves are summed;
    ``add_reference_logps`` makes them. What else the objective takes is a column by its name there:
    ``reward_margin``, say. Other columns are left alone.

    A batch holds ``input_ids``, ``attention_mask`` and ``fused_labels``, each (R, T) int64, and
    ``fused_lm_head=True``, for the forward of a model with a fused head; and ``labels``, a
    ``PreferenceLabels`` of one row a unit, for the loss. Rows are, of P pairs, the chosen responses
    and then the rejected ones (R = 2 P), else the responses as they come.

    Args:
        objective: a name, an ``Objective`` (``loss.objective``) or a pairwise function.
        pad_token_id: what fills up short rows. It is neither attended to nor scored.
        max_length: tokens of prompt and response together; what is over is cut off the end.
        padding_side: "right" or "left". Positions are left to the model: one that counts them from
            the start of the row, whatever the attention mask, wants "right".

    Raises:
        ValueError, TypeError: on an argument, or for a batch on a column that is missing or holds
            something else, naming it.
    """

    def __init__(
        self,
        objective: str | Objective | Callable[..., Any],
        *,
        pad_token_id: int,
        max_length: int | None = None,
        padding_side: Literal["right", "left"] = "right",
    ) -> None:
        if isinstance(objective, PreferenceLoss):  # callable, as a pairwise function is
            raise TypeError(
                "objective must be a name, an Objective or a function, got "
                f"{type(objective).__name__}; pass its .objective"
            )
        if not isinstance(pad_token_id, int) or pad_token_id < 0:
            raise ValueError(
                f"pad_token_id must be the id of a token, got {pad_token_id!r}; where the "
                "tokenizer has no pad token, any other does, such as eos_token_id"
            )
        if max_length is not None and not max_length > 1:
            raise ValueError(f"max_length must be None or at least 2, got {max_length!r}")
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
        self.columns = columns_of(as_objective(objective))
        self.pad_token_id = pad_token_id
        self.max_length = max_length
        self.padding_side = padding_side

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The batch of ``rows``, on the CPU."""
        units = self._units(rows)
        labels = PreferenceLabels({LENGTHS[self.columns.unit]: _lengths(units)})
        if self.columns.reference:
            labels.put(REFERENCE, self._reference(rows, units))
        for name in self._extras(rows):
            labels.put(name, self._extra(name, rows, units))
        # First, so that a batch's size, where it is read off the first tensor, counts units.
        return {"labels": labels, **self._inputs(units)}

    def inputs(self, rows: Sequence[Row]) -> tuple[dict[str, Any], Tensor]:
        """Of ``rows`` what the forward takes, and (U, r) the scored tokens of each response. Needs
        the columns of token ids alone."""
        units = self._units(rows)
        return self._inputs(units), _lengths(units)

    def _units(self, rows: Sequence[Row]) -> list[list[Response]]:
        """The responses of each row, chosen first."""
        columns = self.columns
        self._check(rows, columns.tokens, "they hold token ids")
        units = []
        for row in rows:
            prompt, *responses = (row[name] for name in columns.tokens)
            if columns.unit == "list":
                (responses,) = responses
            units.append([response_of(prompt, one, self.max_length) for one in responses])
        sizes = sorted({len(unit) for unit in units})
        if sizes[0] == 0:
            raise ValueError("completions_ids must hold a response at least, got an empty list")
        if len(sizes) > 1 and not columns.takes_mask:
            raise ValueError(
                f"completions_ids must hold equally many responses in all rows, as {columns.name} "
                f"takes no mask; got {sizes[0]} and {sizes[-1]}. Give it an extra 'mask', (G, K)"
            )
        return units

    def _inputs(self, units: list[list[Response]]) -> dict[str, Any]:
        rows = [response for unit in units for response in unit]
        if self.columns.unit == "pair":
            rows = rows[0::2] + rows[1::2]
        return model_inputs(rows, self.pad_token_id, self.padding_side)

    def _reference(self, rows: Sequence[Row], units: list[list[Response]]) -> Tensor:
        names = self.columns.reference
        self._check(rows, names, "add_reference_logps(dataset, model, collator) makes them")
        of_lists = self.columns.unit == "list"
        values = []
        for row, unit in zip(rows, units, strict=True):
            given = row[names[0]] if of_lists else [row[name] for name in names]
            _check_one_each(names[0], given, unit)
            sums = [
                _sum(names[0], one, response) for one, response in zip(given, unit, strict=True)
            ]
            values.append(torch.stack(sums))
        return pad_sequence(values, batch_first=True)

    def _extras(self, rows: Sequence[Row]) -> list[str]:
        """Those that the rows have, by the objective's names."""
        columns = self.columns
        given = [one for one in columns.optional if any(_column(one) in row for row in rows)]
        extras = [*columns.needed, *given]
        self._check(rows, [_column(one) for one in extras], f"{columns.name} takes them so named")
        return extras

    def _extra(self, name: str, rows: Sequence[Row], units: list[list[Response]]) -> Tensor:
        column = _column(name)
        values = [_numbers(column, row[column]) for row in rows]
        if name not in self.columns.listed:
            return torch.stack(values)
        for value, unit in zip(values, units, strict=True):
            _check_one_each(column, value, unit)
        return pad_sequence(values, batch_first=True)

    def _check(self, rows: Sequence[Row], names: Sequence[str], what: str) -> None:
        """Raise ValueError unless all rows have all ``names``."""
        if not rows:
            raise ValueError("a batch must have a row at least, got none")
        for row in rows:
            missing = [name for name in names if name not in row]
            if missing:
                raise ValueError(
                    f"{self.columns.name} needs the columns {', '.join(missing)} ({what}); got a "
                    f"row with {', '.join(row) or 'none'}. The Trainer drops columns that the "
                    "model's forward does not take: pass it TrainingArguments(..., "
                    "remove_unused_columns=False)"
                )


def _column(extra: str) -> str:
    return RENAMED.get(extra, extra)


def _numbers(column: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"column {column} must hold numbers, got {reprlib.repr(values)}"
        ) from error


def _sum(column: str, values: Any, response: Response) -> Tensor:
    """Of a response, 0-dim: as it is given, or of one number for each token of the completion."""
    numbers = _numbers(column, values)
    if numbers.dim() == 0:
        return numbers
    kept = numbers.double()[response.skipped :][: response.scored]
    if numbers.dim() != 1 or len(kept) < response.scored:
        raise ValueError(
            f"column {column} must hold a sum or one number for each token of the response, got "
            f"{tuple(numbers.shape)} for {response.scored} tokens"
        )
    return kept.sum().float()


def _check_one_each(column: str, values: Any, unit: list[Response]) -> None:
    if not hasattr(values, "__len__") or len(values) != len(unit):
        raise ValueError(
            f"column {column} must hold one value for each of a row's {len(unit)} responses, got "
            f"{reprlib.repr(values)}"
        )


def _lengths(units: list[list[Response]]) -> Tensor:
    counts = [torch.tensor([one.scored for one in unit], **HOST) for unit in units]
    return pad_sequence(counts, batch_first=True)
