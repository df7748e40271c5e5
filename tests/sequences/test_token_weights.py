# SPDX-License-Identifier: Apache-2.0
"""Makers of token weights: reference formulas, hand examples, identities, TRL, errors."""

import numpy as np
import pytest
import torch

from fastpref import objectives, sequences
from fastpref.sequences import (
    decay_weights,
    divergence_mask,
    length_desensitized_weights,
    sampled_weights,
    sequence_logp,
    step_weights,
    token_credit,
    turn_mask,
)
from tests.objectives import trl_dpo
from tests.objectives.formulas import weights as reference

B, T = 64, 12
LENGTHS = torch.arange(B) % (T + 1)
PARTNERS = torch.arange(B) // 5
MASK = (torch.arange(T) >= 1) & (torch.arange(T) < 1 + LENGTHS[:, None])
SCORED = MASK.sum(-1)
# A prompt of one token, a response of five with an unscored token inside, padding.
ROW = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0]])


@pytest.mark.parametrize("name", reference.FORMULAS)
def test_against_numpy(name):
    for example in reference.EXAMPLES[name]:
        arguments = {
            key: torch.tensor(value) if isinstance(value, np.ndarray) else value
            for key, value in example.items()
        }
        weights = getattr(sequences, name)(**arguments)
        assert weights.dtype == torch.float32
        expected = reference.FORMULAS[name](**example)
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_by_hand():
    two = torch.tensor([2])
    expected = torch.tensor([[0, 1, 1, 0, 0.25, 0.25, 0.25, 0]])
    assert torch.equal(length_desensitized_weights(ROW, two, alpha=0.25), expected)
    expected = torch.tensor([[0, 1, 0.5, 0, 0.25, 0.125, 0.0625, 0]])
    assert torch.equal(decay_weights(ROW, gamma=0.5), expected)
    tokens = torch.tensor([[9, 1, 2, 3, 4, 5, 6, 0]])
    partner = torch.tensor([[9, 1, 2, 7, 4, 5, 0, 0]])
    assert torch.equal(
        divergence_mask(tokens, partner, ROW), torch.tensor([[0.0] * 4 + [1] * 3 + [0]])
    )
    steps = torch.tensor([[0, 0, 0, 0, -1, 2, 2, 2]])
    expected = torch.tensor([[0, 3, 3, 0, 0, 1, 1, 0]]) / 8
    assert torch.equal(step_weights(steps, torch.tensor([[3.0, 7.0, 1.0]]), ROW), expected)
    turns = torch.tensor([[0, 1, 1, 1, 2, 2, 3, 3]])
    expected = torch.tensor([[0, 1.0, 1, 0, 0, 0, 1, 0]])
    assert torch.equal(turn_mask(turns, torch.tensor([3, 1]), ROW), expected)


def test_plain_dpo_is_all_ones():
    ones = MASK.float()
    assert torch.equal(length_desensitized_weights(MASK, PARTNERS, alpha=1), ones)
    assert torch.equal(length_desensitized_weights(MASK, LENGTHS, alpha=0.0), ones)
    assert torch.equal(decay_weights(MASK, gamma=1), ones)
    assert torch.equal(sampled_weights(MASK, SCORED, generator=None), ones)
    whole = torch.zeros(B, T).long()
    assert torch.equal(divergence_mask(whole, whole + 1, MASK), ones)
    assert torch.equal(turn_mask(whole, torch.tensor([0]), MASK), ones)


def test_without_the_tail_the_weights_are_a_cut():
    cut = length_desensitized_weights(MASK, PARTNERS, alpha=0.0)
    assert torch.equal(cut.sum(-1).long(), torch.minimum(SCORED, PARTNERS))
    assert torch.equal(cut.cumsum(-1) * MASK <= PARTNERS[:, None], torch.ones(B, T).bool())


def test_length_desensitized_dpo_agrees_with_trl():
    generator = torch.Generator().manual_seed(0)
    logps = -40 * torch.rand(4, 8, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 9, (2, 8), generator=generator)
    expected, _ = trl_dpo.loss_and_slopes(
        logps, lengths, loss_type="sigmoid", beta=0.2, ld_alpha=0.3
    )
    sums = []
    for total, own, partner in zip(logps[:2], lengths, lengths.flip(0), strict=True):
        mask = torch.arange(8) < own[:, None]
        weights = length_desensitized_weights(mask, partner, alpha=0.3)
        tokens = (total / own)[:, None].expand(8, 8)
        sums.append(sequence_logp(tokens, mask=mask, token_weights=weights))
    losses = objectives.dpo(*sums, *logps[2:], beta=0.2).losses
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-7, atol=1e-7)


