# SPDX-License-Identifier: Apache-2.0
"""The benchmark's work: masks, leaves, overflowing rows, and the loss."""

from __future__ import annotations

import math

import torch

from fastpref.bench.work import IGNORE, Shape, make_work

SHAPE = Shape(sequences=4, length=16, hidden_size=64, vocab_size=500)


def test_first_half_of_each_row_is_not_scored() -> None:
    work = make_work(SHAPE, torch.float32)
    assert int(work.scored.sum()) == SHAPE.scored == 32
    assert (work.target[:, :8] == IGNORE).all()


def test_the_target_is_a_likely_token() -> None:
    work = make_work(SHAPE, torch.float32)
    logits = work.hidden[work.scored] @ work.weight.t()
    rank = (logits > logits.gather(1, work.target[work.scored][:, None])).sum(1)
    assert rank.float().median() == 0


def test_overflowing_rows_lie_beyond_float_exp() -> None:
    work = make_work(SHAPE, torch.float32, overflowing=0.25)
    rows = work.hidden[work.scored] @ work.weight.t()
    gap = rows.amax(1) - rows.gather(1, work.target[work.scored][:, None])[:, 0]
    assert int((gap > 88).sum()) == 8
    assert int((make_work(SHAPE, torch.float32).hidden != work.hidden).any(-1).sum()) == 16


def test_leaves_are_fresh_and_frozen_as_asked() -> None:
    work = make_work(SHAPE, torch.float32)
    hidden, weight = work.leaves(trainable=False)
    assert hidden.requires_grad and not weight.requires_grad
    assert hidden.is_leaf and not work.hidden.requires_grad
    assert work.leaves(trainable=True)[1].requires_grad


def test_loss_is_dpo_against_a_uniform_reference() -> None:
    work = make_work(SHAPE, torch.float32)
    logp = torch.zeros(work.target.shape)
    assert math.isclose(work.dpo(logp).item(), math.log(2), rel_tol=1e-6)
    logp[0, -1] = 10.0  # one chosen row of two pairs
    expected = (math.log(2) + math.log1p(math.exp(-1.0))) / 2
    assert math.isclose(work.dpo(logp).item(), expected, rel_tol=1e-6)
