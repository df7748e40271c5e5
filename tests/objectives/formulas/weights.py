# SPDX-License-Identifier: Apache-2.0
"""Token weights, in numpy: each shaped like `mask` (B, T), 0 where nothing is scored."""

import numpy as np


def scored_index(mask):
    """0, 1, 2, ... over the scored tokens of each row."""
    # Choice: a token's place is counted in scored tokens, not in columns, so that a prompt or
    # padding before it does not matter.
    return np.cumsum(mask, axis=1) - 1


def length_desensitized_weights(mask, partner_lengths, *, alpha):
    """LD-DPO, 2409.06411: 1 up to the length of the shorter of the two, then alpha."""
    inside = scored_index(mask) < partner_lengths[:, None]
    return np.where(mask, np.where(inside, 1.0, alpha), 0.0)


# sampled_weights(mask, partner_lengths, *, generator), SamPO, 2406.10957, is random, so it has
# properties and no formula here:
#   every weight is 0 or 1, and 0 where mask is False;
#   a row of n scored tokens has exactly min(n, partner_length) ones;
#   every scored token of a row is kept with the same probability, min(1, partner_length / n);
#   the same state of the generator gives the same weights.


def decay_weights(mask, *, gamma):
    """D2PO, 2502.14340: gamma^t, t = 0 at the first scored token."""
    return np.where(mask, gamma ** np.maximum(scored_index(mask), 0.0), 0.0)


def divergence_mask(tokens, partner_tokens, mask):
    """MCTS-DPO, 2405.00451: 1 from the first token that differs from the partner's."""
    # Choice: the same column is compared with the same column, masked ones too (the authors' code
    # compares whole rows); tokens are those predicted, so nothing is shifted. Rows that nowhere
    # differ have no weight at all (the authors' code skips the pair).
    apart = np.cumsum(tokens != partner_tokens, axis=1) > 0
    return np.where(mask & apart, 1.0, 0.0)


def step_weights(step_ids, step_values, mask):
    """TPO, 2410.12854: w_k / (n_k sum w), so that sum a_t lp_t = sum_k w_k mean_k(lp) / sum w."""
    # Choice: step_values (B, S) are the w (cosine + 1 in the paper) and step_ids (B, T) index them;
    # a negative id is in no step. n_k counts scored tokens, and the sum is over the steps that have
    # any. A row whose w sum to 0 has no weight.
    weights = np.zeros(mask.shape)
    for row in range(len(mask)):
        scored = mask[row] & (step_ids[row] >= 0)
        steps, counts = np.unique(step_ids[row][scored], return_counts=True)
        total = step_values[row, steps].sum()
        for step, count in zip(steps, counts, strict=True):
            here = scored & (step_ids[row] == step)
            weights[row, here] = step_values[row, step] / (count * total) if total else 0.0
    return weights


def turn_mask(turn_ids, trained_turns, mask):
    """M-DPO, 2409.02392: 1 in the turns that are trained, 0 in the others."""
    # Choice: trained_turns is a collection of turn numbers, the same for every row.
    return np.where(mask & np.isin(turn_ids, trained_turns), 1.0, 0.0)


def token_credit(logp, ref_logp, *, beta):
    """2404.12358: beta (log p_t - log ref_t)."""
    return beta * (logp - ref_logp)


FORMULAS = {
    "length_desensitized_weights": length_desensitized_weights,
    "decay_weights": decay_weights,
    "divergence_mask": divergence_mask,
    "step_weights": step_weights,
    "turn_mask": turn_mask,
    "token_credit": token_credit,
}

_B, _T, _S = 12, 9, 4
_draw = np.random.default_rng(23)
_prompt = _draw.integers(0, 3, (_B, 1))
_lengths = _draw.integers(1, _T + 1, _B)
_lengths[3] = 0
_columns = np.arange(_T)
_mask = (_columns >= _prompt) & (_columns < _prompt + _lengths[:, None])
_holes = _mask & (_draw.uniform(size=(_B, _T)) < 0.8)
_partner_lengths = _draw.integers(0, _T + 1, _B)
_tokens = _draw.integers(0, 50, (_B, _T))
_same = _columns < _prompt + _draw.integers(0, 4, (_B, 1))  # Prompts are the same.
_same[5] = True
_partner_tokens = np.where(_same, _tokens, _draw.integers(50, 99, (_B, _T)))
_step_ids = np.sort(_draw.integers(0, _S, (_B, _T)), axis=1)
_turn_ids = np.sort(_draw.integers(0, 5, (_B, _T)), axis=1)
_step_values = 1.0 + _draw.uniform(-1.0, 1.0, (_B, _S))
_logp, _ref_logp = -_draw.uniform(0.0, 4.0, (2, _B, _T))

EXAMPLES = {
    "length_desensitized_weights": [
        {"mask": _mask, "partner_lengths": _partner_lengths, "alpha": 0.5},
        {"mask": _holes, "partner_lengths": _partner_lengths, "alpha": 0.0},
        {"mask": _holes, "partner_lengths": _partner_lengths, "alpha": 1.0},
    ],
    "decay_weights": [{"mask": _mask, "gamma": 0.9}, {"mask": _holes, "gamma": 1.0}],
    "divergence_mask": [
        {"tokens": _tokens, "partner_tokens": _partner_tokens, "mask": _mask},
        {"tokens": _partner_tokens, "partner_tokens": _tokens, "mask": _holes},
    ],
    "step_weights": [
        {"step_ids": _step_ids, "step_values": _step_values, "mask": _mask},
        {"step_ids": _step_ids, "step_values": _step_values, "mask": _holes},
    ],
    "turn_mask": [
        {"turn_ids": _turn_ids, "trained_turns": np.array([1, 3]), "mask": _mask},
        {"turn_ids": _turn_ids, "trained_turns": np.array([0]), "mask": _holes},
    ],
    "token_credit": [
        {"logp": _logp, "ref_logp": _ref_logp, "beta": 0.1},
        {"logp": _logp, "ref_logp": _logp, "beta": 1.0},
    ],
}
