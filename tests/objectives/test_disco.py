# SPDX-License-Identifier: Apache-2.0
"""Group advantages and DisCO: definitions prompt by prompt, identities, edge cases, errors."""

import math

import pytest
import torch

from fastpref import objectives

B, T = 9, 5
GENERATOR = torch.Generator().manual_seed(0)
OLD = -3 * torch.rand(B, T, generator=GENERATOR, dtype=torch.float64)
POLICY = OLD + torch.randn(B, T, generator=GENERATOR, dtype=torch.float64) / 3
LENGTHS = torch.tensor([5, 2, 3, 1, 5, 4, 2, 3, 4])
MASK = torch.arange(T) < LENGTHS[:, None]
# Prompt -4 has both kinds, 90 too, 2 only right answers, 11 a single wrong one.
GROUPS = torch.tensor([-4, 90, -4, 2, -4, 90, 11, 2, 90])
REWARDS = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 1, 1])
EXTRAS = {"mask": MASK, "rewards": REWARDS, "group_ids": GROUPS}
SCORES = ["log_likelihood", "likelihood_ratio"]


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def evaluate(policy=POLICY, old=OLD, extras=EXTRAS, **hyperparameters):
    """The result, and the gradient of the loss of the batch."""
    policy = policy.clone().requires_grad_()
    result = objectives.disco(policy, old, **extras, **hyperparameters)
    return result, torch.autograd.grad(result.losses.mean(), policy)[0]


def test_advantages_prompt_by_prompt():
    rewards = torch.rand(B, generator=GENERATOR, dtype=torch.float64)
    expected = torch.zeros(B, dtype=torch.float64)
    for prompt in (-4, 90, 2):
        own = rewards[GROUPS == prompt]
        expected[GROUPS == prompt] = (own - own.mean()) / (own.std() + 1e-4)
    close(objectives.group_advantages(rewards, GROUPS), expected)
    means = [rewards[GROUPS == prompt].mean() for prompt in GROUPS]
    close(
        objectives.group_advantages(rewards, GROUPS, normalize="none"),
        rewards - torch.stack(means),
    )


@pytest.mark.parametrize("normalize", ["std", "none"])
def test_equal_rewards_have_no_advantage(normalize):
    for reward in (100 * torch.randn(50, generator=GENERATOR)).tolist():
        rewards = torch.full((B,), reward)
        assert (objectives.group_advantages(rewards, GROUPS, normalize=normalize) == 0).all()
    alone = objectives.group_advantages(torch.randn(B), torch.arange(B), normalize=normalize)
    assert (alone == 0).all()


def test_advantages_are_numbers():
    rewards = torch.rand(B).requires_grad_()
    advantages = objectives.group_advantages(rewards, GROUPS.int())
    assert advantages.dtype == torch.float32 and not advantages.requires_grad
    whole = torch.tensor([0, 1, 5, 0, 2, 1, 1, 3, 3])
    expected = objectives.group_advantages(whole.float(), GROUPS)
    assert torch.equal(objectives.group_advantages(whole, GROUPS), expected)
    assert torch.equal(objectives.group_advantages(whole.bfloat16(), GROUPS), expected)


@pytest.mark.parametrize("score", SCORES)
def test_prompt_by_prompt(score):
    tokens = POLICY if score == "log_likelihood" else (POLICY - OLD).exp()
    scores = (tokens * MASK).sum(-1) / LENGTHS
    gain = 0.0
    for prompt in (-4, 90):
        right = scores[(GROUPS == prompt) & (REWARDS == 1)]
        wrong = scores[(GROUPS == prompt) & (REWARDS == 0)]
        gain += right.mean() - 0.3 * (wrong / 0.3).exp().mean().log()
    ratio = (POLICY - OLD).exp()
    divergence = (ratio - 1 - ratio.log())[MASK].mean()
    result, _ = evaluate(score=score, tau=0.3, delta=0.01, kl_weight=7.0)
    # Four prompts: the two that lack a kind count too.
    expected = -gain / 4 + 3.5 * (divergence - 0.01) ** 2
    close(result.losses, expected.expand(B))
    close(result.ratio, ratio * MASK)
    close(result.kl, (ratio - 1 - ratio.log()) * MASK)
    assert not result.is_clipped.any()


