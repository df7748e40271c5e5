# SPDX-License-Identifier: Apache-2.0
"""Token ids of examples, and batches of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .data import Example

TokenIds: TypeAlias = tuple[list[int], list[int]]  # of a prompt and of a completion


class Encoded(NamedTuple):
    """The token ids of an example."""

    prompt: list[int]
    completions: list[list[int]]  # K of them, in the order of the example


def encode(tokenizer: Any, examples: Sequence[Example]) -> list[Encoded]:
    """The token ids of every example.

    Split as TRL splits a pair: the completions start where the tokens of prompt and completion
    together depart, in any of them, from those of the prompt alone, and end with the
    end-of-sequence token.
    """
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    texts = [
        example.prompt + completion + tokenizer.eos_token
        for example in examples
        for completion in example.completions
    ]
    sequences = iter(tokenizer(texts)["input_ids"])
    encoded = []
    for example, prompt in zip(examples, prompts, strict=True):
        own = [next(sequences) for _ in example.completions]
        at = 0
        while at < len(prompt) and all(ids[at] == prompt[at] for ids in own):
            at += 1
        encoded.append(Encoded(prompt[:at], [ids[at:] for ids in own]))
    return encoded


def sequence_lengths(tokenizer: Any, examples: Sequence[Example]) -> list[int]:
    """Tokens of each example's longest sequence, prompt and completion."""
    return [len(ids.prompt) + max(map(len, ids.completions)) for ids in encode(tokenizer, examples)]


def pad(
    sequences: Sequence[TokenIds], filler: int, where: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels (-100 on prompts and padding), each ``(B, T)``."""
    longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
    ids = torch.full((len(sequences), longest), filler, dtype=torch.int64, device="cpu")
    attended = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(sequences):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion, dtype=torch.int64, device="cpu")
        attended[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(completion, dtype=torch.int64, device="cpu")
    return ids.to(where), attended.to(where), labels.to(where)
