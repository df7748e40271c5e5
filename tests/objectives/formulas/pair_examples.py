# SPDX-License-Identifier: Apache-2.0
"""Keyword arguments of the pairwise formulas, for 12 pairs. Extras do not depend on the
log-probabilities."""

import numpy as np

_PAIRS = 12
_RANDOM = np.random.default_rng(20240531)


def _lengths():
    return {
        "chosen_lengths": _RANDOM.integers(4, 40, _PAIRS),
        "rejected_lengths": _RANDOM.integers(4, 40, _PAIRS),
    }


def _uniform(low, high):
    return _RANDOM.uniform(low, high, _PAIRS)


_LENGTHS = _lengths()
_CHOSEN_LENGTHS = {"chosen_lengths": _LENGTHS["chosen_lengths"]}
_NLL = {"chosen_nll": _uniform(0.5, 4.0)}
_MARGIN = {"reward_margin": _RANDOM.normal(size=_PAIRS) * 3}  # Beyond tau on either side.
_POSITIVE_MARGIN = {"reward_margin": _uniform(0.05, 6.0)}
_ENTROPY = {"ref_entropy": _uniform(0.05, 0.95)}
_KEEP = np.arange(_PAIRS) % 3 != 1
_PROBS = np.concatenate([[0.0, 1.0, 0.5], _uniform(0.0, 1.0)[3:]])
_EMBEDDINGS = _RANDOM.normal(size=(_PAIRS, 5))
_EMBEDDINGS[3] = 2 * _EMBEDDINGS[0]  # The same direction.
_WINS = {"chosen_win_probs": _uniform(0.4, 1.0), "rejected_win_probs": _uniform(0.0, 0.6)}
_Q_VALUES = {"chosen_q_values": _uniform(0.0, 3.0), "rejected_q_values": _uniform(0.0, 5.0)}
_KLS = {"chosen_kl": _uniform(0.0, 8.0), "rejected_kl": _uniform(0.0, 8.0)}
_OTHER = {"other_chosen_logps": _uniform(-60, -5), "other_rejected_logps": _uniform(-60, -5)}
_MOMENTS = {"running_mean": np.array(0.3), "running_std": np.array(0.7)}
# Steps up, down and not at all, whatever the margin of the policy is.
_STEPS = {
    "margin_plus": np.tile([1e3, -1e3, 1e3, -1e3], 3),
    "margin_minus": np.tile([-1e3, 1e3, 1e3, -1e3], 3),
}

