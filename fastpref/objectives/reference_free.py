# SPDX-License-Identifier: Apache-2.0
"""Pairwise objectives that need no reference model.

Every function takes ``(policy_chosen_logps, policy_rejected_logps)``, each ``(P,)`` sums over the
scored tokens; the reference parameters are there for a common signature and must stay None. Returns
``PairLosses`` whose rewards are ``beta`` times the score that is compared. In the formulas s is the
summed and sbar = s / n the mean log-probability (0 for an empty response), w the chosen and l the
rejected response.
"""

from torch import Tensor

from .registry import objective
from .results import PairLosses
from .signature import Filled, FilledWithGrad, Finite, LabelSmoothing, Positive
from .terms import bradley_terry_nll, mean_nll, per_token


@objective(unit="pair", scope="pair", needs_reference=False)
def simpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Filled,
    rejected_lengths: Filled,
    beta: Positive = 2.5,
    gamma: Finite = 1.0,
    label_smoothing: LabelSmoothing = 0.0,
) -> PairLosses:
    """Simple preference optimization: mean log-probabilities and a target margin.

        m = beta (sbar_w - sbar_l) - gamma
        loss = softplus(-m) + eps m

    Meng et al. 2024, arXiv:2405.14734, eq. 6. Defaults lie in the paper's ranges (beta 2 to 2.5,
    gamma / beta 0.25 to 0.55). ``gamma`` is the margin itself, not its ratio to beta.
    """
    chosen = beta * per_token(policy_chosen_logps, chosen_lengths)
    rejected = beta * per_token(policy_rejected_logps, rejected_lengths)
    losses = bradley_terry_nll(chosen - rejected - gamma, label_smoothing)
    return PairLosses(losses, chosen, rejected)


@objective(unit="pair", scope="unit", needs_reference=False)
def sft(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Filled | None = None,
    chosen_nll: FilledWithGrad | None = None,
) -> PairLosses:
    """Mean negative log-likelihood of a token of the chosen response, a term for mixtures.

        loss = chosen_nll, by default -s_w / n_w

    ``chosen_nll`` carries a gradient. The loss compares nothing, so the rewards are the summed
    log-probabilities: accuracy then says which response the policy finds likelier.
    """
    losses = mean_nll(chosen_nll, policy_chosen_logps, chosen_lengths)
    return PairLosses(losses, policy_chosen_logps, policy_rejected_logps)