@pytest.mark.parametrize("score", SCORES)
def test_an_infinite_tau_is_the_plain_mean(score):
    plain = evaluate(score=score, tau=math.inf)
    close(evaluate(score=score, tau=1e12), plain)
    half = (POLICY.float(), OLD.float())
    close(evaluate(*half, score=score, tau=1e9), evaluate(*half, score=score, tau=math.inf), 1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_a_small_tau_sees_the_best_wrong_answer(score):
    """Prompt -4 has two wrong answers, 90 one."""
    tokens = POLICY if score == "log_likelihood" else (POLICY - OLD).exp()
    best = ((tokens * MASK).sum(-1) / LENGTHS)[[2, 4]].argmax().item()
    _, gradient = evaluate(score=score, tau=1e-3, kl_weight=1e-9)
    assert (gradient[[2, 4][best], 0] > 0) and abs(gradient[[4, 2][best], 0]) < 1e-9
    assert gradient[1, 0] > 0


def test_tau_of_the_authors():
    close(evaluate(), evaluate(tau=10.0))
    close(evaluate(score=SCORES[1]), evaluate(score=SCORES[1], tau=1.0))


def test_on_policy_scores_agree():
    """All ratios are 1, so every wrong answer weighs the same, and the constraint is inactive."""
    expected = evaluate(old=None, tau=math.inf)[1]
    close(evaluate(old=None, score="likelihood_ratio", tau=0.2)[1], expected)
    counts = torch.tensor([1, 1, 2, 1, 2, 2, 1, 1, 2])  # of its kind with its prompt
    active = torch.tensor([1.0, 1, 1, 0, 1, 1, 0, 0, 1])
    sign = 1 - 2 * REWARDS.double()
    close(expected, (active * sign / counts / 4 / LENGTHS)[:, None] * MASK)


@pytest.mark.parametrize("kl_estimator", ["low_var", "kl"])
def test_the_constraint_has_the_gradient_of_the_authors_code(kl_estimator):
    """That of weight (KL - delta) KL, its first factor held; half the square's."""
    old = OLD if kl_estimator == "low_var" else POLICY + 0.2  # -log r has to be positive
    log_ratio = (POLICY - old) * MASK
    kl, step = -log_ratio, -MASK.double()
    if kl_estimator == "low_var":
        kl, step = log_ratio.exp() - 1 - log_ratio, log_ratio.exp() - 1
    excess = kl.sum() / MASK.sum() - 0.01
    arguments = {"old": old, "delta": 0.01, "kl_estimator": kl_estimator}
    _, gradient = evaluate(**arguments, kl_weight=70.0)
    _, less = evaluate(**arguments, kl_weight=20.0)
    close(gradient - less, 50 * excess * step / MASK.sum())


def test_a_batch_of_one_kind_learns_nothing():
    for rewards in (torch.zeros(B), torch.ones(B)):
        result, gradient = evaluate(old=None, extras=EXTRAS | {"rewards": rewards})
        assert (result.losses == 0).all() and (gradient == 0).all()
    one = {name: value[:1] for name, value in EXTRAS.items()}
    result, gradient = evaluate(POLICY[:1], None, one)
    assert (result.losses == 0).all() and (gradient == 0).all()


def test_order_and_numbering_of_prompts_are_free():
    order = torch.randperm(B, generator=GENERATOR)
    renumbered = {-4: 3, 90: 0, 2: 10**12, 11: -1}
    extras = {name: value[order] for name, value in EXTRAS.items()}
    extras["group_ids"] = torch.tensor([renumbered[one] for one in extras["group_ids"].tolist()])
    result, gradient = evaluate(POLICY[order], OLD[order], extras)
    expected, expected_gradient = evaluate()
    close(result.losses, expected.losses)
    close(gradient, expected_gradient[order])


@pytest.mark.parametrize("score", SCORES)
def test_what_is_not_scored_is_not_read(score):
    noise = torch.where(MASK, 0, torch.nan)
    (result, gradient), (expected, slopes) = (
        evaluate(POLICY + noise, OLD + noise, score=score),
        evaluate(score=score),
    )
    for got, want in zip((*result, gradient), (*expected, slopes), strict=True):
        assert torch.equal(got, want)
    assert (gradient[~MASK] == 0).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kl_estimator", ["low_var", "kl"])
def test_far_off_policy_stays_finite(score, kl_estimator):
    policy = -1e4 * torch.rand(B, T, generator=GENERATOR).round()
    empty = EXTRAS | {"mask": MASK & (torch.arange(B) > 2)[:, None]}
    for extras in (EXTRAS, empty):
        for tau in (1e-3, None, math.inf):
            arguments = {"score": score, "kl_estimator": kl_estimator, "tau": tau}
            result, gradient = evaluate(policy, policy.flip(-1), extras, **arguments)
            assert all(torch.isfinite(value).all() for value in (*result, gradient))


CASES = {
    "rewards that are neither": (
        ValueError,
        "disco: rewards must be 0 or 1, got -1",
        lambda: evaluate(extras=EXTRAS | {"rewards": 2 * REWARDS - 1}),
    ),
    "a group id a token": (
        ValueError,
        r"disco: group_ids must be one value a response, \(9,\), got \(9, 5\)",
        lambda: evaluate(extras=EXTRAS | {"group_ids": MASK.long()}),
    ),
    "no temperature": (
        ValueError,
        r"disco: tau must be in \(0, inf\], got 0",
        lambda: objectives.get("disco", tau=0.0),
    ),
    "unknown normalization": (
        ValueError,
        "normalize must be 'std' or 'none', got 'batch'",
        lambda: objectives.group_advantages(REWARDS, GROUPS, normalize="batch"),
    ),
    "ids are no integers": (
        TypeError,
        "group_ids must be integers, got torch.float32",
        lambda: objectives.group_advantages(REWARDS, REWARDS),
    ),
    "rewards in a list": (
        TypeError,
        "rewards must be a tensor, got list",
        lambda: objectives.group_advantages([1.0, 0.0], GROUPS[:2]),
    ),
    "rewards in rows": (
        ValueError,
        r"rewards and group_ids must both be \(B,\), one value a response, got \(3, 3\) and \(9,\)",
        lambda: objectives.group_advantages(REWARDS.view(3, 3), GROUPS),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors(case):
    error, message, call = CASES[case]
    with pytest.raises(error, match=message):
        call()
