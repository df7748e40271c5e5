# SPDX-License-Identifier: Apache-2.0
"""Trainers that put all rows of a batch behind each other, without padding."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
from tests.integrations.other_trainers.page import run_lines
from tests.integrations.other_trainers.stand_ins import (
    IGNORED,
    Batch,
    by_token,
    expect_same_training,
    plain_dpo,
    plain_log_probs,
)


def step(logps: Tensor, reference: Tensor) -> tuple[Tensor, ...]:
    losses, chosen, rejected = plain_dpo(*logps.chunk(2), *reference.chunk(2))
    return losses.mean(), logps, chosen, rejected


def summed(values: Tensor, boundaries: list[int]) -> Tensor:
    """Of each sequence of (1, N)."""
    starts_and_ends = itertools.pairwise(boundaries)
    return torch.stack([values[0, start:end].sum() for start, end in starts_and_ends])


def test_ms_swift_padding_free(model: Any, batch: Batch, reference: Tensor) -> None:
    inputs, labels, boundaries = batch.packed()
    labels = torch.roll(labels, -1, 1)
    logits = model(**inputs, use_cache=False).logits
    want = step(summed(by_token(logits, labels), boundaries.tolist()), reference)
    names = run_lines("ms-swift", 0, model=model, batch=inputs, labels=labels)
    scores = names["per_token_logps"]
    names = run_lines("ms-swift", 1, per_token_logps=scores, cu_seqlens=boundaries)
    expect_same_training(model, step(names["all_logps"], reference), want)
    # And packed is as padded: the model kept its sequences apart.
    padded = step(plain_log_probs(model, batch).sum(-1), reference)
    expect_same_training(model, want, padded)


@pytest.mark.parametrize("average", [False, True], ids=["dpo", "dpo_norm"])
@pytest.mark.parametrize("packing", ["padded", "packed", "packed, padded at the end"])
def test_open_instruct(
    packing: str, average: bool, model: Any, batch: Batch, reference: Tensor
) -> None:
    """The shifted labels of packed rows run over the boundaries, where none is scored."""
    inputs: dict[str, Tensor]
    if packing == "padded":
        inputs, labels = batch.inputs(), batch.labels
        logps = plain_log_probs(model, batch).sum(-1)
        counts = (labels[:, 1:] != IGNORED).sum(-1)
    else:
        inputs, labels, boundaries = batch.packed()
        if packing != "packed":
            pad = torch.nn.functional.pad
            labels = pad(labels, (0, 4), value=IGNORED)
            inputs = {name: pad(value, (0, 4)) for name, value in inputs.items()}
        logits = model(**inputs, use_cache=False).logits
        starts = [0, *(boundaries[1:] - 1).tolist()]
        target = labels[:, 1:]
        logps = summed(by_token(logits[:, :-1], target), starts)
        counts = summed((target != IGNORED).long(), starts)
        inputs["cu_seq_lens_k"] = boundaries.int()
    block = 0 if packing == "padded" else 1
    given = {"inputs": inputs, "labels": labels, "average_log_prob": average}
    got = run_lines("open-instruct", block, model=model, **given)["all_logps"]
    expect_same_training(
        model, step(got, reference), step(logps / counts if average else logps, reference)
    )


def test_the_loss_of_open_instruct(model: Any, batch: Batch, reference: Tensor) -> None:
    class dpo_utils:  # a module there
        dpo_loss = staticmethod(plain_dpo)

    def compute_loss() -> tuple[Tensor, ...]:
        logps = plain_log_probs(model, batch).sum(-1)
        arguments = {"beta": 0.4, "label_smoothing": 0.1}
        triple = dpo_utils.dpo_loss(*logps.chunk(2), *reference.chunk(2), **arguments)
        return triple[0].mean(), *triple

    want = compute_loss()
    run_lines("open-instruct", 2, dpo_utils=dpo_utils)
    assert dpo_utils.dpo_loss is fastpref.objectives.dpo
    expect_same_training(model, compute_loss(), want)