def test_sampling_draws_as_many_as_the_partner_has():
    weights = sampled_weights(MASK, PARTNERS, generator=torch.Generator().manual_seed(3))
    assert weights.dtype == torch.float32 and set(weights.unique().tolist()) == {0.0, 1.0}
    assert (weights[~MASK] == 0).all()
    assert torch.equal(weights.sum(-1).long(), torch.minimum(SCORED, PARTNERS))
    again = sampled_weights(MASK, PARTNERS, generator=torch.Generator().manual_seed(3))
    other = sampled_weights(MASK, PARTNERS, generator=torch.Generator().manual_seed(4))
    assert torch.equal(weights, again) and not torch.equal(weights, other)


def test_sampling_is_fair():
    rows = 20_000
    mask = torch.arange(8).expand(rows, 8) % 4 != 0  # six of eight
    weights = sampled_weights(
        mask, torch.full((rows,), 2), generator=torch.Generator().manual_seed(0)
    )
    shares = weights.mean(0)[mask[0]]
    torch.testing.assert_close(shares, torch.full((6,), 1 / 3), rtol=0, atol=0.02)
    pairs = (weights[:, 1] * weights[:, 2]).mean()
    torch.testing.assert_close(pairs, torch.tensor(1 / 15), rtol=0, atol=0.01)


def test_step_weights_make_a_mean_of_means():
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-1, 4, (B, T), generator=generator)
    values = 2 * torch.rand(B, 4, generator=generator)
    logp = -torch.rand(B, T, generator=generator)
    sums = sequence_logp(logp, mask=MASK, token_weights=step_weights(steps, values, MASK))
    for row in range(B):
        means, total = 0.0, 0.0
        for step in range(4):
            own = logp[row][MASK[row] & (steps[row] == step)]
            if own.numel():
                means, total = means + values[row, step] * own.mean(), total + values[row, step]
        torch.testing.assert_close(sums[row], torch.as_tensor(means / total if total else 0.0))


def test_steps_without_value_have_no_weight():
    steps = torch.zeros(1, 8).long()
    for values in (torch.zeros(1, 2), torch.tensor([[0.0, 5.0]])):
        assert (step_weights(steps, values, ROW) == 0).all()
    values = torch.ones(1, 2, requires_grad=True)
    assert not step_weights(steps, values, ROW).requires_grad


def test_responses_that_nowhere_differ():
    tokens = torch.randint(0, 9, (B, T))
    assert (divergence_mask(tokens, tokens, MASK) == 0).all()
    assert (divergence_mask(tokens, tokens + 1, torch.zeros(B, T).int()) == 0).all()


def test_credits_sum_to_the_reward():
    logp, ref = (-torch.rand(2, B, T, dtype=torch.float64)).requires_grad_().unbind()
    credit = token_credit(logp, ref, beta=0.3)
    assert credit.dtype == torch.float32 and not credit.requires_grad
    sums = [sequence_logp(one, mask=MASK) for one in (logp, ref)]
    rewards = objectives.dpo(sums[0], sums[0], sums[1], sums[1], beta=0.3).chosen_rewards
    torch.testing.assert_close(sequence_logp(credit, mask=MASK), rewards.float())
    half = token_credit(logp.bfloat16(), ref.bfloat16(), beta=0.3)
    torch.testing.assert_close(half, credit, rtol=0, atol=2e-3)


PLACES = torch.arange(T).expand(B, T)
MAKERS = {
    "length_desensitized_weights": lambda mask, lengths, ids: length_desensitized_weights(
        mask, lengths, alpha=0.5
    ),
    "sampled_weights": lambda mask, lengths, ids: sampled_weights(mask, lengths, generator=None),
    "decay_weights": lambda mask, lengths, ids: decay_weights(mask, gamma=0.9),
    "divergence_mask": lambda mask, lengths, ids: divergence_mask(ids, ids.clamp(max=5), mask),
    "step_weights": lambda mask, lengths, ids: step_weights(ids, ids + 0.5, mask),
    "turn_mask": lambda mask, lengths, ids: turn_mask(ids, lengths[22:28], mask),
}


def make(maker, mask):
    torch.manual_seed(0)
    return MAKERS[maker](mask, PARTNERS.to(mask.device), PLACES.to(mask.device))


