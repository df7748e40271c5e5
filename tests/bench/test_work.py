# SPDX-License-Identifier: Apache-2.0
"""The benchmark's work: padded pairs, the softmax of a trained model, overflowing rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastpref.bench.work import IGNORE, TRAINED_ENTROPY, Shape, make_work

SHAPE = Shape(sequences=8, length=48, hidden_size=64, vocab_size=500)


@pytest.mark.parametrize("masked", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_are_prompt_completion_padding(masked: float, seed: int) -> None:
    shape = replace(SHAPE, masked=masked)
    work = make_work(shape, torch.float32, seed=seed)
    assert int(work.scored.sum()) == shape.scored == 8 * (48 - round(masked * 48))
    for row in work.scored:
        at = row.nonzero()[:, 0]
        assert len(at) > 0 and int(at[-1] - at[0]) + 1 == len(at)
    prompts = work.scored.int().argmax(1)
    assert (prompts[:4] == prompts[4:]).all()
    lengths = work.scored.sum(1)
    if masked == 0.5:
        assert len(set(prompts.tolist())) > 1 and (lengths[:4] != lengths[4:]).any()
        assert not work.scored[:, -1].all() and not work.scored[:, 0].any()


@pytest.mark.parametrize("kind, entropy", [("trained", TRAINED_ENTROPY), ("random", 5.7)])
def test_targets_follow_the_softmax(kind: str, entropy: float) -> None:
    shape = Shape(8, 128, 64, 500, masked=0)
    work = make_work(shape, torch.float32, logits=kind)  # type: ignore[arg-type]
    logp = (work.hidden @ work.weight.t()).double().log_softmax(-1)
    found = float(-(logp.exp() * logp).sum(-1).mean())
    loss = float(-logp.gather(-1, work.target[..., None]).mean())
    assert work.entropy == pytest.approx(entropy, abs=0.1)
    assert found == pytest.approx(work.entropy, abs=0.3)
    # Calibrated: the loss on samples is the entropy.
    assert loss == pytest.approx(found, abs=0.25)


def test_the_reference_is_near_but_not_the_same() -> None:
    work = make_work(SHAPE, torch.float64)
    logits, others = work.hidden @ work.weight.t(), work.ref_hidden @ work.ref_weight.t()
    apart = float((logits - others).std() / logits.std())
    assert 0.1 < apart < 0.2


def test_overflowing_rows_lie_beyond_float_exp() -> None:
    for share, expected in ((0.25, SHAPE.scored // 4), (0.01, 2), (1e-6, 1)):
        work = make_work(SHAPE, torch.float32, overflowing=share)
        rows = work.rows(work.hidden) @ work.weight.t()
        gap = rows.amax(1) - rows.gather(1, work.target[work.scored][:, None])[:, 0]
        assert int((gap > 88).sum()) == expected
        others = make_work(SHAPE, torch.float32)
        assert int((others.hidden != work.hidden).any(-1).sum()) == expected


def test_scored_rows() -> None:
    work = make_work(SHAPE, torch.float32)
    assert torch.equal(work.rows(work.hidden), work.hidden[work.scored])
    assert torch.equal(work.target.flatten()[work.positions], work.target[work.scored])


def test_leaves_are_fresh_and_frozen_as_asked() -> None:
    work = make_work(SHAPE, torch.float32)
    for asked in ((True, False), (True, True), (False, False)):
        leaves = work.leaves(*asked)
        assert tuple(one.requires_grad for one in leaves) == asked
        assert all(one.is_leaf for one in leaves)
    assert not work.hidden.requires_grad and not work.weight.requires_grad


def test_the_same_seed_is_the_same_work() -> None:
    first, again, other = (make_work(SHAPE, torch.bfloat16, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.target, again.target) and torch.equal(first.hidden, again.hidden)
    assert not torch.equal(first.target, other.target)
    assert first.hidden.dtype == first.ref_weight.dtype == torch.bfloat16
    assert (first.target[~first.scored] == IGNORE).all()
    assert math.isfinite(first.entropy)