EXAMPLES: dict[str, list[dict]] = {
    "dpo": [{}, {"beta": 0.5, "label_smoothing": 0.2}],
    "robust_dpo": [{}, {"label_smoothing": 0.0}, {"beta": 0.5, "label_smoothing": 0.45}],
    "ipo": [{**_LENGTHS}, {"normalize": "sum"}, {**_LENGTHS, "beta": 1.0, "normalize": "mean"}],
    "hinge": [{}, {"beta": 0.5}],
    "exo_pair": [{}, {"beta": 0.5, "label_smoothing": 0.3}],
    "nca_pair": [{}, {"beta": 0.5}],
    "bco_pair": [{}, {"delta": np.array(0.8)}, {"delta": np.array(-1.5), "beta": 0.5}],
    "sppo": [{**_WINS}, {**_WINS, "beta": 0.1}],
    "sppo_hard": [{}, {"beta": 0.1}],
    "aot": [{}, {"beta": 0.5, "label_smoothing": 0.2}],
    "aot_unpaired": [{}, {"beta": 0.5, "label_smoothing": 0.2}],
    "apo_zero": [{}, {"beta": 0.5}],
    "apo_down": [{}, {"beta": 0.5}],
    "discopop": [{}, {"beta": 0.1, "tau": 1.0}],
    "sigmoid_norm": [{**_LENGTHS}, {**_LENGTHS, "beta": 1.0}],
    "f_dpo": [
        {},
        {"divergence": "forward_kl", "beta": 1e-5},
        {"divergence": "js"},
        {"divergence": "alpha", "alpha": 0.3, "beta": 0.01},
    ],
    "chi_po": [{}, {"max_reward": 1.0}, {"beta": 0.01, "max_reward": 0.2}],
    "madpo": [
        {**_MARGIN},
        {**_MARGIN, "c_min": 0.2, "c_max": 4.0, "slope": 0.5, "tau": 1.0},
        {**_MARGIN, "c_min": 1.0},
        {**_MARGIN, "c_max": 1.0, "beta": 0.5},
    ],
    "da_dpo": [{**_MARGIN}, {**_MARGIN, "beta": 0.05, "alpha": 0.3}],
    "flex_dpo": [
        {},
        {**_NLL, "sft_weight": 0.5},
        {**_NLL, "beta_chosen": 0.05, "beta_rejected": 0.2, "sft_weight": 0.0},
    ],
    "soft_label_dpo": [{"preference_probs": _PROBS}, {"preference_probs": _PROBS, "beta": 0.5}],
    "odpo": [{**_POSITIVE_MARGIN}, {**_POSITIVE_MARGIN, "beta": 0.5, "alpha": 0.3}],
    "rpo_reward": [
        {**_MARGIN},
        {**_MARGIN, "distance": "forward_kl", "eta": 0.5},
        {**_MARGIN, "distance": "square", "beta": 0.5},
    ],
    "r_dpo": [{**_LENGTHS}, {**_LENGTHS, "beta": 0.5, "alpha": 0.05}],
    "dpop": [{}, {"beta": 0.05, "penalty": 0.5}],
    "cal_dpo": [{}, {"beta": 0.1, "calibration_weight": 0.5}],
    "dr_dpo": [{}, {"beta": 0.5, "tau": 0.3}, {"tau": 10.0}],
    "beta_dpo": [
        {"running_mean": np.array(0.4)},
        {"running_mean": np.array(-1.0), "keep": _KEEP, "alpha": 0.2},
        {"running_mean": np.array(500.0), "beta": 0.5, "beta_min": 0.01},  # At the floor.
    ],
    "alpha_dpo": [
        {**_MOMENTS, **_LENGTHS},
        {**_MOMENTS, **_LENGTHS, "beta": 10.0, "gamma": 3.0, "alpha": 0.2},
    ],
    "epsilon_dpo": [{**_STEPS}, {**_STEPS, "beta": 0.5, "epsilon": 0.2}],
    "relative_po": [
        {"prompt_embeddings": _EMBEDDINGS},
        {"prompt_embeddings": _EMBEDDINGS, "beta": 0.5, "tau": 0.1},
    ],
    "gpo": [
        {},
        {"function": "hinge"},
        {"function": "square", "beta": 0.5},
        {"function": "exponential"},
        {"function": "truncated_square"},
        {"function": "savage", "beta": 0.5},
    ],
    "focal_po": [{}, {"beta": 0.5, "gamma": 2.0}],
    "mallows_po": [
        {**_ENTROPY},
        {**_ENTROPY, "loss": "ipo"},
        {**_ENTROPY, "beta": 0.5, "phi": 1.0, "loss": "ipo"},
    ],
    "rainbow_po": [
        {**_LENGTHS},
        {**_LENGTHS, **_ENTROPY, "phi": 1.0},
        {**_LENGTHS, "function": "cauchy", "alpha": 0.0},
        {**_LENGTHS, **_ENTROPY, "function": "cauchy", "beta": 2.0, "alpha": 1.0, "gamma": 0.5},
    ],
    "dpo_shift": [{"shift": 0.75}, {"shift": 1.0, "beta": 0.5}, {"shift": 0.1}],
    "mcts_dpo": [{**_Q_VALUES}, {**_Q_VALUES, "loss": "ipo"}, {**_Q_VALUES, "beta": 0.5}],
    "tdpo": [{**_KLS}, {**_KLS, "version": 1}, {**_KLS, "beta": 0.5, "alpha": 1.5}],
    "ofs_dpo": [{**_OTHER}, {**_OTHER, "role": "slow"}, {**_OTHER, "beta": 0.5, "alpha": 0.4}],
    "simpo": [{**_LENGTHS}, {**_LENGTHS, "beta": 10.0, "gamma": 3.0, "label_smoothing": 0.2}],
    "alpha_po": [
        {**_LENGTHS},
        {**_LENGTHS, "alpha": 0.0, "gamma": 1.0},
        {**_LENGTHS, "alpha": -0.5, "beta": 10.0},
        {**_LENGTHS, "alpha": 1e-9},
    ],
    "cpo": [
        {**_CHOSEN_LENGTHS},
        {**_NLL, "label_smoothing": 0.2, "sft_weight": 0.3},
        {"sft_weight": 0.0, "beta": 0.5},
        {**_CHOSEN_LENGTHS, **_NLL},
    ],
    "orpo": [{**_LENGTHS}, {**_LENGTHS, **_NLL, "beta": 0.5, "sft_weight": 0.3}],
    "asft": [{**_LENGTHS}, {**_LENGTHS, **_NLL, "beta": 0.5, "sft_weight": 0.3}],
    "simper": [{**_LENGTHS}, _lengths()],
    "slic": [{**_CHOSEN_LENGTHS}, {**_NLL, "delta": 5.0, "sft_weight": 1.0}, {"sft_weight": 0.0}],
    "amapo": [{**_LENGTHS}, {**_LENGTHS, "beta": 1.0, "label_smoothing": 0.2}],
    "sft": [{**_CHOSEN_LENGTHS}, {**_NLL}],
}
