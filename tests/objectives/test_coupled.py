# SPDX-License-Identifier: Apache-2.0
"""Objectives on a batch, a running state or another module: identities, TRL, two ranks."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fastpref import objectives
from tests.objectives import trl_dpo

P = 12
GENERATOR = torch.Generator().manual_seed(5)
LOGPS = -60 * torch.rand(4, P, dtype=torch.float64, generator=GENERATOR)
OTHER = -60 * torch.rand(2, P, dtype=torch.float64, generator=GENERATOR)
EMBEDDINGS = torch.randn(P, 3, dtype=torch.float64, generator=GENERATOR)
COUNTS = torch.randint(1, 40, (2, P), generator=GENERATOR)
LENGTHS = {"chosen_lengths": COUNTS[0], "rejected_lengths": COUNTS[1]}
KEEP = torch.tensor([1, 0, 1, 1, 1, 1, 1, 0, 1, 0, 0, 1], dtype=torch.bool)  # 5 and 3 by rank
RATIOS = LOGPS[:2] - LOGPS[2:]
GAP = RATIOS[0] - RATIOS[1]


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def evaluate(function, logps=LOGPS, **keywords):
    """Losses, rewards and the gradients of the summed losses."""
    leaves = [row.clone().requires_grad_() for row in logps]
    result = function(*leaves, **keywords)
    slopes = torch.autograd.grad(result.losses.sum(), leaves, materialize_grads=True)
    return [t.detach() for t in (*result, *slopes)]


def close(actual, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-11, "atol": 1e-11}
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


def by_pair(function, **keywords):
    """Each pair a batch of its own."""
    columns = [
        evaluate(function, LOGPS[:, i : i + 1], **{k: v[i : i + 1] for k, v in keywords.items()})
        for i in range(P)
    ]
    return [torch.cat(values) for values in zip(*columns, strict=True)]


DPO = {
    "beta_dpo": {"running_mean": number(9.0), "alpha": 0.0},
    "beta_dpo, mean as usual": {"running_mean": GAP.mean()},
    "epsilon_dpo": {"margin_plus": OTHER[0], "margin_minus": OTHER[1], "epsilon": 0.0},
    "relative_po": {"prompt_embeddings": torch.eye(P).double(), "tau": 1e-3},
    "ofs_dpo": {"other_chosen_logps": OTHER[0], "other_rejected_logps": OTHER[1], "alpha": 0.0},
}


@pytest.mark.parametrize("case", DPO)
def test_becomes_dpo(case):
    function = getattr(objectives, case.partition(",")[0])
    close(evaluate(function, beta=0.3, **DPO[case]), evaluate(objectives.dpo, beta=0.3))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "dr_dpo", "relative_po"])
def test_of_one_pair_is_dpo(name):
    extras = {"prompt_embeddings": EMBEDDINGS} if name == "relative_po" else {}
    beta = objectives.get(name).hyperparameters["beta"]
    dpo = evaluate(objectives.dpo, beta=beta)
    close(by_pair(getattr(objectives, name), **extras), dpo)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bco_pair", {}),
        ("aot", {"label_smoothing": 0.1}),
        ("aot_unpaired", {"label_smoothing": 0.1}),
    ],
)
def test_agrees_with_trl(name, settings):
    ours = objectives.get(name, beta=0.2, **settings)
    trl_dpo.check(ours, LOGPS, COUNTS, loss_type=name, beta=0.2, **settings)


def test_bco_pair_compares_with_delta():
    moved = LOGPS.clone()
    moved[2:] += 0.7 / 0.3
    shifted = evaluate(objectives.bco_pair, delta=number(0.7), beta=0.3)
    plain = evaluate(objectives.bco_pair, moved, beta=0.3)
    close([*shifted[:1], *shifted[3:]], [*plain[:1], *plain[3:]])
    close(shifted[1:3], 0.3 * RATIOS)


def test_aot_compares_order_statistics():
    policy, reference = np.sort((LOGPS[0] - LOGPS[1]).numpy()), np.sort(LOGPS[2] - LOGPS[3])
    result = objectives.aot(*LOGPS, beta=0.3)
    np.testing.assert_allclose(result.losses, np.logaddexp(0, 0.3 * (reference - policy)))
    shuffle = torch.randperm(P)
    shuffled = objectives.aot(*LOGPS[:2, shuffle], *LOGPS[2:], beta=0.3)
    assert torch.equal(shuffled.losses, result.losses)
    close(result[1:], 0.3 * RATIOS)


def test_unpaired_aot_does_not_know_pairs():
    result = objectives.aot_unpaired(*LOGPS)
    order = torch.randperm(P)
    apart = objectives.aot_unpaired(LOGPS[0], LOGPS[1, order], LOGPS[2], LOGPS[3, order])
    assert torch.equal(apart.losses, result.losses)
    assert torch.equal(apart.rejected_rewards, result.rejected_rewards[order])


def test_aot_gives_equal_margins_their_ranks_in_input_order():
    logps = torch.zeros(4, 3)
    logps[2] = torch.tensor([5.0, -5.0, 0.0])
    slopes = evaluate(objectives.aot, logps, beta=1.0)[3]
    torch.testing.assert_close(slopes, -torch.sigmoid(torch.tensor([-5.0, 0.0, 5.0])))


def test_dr_dpo_tilts_the_mean():
    dpo, robust = evaluate(objectives.dpo), evaluate(objectives.dr_dpo, tau=0.5)
    weights = torch.softmax(-dpo[0] / 0.5, dim=0)
    close(robust[3:], [P * weights * slope for slope in dpo[3:]])
    assert (robust[0] == robust[0][0]).all() and robust[0][0] < dpo[0].mean()
    mild = objectives.dr_dpo(*LOGPS, tau=1e7)
    close([mild.losses], [dpo[0].mean().expand(P)], rtol=1e-6, atol=0)


def test_beta_dpo_takes_beta_from_the_kept_pairs():
    kept = GAP[KEEP]
    beta = 0.1 * (1 + 0.6 * (kept.mean() - (kept.mean() - 2))).item()
    extras = {"running_mean": kept.mean() - 2, "keep": KEEP}
    result = evaluate(objectives.beta_dpo, **extras)
    dpo = evaluate(objectives.dpo, beta=beta)
    weights = KEEP * (P / KEEP.sum())
    close([result[0], *result[3:]], [weights * value for value in (dpo[0], *dpo[3:])])
    close(result[1:3], 0.1 * RATIOS)
    close([result[0].mean()], [dpo[0][KEEP].mean()])


def test_beta_dpo_with_no_pair_kept_is_zero():
    extras = {"running_mean": number(0.3), "keep": torch.zeros(P, dtype=torch.bool)}
    losses, _, _, *slopes = evaluate(objectives.beta_dpo, **extras)
    assert not losses.any() and not any(slope.any() for slope in slopes)


def test_beta_dpo_has_a_least_beta():
    losses = objectives.beta_dpo(*LOGPS, running_mean=number(1e3), beta_min=0.02).losses
    close([losses], [objectives.dpo(*LOGPS, beta=0.02).losses])


ADAPTIVE = {"running_mean": number(0.2), "running_std": number(2.0), **LENGTHS}


@pytest.mark.parametrize("changes", [{"alpha": 0.0}, {"running_std": number(0.0)}])
def test_alpha_dpo_without_adaptation_is_simpo(changes):
    adaptive = evaluate(objectives.alpha_dpo, gamma=0.8, **ADAPTIVE | changes)
    simpo = objectives.simpo(*LOGPS[:2], gamma=0.8, **LENGTHS)
    close(adaptive[:1], simpo[:1])
    close(adaptive[1:3], 2.5 * RATIOS)
    assert not adaptive[5].any() and not adaptive[6].any()


def test_alpha_dpo_moves_the_margin_of_each_pair():
    adaptive = evaluate(objectives.alpha_dpo, beta=2.0, gamma=0.8, alpha=0.3, **ADAPTIVE)
    means = RATIOS / COUNTS
    gammas = 0.8 + 2.0 * 0.3 * ((means[0] - means[1]) - 0.2) / 2.0
    for i, gamma in enumerate(gammas.tolist()):
        lengths = {key: value[i : i + 1] for key, value in LENGTHS.items()}
        policy = [row.clone().requires_grad_() for row in LOGPS[:2, i : i + 1]]
        simpo = objectives.simpo(*policy, beta=2.0, gamma=gamma, **lengths).losses
        slopes = torch.autograd.grad(simpo, policy)
        close([value[i : i + 1] for value in (adaptive[0], *adaptive[3:5])], [simpo, *slopes])


def test_alpha_dpo_of_empty_responses():
    empty = torch.zeros(P, dtype=torch.int64)
    extras = ADAPTIVE | {"chosen_lengths": empty, "rejected_lengths": empty}
    losses, *_ = evaluate(objectives.alpha_dpo, gamma=0.8, alpha=0.3, **extras)
    expected = math.log1p(math.exp(0.8 - 2.5 * 0.3 * 0.1))
    np.testing.assert_allclose(losses, expected)


STEPS = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 1.0] * 2).double()
MARGIN = LOGPS[0] - LOGPS[1]
MIXED = {  # above on one side and below on the other, except two on the same side and one equal
    "margin_plus": MARGIN + torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 2.0] * 2),
    "margin_minus": MARGIN + torch.tensor([-1.0, 1.0, 1.0, -1.0, -1.0, -0.1] * 2),
}


def test_epsilon_dpo_moves_the_beta_of_each_pair():
    moved = evaluate(objectives.epsilon_dpo, beta=0.3, epsilon=0.2, **MIXED)
    for step in (-1, 0, 1):
        chosen = step == STEPS
        dpo = evaluate(objectives.dpo, LOGPS[:, chosen], beta=0.3 / (1 + 0.2 * step))
        close([value[chosen] for value in (moved[0], *moved[3:])], [dpo[0], *dpo[3:]])
    close(moved[1:3], 0.3 * RATIOS)


def test_epsilon_dpo_beta_is_the_next_beta():
    beta = objectives.epsilon_dpo_beta(0.3, MARGIN, **MIXED, epsilon=0.2)
    assert beta == pytest.approx(0.3 / (1 + 0.2 * STEPS.mean().item()), rel=1e-15)
    assert objectives.get("epsilon_dpo", beta=beta).hyperparameters["beta"] == beta
    still = {"margin_plus": MARGIN, "margin_minus": MARGIN, "epsilon": 0.2}
    assert objectives.epsilon_dpo_beta(0.3, MARGIN, **still) == 0.3


def test_epsilon_dpo_steps_follow_mixed_logits():
    """A policy that moved from the reference along the preference has steps of +1 (a smaller beta
    moves it further), one that moved against it -1."""
    reference = torch.randn(P, 9, dtype=torch.float64)
    change = torch.zeros(9, dtype=torch.float64)
    change[0], change[1] = 1, -1

    def gap(logits):
        return torch.log_softmax(logits, -1)[:, :2].diff().squeeze(1).neg()

    for sign in (1, -1):
        policy = reference + sign * change
        mixed = [policy + e * (policy - reference) for e in (0.01, -0.01)]
        margins = [gap(logits) for logits in (policy, *mixed)]
        beta = objectives.epsilon_dpo_beta(0.1, *margins, 0.01)
        assert beta == pytest.approx(0.1 / (1 + 0.01 * sign), rel=1e-12)


def test_relative_po_of_like_prompts_compares_with_all():
    margins = 0.3 * (RATIOS[0][:, None] - RATIOS[1])
    expected = torch.log1p(torch.exp(-margins)).mean(1)
    for embeddings in (torch.ones(P, 4), torch.zeros(P, 4), torch.arange(1.0, P + 1)[:, None]):
        losses = objectives.relative_po(*LOGPS, prompt_embeddings=embeddings, beta=0.3).losses
        close([losses], [expected], rtol=1e-6, atol=1e-6)


def test_relative_po_weighs_by_direction():
    scale = 1 + torch.rand(P, 1)
    result = evaluate(objectives.relative_po, prompt_embeddings=EMBEDDINGS)
    close(evaluate(objectives.relative_po, prompt_embeddings=scale * EMBEDDINGS), result)


CHASED = {"other_chosen_logps": OTHER[0], "other_rejected_logps": OTHER[1]}


def test_ofs_dpo_fast_chases_as_dpo_against_the_other():
    fast = evaluate(objectives.ofs_dpo, alpha=0.5, **CHASED)
    dpo = evaluate(objectives.dpo)
    chase = evaluate(objectives.dpo, torch.cat([LOGPS[:2], OTHER]))
    for i in (0, 3, 4):
        torch.testing.assert_close(fast[i], dpo[i] + 0.5 * chase[i])


def test_ofs_dpo_slow_gives_back_what_fast_takes():
    fast = objectives.ofs_dpo(*LOGPS, role="fast", **CHASED)
    slow = objectives.ofs_dpo(
        *OTHER,
        *LOGPS[2:],
        other_chosen_logps=LOGPS[0],
        other_rejected_logps=LOGPS[1],
        role="slow",
    )
    both = objectives.dpo(*LOGPS).losses + objectives.dpo(*OTHER, *LOGPS[2:]).losses
    close([fast.losses + slow.losses], [both])


@pytest.mark.parametrize(
    ("name", "extras", "setting", "message"),
    [
        ("epsilon_dpo", MIXED, {"epsilon": 1.0}, r"in \[0, 1\) \(beta / \(1 - epsilon\) must"),
        ("beta_dpo", {"running_mean": number(0.0)}, {"alpha": -0.1}, "alpha must be >= 0"),
        ("beta_dpo", {"running_mean": GAP}, {}, "running_mean must be a 0-dim tensor"),
        ("bco_pair", {"delta": GAP}, {}, "delta must be a 0-dim tensor"),
        ("relative_po", {"prompt_embeddings": GAP}, {}, r"one row a response, \(12, D\)"),
        ("aot", {}, {"dp_group": 3}, "dp_group must be a ProcessGroup or None, got int"),
        ("ofs_dpo", CHASED, {"role": "medium"}, "must be one of 'fast', 'slow'"),
    ],
)
def test_refuses(name, extras, setting, message):
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(objectives, name)(*LOGPS, **extras, **setting)


COUPLED = {
    "aot": {"beta": 0.1, "label_smoothing": 0.1},
    "aot_unpaired": {"beta": 0.1},
    "dr_dpo": {"tau": 0.5},
    "beta_dpo": {"running_mean": number(0.5), "keep": KEEP},
    "beta_dpo, all kept": {"running_mean": number(0.5)},
    "relative_po": {"prompt_embeddings": EMBEDDINGS},
    "amapo": LENGTHS,
}


def of_a_linear_policy(case, rows=slice(None), group=None):
    """Losses and rewards of these rows; mean loss and gradients, averaged over ranks."""
    name, keywords = case.partition(",")[0], COUPLED[case]
    keywords = {
        key: value[rows] if isinstance(value, torch.Tensor) and value.dim() else value
        for key, value in keywords.items()
    }
    parameters = torch.tensor([0.1, 0.4], dtype=torch.float64, requires_grad=True)
    policy = parameters @ torch.stack([LOGPS[:2, rows], OTHER[:, rows]]).flatten(1)
    references = LOGPS[2:, rows] if name != "amapo" else ()
    result = getattr(objectives, name)(*policy.view(2, -1), *references, **keywords, dp_group=group)
    loss = result.losses.mean()
    averaged = torch.cat([loss[None], *torch.autograd.grad(loss, parameters)])
    if group is not None:
        dist.all_reduce(averaged, group=group)
        averaged /= group.size()
    return [torch.stack(result).detach(), averaged.detach()]


@pytest.mark.heavy
def test_two_ranks_are_one_batch(two_ranks):
    ranks = two_ranks(halves)
    for case in COUPLED:
        found, averaged = zip(*(rank[case] for rank in ranks), strict=True)
        expected = of_a_linear_policy(case)
        close([torch.cat(found, 1), averaged[0], averaged[1]], [*expected, expected[1]])


def halves(rank):
    rows = slice(rank * P // 2, (rank + 1) * P // 2)
    return {case: of_a_linear_policy(case, rows, dist.group.WORLD) for case in COUPLED}