@pytest.mark.parametrize("maker", MAKERS)
def test_masks_of_any_kind(maker):
    expected = make(maker, MASK)
    assert expected.any() and not make(maker, torch.zeros(B, T).bool()).any()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for mask in (MASK.int(), 3 * MASK.to(torch.uint8)):
            weights = make(maker, mask)
            assert weights.dtype == torch.float32 and weights.shape == mask.shape
            assert (weights[~MASK] == 0).all()
            if maker != "sampled_weights":  # other numbers are drawn in fp64
                assert torch.equal(weights, expected)
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("maker", MAKERS)
def test_nothing_is_read_back(maker):
    """Tensors without values have none to read."""
    assert make(maker, MASK.to("meta")).shape == (B, T)


CASES = {
    "mask is a list": (
        TypeError,
        "mask must be a tensor, got list",
        lambda: decay_weights([[1]], gamma=0.5),
    ),
    "mask is float": (
        TypeError,
        "mask must be bool or integer, got torch.float32",
        lambda: decay_weights(MASK.float(), gamma=0.5),
    ),
    "mask is packed": (
        ValueError,
        r"mask must be \(B, T\), got \(12,\)",
        lambda: decay_weights(MASK[0], gamma=0.5),
    ),
    "gamma of zero": (
        ValueError,
        r"gamma must be in \(0, 1\], got 0",
        lambda: decay_weights(MASK, gamma=0),
    ),
    "gamma is a tensor": (
        TypeError,
        "gamma must be a number, got Tensor",
        lambda: decay_weights(MASK, gamma=torch.tensor(0.5)),
    ),
    "alpha above one": (
        ValueError,
        r"alpha must be in \[0, 1\], got 1.5",
        lambda: length_desensitized_weights(MASK, PARTNERS, alpha=1.5),
    ),
    "lengths of pairs": (
        ValueError,
        r"partner_lengths must be one value a response, \(64,\), got \(32,\)",
        lambda: length_desensitized_weights(MASK, PARTNERS[:32], alpha=0.5),
    ),
    "lengths are float": (
        TypeError,
        "partner_lengths must be integers, got torch.float32",
        lambda: sampled_weights(MASK, PARTNERS.float(), generator=None),
    ),
    "a seed for a generator": (
        TypeError,
        "generator must be a torch.Generator or None, got int",
        lambda: sampled_weights(MASK, PARTNERS, generator=3),
    ),
    "generator elsewhere": (
        ValueError,
        "generator must be on the device of mask, meta, got cpu",
        lambda: sampled_weights(MASK.to("meta"), PARTNERS.to("meta"), generator=torch.Generator()),
    ),
    "tokens of one response": (
        ValueError,
        r"partner_tokens must be shaped like mask, \(64, 12\), got \(64, 11\)",
        lambda: divergence_mask(PLACES, PLACES[:, 1:], MASK),
    ),
    "step without a value": (
        ValueError,
        "step_ids must be below S = 11 of step_values, got 11",
        lambda: step_weights(PLACES, torch.ones(B, 11), MASK),
    ),
    "negative value": (
        ValueError,
        "step_values must be >= 0, got -1",
        lambda: step_weights(PLACES, -torch.ones(B, T), MASK),
    ),
    "values of one response": (
        ValueError,
        r"step_values must be \(B, S\) with B = 64, got \(12,\)",
        lambda: step_weights(PLACES, torch.ones(T), MASK),
    ),
    "turns as marks": (
        TypeError,
        "trained_turns must be integers, got torch.bool",
        lambda: turn_mask(PLACES, torch.ones(3).bool(), MASK),
    ),
    "turns of each response": (
        ValueError,
        r"trained_turns must be \(K,\), got \(64, 12\)",
        lambda: turn_mask(PLACES, PLACES, MASK),
    ),
    "credit of sums": (
        ValueError,
        r"ref_logp must be shaped like logp, \(64, 12\), got \(64,\)",
        lambda: token_credit(torch.zeros(B, T), torch.zeros(B), beta=0.1),
    ),
    "credit of ids": (
        TypeError,
        "logp must be floating point, got torch.int64",
        lambda: token_credit(PLACES, torch.zeros(B, T), beta=0.1),
    ),
    "beta of zero": (
        ValueError,
        r"beta must be in \(0, inf\), got 0",
        lambda: token_credit(torch.zeros(B, T), torch.zeros(B, T), beta=0),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_name_the_argument(case):
    error, message, call = CASES[case]
    with pytest.raises(error, match=message):
        call()
