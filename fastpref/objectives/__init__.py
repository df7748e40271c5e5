# SPDX-License-Identifier: Apache-2.0
"""Preference objectives: pure functions from log-probabilities to losses.

    losses, chosen_rewards, rejected_rewards = dpo(policy_chosen_logps, policy_rejected_logps,
                                                   ref_chosen_logps, ref_rejected_logps, beta=0.1)

``losses.mean()`` is the published loss; rewards are detached. Losses and gradients are finite for
log-probabilities from -1e4 to 0. ``get("dpo", beta=0.1)`` is the same as a frozen value that an
engine can run; ``Objective(function, unit=..., scope=...)`` makes one of your own function.

A hyperparameter that is a number may be a tensor of one value a unit: (P,), (B,), or of lists (G,).
For ``beta`` 0 is then allowed: no weight. Values are checked on CPU tensors only, and get
gradients. What a batch sorts by or shares takes numbers only; the docstrings say so.
"""

# In the order of the catalogue.
from .direct import (
    discopop,
    dpo,
    exo_pair,
    focal_po,
    gpo,
    hinge,
    ipo,
    r_dpo,
    rainbow_po,
    robust_dpo,
    sigmoid_norm,
)

# isort: split
from .reshaped import (
    apo_down,
    apo_zero,
    cal_dpo,
    chi_po,
    dpo_shift,
    dpop,
    f_dpo,
    flex_dpo,
    nca_pair,
    sppo_hard,
    tdpo,
)

# isort: split
from .informed import (
    da_dpo,
    madpo,
    mallows_po,
    mcts_dpo,
    odpo,
    rpo_reward,
    soft_label_dpo,
    sppo,
)

# isort: split
from .coupled import (
    alpha_dpo,
    aot,
    aot_unpaired,
    bco_pair,
    beta_dpo,
    dr_dpo,
    epsilon_dpo,
    epsilon_dpo_beta,
    ofs_dpo,
    relative_po,
)

# isort: split
from .reference_free import alpha_po, amapo, asft, cpo, orpo, sft, simper, simpo, slic

# isort: split
from .unpaired import apo_zero_unpaired, bco, ddo, kto, npo, simnpo

# isort: split
from .listwise import adpo, exo_listwise, info_nca, irpo, nca, plackett_luce, softmax_dpo

# isort: split
from .ranking import lipo, pro, rank_dpo, rrhf, tpo

# isort: split
from .policy import bnpo, cispo, dapo, dr_grpo, gmpo, grpo, gspo, luspo, sapo, vespo

# isort: split
from .disco import disco, group_advantages

# isort: split
from .modifiers import combine, wpo
from .moments import RunningMoments
from .registry import Objective, as_objective, get, names
from .results import ListLosses, PairLosses, TokenLosses, UnitLosses

__all__ = [
    "ListLosses",
    "Objective",
    "PairLosses",
    "RunningMoments",
    "TokenLosses",
    "UnitLosses",
    "adpo",
    "alpha_dpo",
    "alpha_po",
    "amapo",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "as_objective",
    "asft",
    "bco",
    "bco_pair",
    "beta_dpo",
    "bnpo",
    "cal_dpo",
    "chi_po",
    "cispo",
    "combine",
    "cpo",
    "da_dpo",
    "dapo",
    "ddo",
    "disco",
    "discopop",
    "dpo",
    "dpo_shift",
    "dpop",
    "dr_dpo",
    "dr_grpo",
    "epsilon_dpo",
    "epsilon_dpo_beta",
    "exo_listwise",
    "exo_pair",
    "f_dpo",
    "flex_dpo",
    "focal_po",
    "get",
    "gmpo",
    "gpo",
    "group_advantages",
    "grpo",
    "gspo",
    "hinge",
    "info_nca",
    "ipo",
    "irpo",
    "kto",
    "lipo",
    "luspo",
    "madpo",
    "mallows_po",
    "mcts_dpo",
    "names",
    "nca",
    "nca_pair",
    "npo",
    "odpo",
    "ofs_dpo",
    "orpo",
    "plackett_luce",
    "pro",
    "r_dpo",
    "rainbow_po",
    "rank_dpo",
    "relative_po",
    "robust_dpo",
    "rpo_reward",
    "rrhf",
    "sapo",
    "sft",
    "sigmoid_norm",
    "simnpo",
    "simper",
    "simpo",
    "slic",
    "soft_label_dpo",
    "softmax_dpo",
    "sppo",
    "sppo_hard",
    "tdpo",
    "tpo",
    "vespo",
    "wpo",
]
