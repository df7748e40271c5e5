# SPDX-License-Identifier: Apache-2.0
"""Token ids of prompts and responses to what the forward of a model with a fused head takes."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE = -100
HOST: dict[str, Any] = {"device": "cpu", "dtype": torch.long}


class Response(NamedTuple):
    """One row of a batch."""

    tokens: Tensor  # (T,) int64, of prompt and completion
    first: int  # the first token that is scored
    skipped: int  # tokens of the completion before that one

    @property
    def scored(self) -> int:
        return len(self.tokens) - self.first


def response_of(prompt: Any, completion: Any, max_length: int | None) -> Response:
    """Prompt and completion behind one another, cut off at ``max_length``.

    Raises:
        ValueError, TypeError: where these are no token ids, or none is left to score.
    """
    prompt, completion = _ids("prompt", prompt), _ids("response", completion)
    first = max(len(prompt), 1)  # nothing predicts the first token of a row
    tokens = torch.cat([prompt, completion])[:max_length]
    if len(tokens) <= first:
        raise ValueError(
            f"every response must have a token to score, got a prompt of {len(prompt)} and a "
            f"response of {len(completion)} tokens with max_length={max_length}; leave such rows "
            "out with dataset.filter, or raise max_length"
        )
    return Response(tokens, first, first - len(prompt))


def model_inputs(rows: Sequence[Response], pad_token_id: int, padding_side: str) -> dict[str, Any]:
    """``input_ids``, ``attention_mask`` and ``fused_labels``, (R, T), and ``fused_lm_head``."""
    shape = len(rows), max(len(row.tokens) for row in rows)
    input_ids = torch.full(shape, pad_token_id, **HOST)
    attention_mask = torch.zeros(shape, **HOST)
    targets = torch.full(shape, IGNORE, **HOST)
    for i, (tokens, first, _) in enumerate(rows):
        start = 0 if padding_side == "right" else shape[1] - len(tokens)
        end = start + len(tokens)
        input_ids[i, start:end] = tokens
        attention_mask[i, start:end] = 1
        targets[i, start + first : end] = tokens[first:]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "fused_labels": targets,
        "fused_lm_head": True,
    }


def _ids(which: str, values: Any) -> Tensor:
    try:
        ids = torch.as_tensor(values, device="cpu", dtype=None)  # as it comes, to be checked
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"a {which} must be token ids, got {reprlib.repr(values)}") from error
    if ids.dim() != 1 or (len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise TypeError(
            f"a {which} must be a sequence of token ids, got {tuple(ids.shape)} of {ids.dtype}; "
            "tokenize the data set first"
        )
    return ids.long()
