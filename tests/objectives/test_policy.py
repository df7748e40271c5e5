# SPDX-License-Identifier: Apache-2.0
"""Objectives on tokens: TRL, identities, edge cases, and two ranks against one process."""

import collections
import math
import types

import pytest
import torch
import torch.distributed as dist

from fastpref import objectives

B, T = 8, 6
GENERATOR = torch.Generator().manual_seed(0)
OLD, REF = -3 * torch.rand(2, B, T, generator=GENERATOR, dtype=torch.float64)
POLICY = OLD + torch.randn(B, T, generator=GENERATOR, dtype=torch.float64) / 2
ADVANTAGES = torch.randn(B, generator=GENERATOR, dtype=torch.float64)
TOKEN_ADVANTAGES = torch.randn(B, T, generator=GENERATOR, dtype=torch.float64)
LENGTHS = torch.tensor([6, 1, 3, 4, 6, 2, 5, 3])
MASK = torch.arange(T) < LENGTHS[:, None]

REQUIRED = {"dr_grpo": {"max_completion_length": 16}}
CLIPPED = ["grpo", "bnpo", "dr_grpo", "dapo"]
NAMES = [*CLIPPED, "gspo", "cispo", "sapo", "luspo", "vespo", "gmpo"]
BY_TOKENS = ("bnpo", "dapo", "cispo", "vespo")
# What the terms of a response are divided by, where that is not its length.
COUNTS = dict.fromkeys(BY_TOKENS, MASK.sum() / B)
COUNTS |= {"dr_grpo": torch.tensor(16), "luspo": torch.ones(B)}
GROUPS = {
    "rewards": torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 0]),
    "group_ids": torch.tensor([7, 7, -2, -2, 7, 7, 0, 0]),
}


def get(name, **hyperparameters):
    return objectives.get(name, **REQUIRED.get(name, {}) | hyperparameters)


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def slope(loss, policy):
    return torch.autograd.grad(loss.sum(), policy)[0]


def evaluate(name, policy=POLICY, old=OLD, *, mask=MASK, advantages=ADVANTAGES, ref=None, **rest):
    """The result, and the gradient of the summed losses."""
    policy = policy.clone().requires_grad_()
    extras = {"mask": mask, "advantages": advantages, "ref_token_logp": ref}
    result = get(name, **rest)(policy, old, **extras)
    return result, slope(result.losses, policy)


class Trainer(types.SimpleNamespace):
    """What TRL's loss method reads of its trainer, on log-probabilities that are given."""

    def __init__(self, policy, **settings):
        args = {"delta": None, "use_bias_correction_kl": False}
        args |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
        args |= {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0}
        args |= {"vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
        super().__init__(
            accelerator=types.SimpleNamespace(
                num_processes=1, gather=lambda value: value, reduce=lambda value, **_: value
            ),
            args=types.SimpleNamespace(**args | settings.pop("args", {})),
            aux_loss_enabled=False,
            current_gradient_accumulation_steps=1,
            importance_sampling_level="token",
            max_completion_length=16,
            model=types.SimpleNamespace(training=False),
            off_policy_mask_threshold=None,
            top_entropy_quantile=1.0,
            use_vllm=False,
            _entropy_bonus_enabled=False,
            _get_per_token_logps_and_entropies=lambda *_, **__: (policy, torch.ones(B, T), None),
            _metrics={"eval": collections.defaultdict(list)},
        )
        vars(self).update(settings)

    def loss(self, trainer, old, advantages):
        ids = torch.zeros(B, T, dtype=torch.long)
        inputs = {
            "prompt_ids": ids,
            "prompt_mask": ids,
            "completion_ids": ids,
            "completion_mask": MASK.long(),
            "advantages": advantages,
            "num_items_in_batch": MASK.sum(),
            "ref_per_token_logps": REF,
        }
        if old is not None:
            inputs["old_per_token_logps"] = old
        self.get_gamma_weights = getattr(trainer, "get_gamma_weights", None)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # of the tensors TRL makes of its settings
        try:
            return trainer._compute_loss(self, None, inputs)
        finally:
            torch.set_default_dtype(default)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("old", [OLD, None], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("advantages", [ADVANTAGES, TOKEN_ADVANTAGES], ids=["response", "token"])
@pytest.mark.parametrize(
    ("name", "hyperparameters", "trl"),
    [
        ("grpo", {}, {}),
        ("grpo", {"delta": 1.4}, {"args": {"delta": 1.4}}),
        ("bnpo", {"epsilon_high": 0.5}, {"epsilon_high": 0.5}),
        ("dr_grpo", {"epsilon_low": 0.1}, {"epsilon_low": 0.1}),
        ("dapo", {}, {"epsilon_high": 0.28}),
        ("cispo", {}, {"epsilon_high": 5.0}),
        ("cispo", {"epsilon_high": 1.1}, {"epsilon_high": 1.1}),
        ("sapo", {}, {}),
        ("sapo", {"tau_negative": 3.0}, {"args": {"sapo_temperature_neg": 3.0}}),
        ("gspo", {"epsilon_low": 0.1, "epsilon_high": 0.2}, {"epsilon_low": 0.1}),
        ("gspo", {}, {"epsilon_low": 3e-4, "epsilon_high": 4e-4}),
        ("luspo", {}, {"epsilon_low": 3e-4, "epsilon_high": 4e-4}),
        ("vespo", {}, {}),
        ("vespo", {"k_negative": 1.5}, {"args": {"vespo_k_neg": 1.5}}),
        ("bnpo", {"importance_sampling_level": "sequence"}, {}),
        ("dapo", {"use_bias_correction_kl": True}, {"epsilon_high": 0.28}),
        ("grpo", {"importance_sampling_level": "sequence", "use_bias_correction_kl": True}, {}),
    ],
)
def test_agrees_with_trl(name, hyperparameters, trl, advantages, old, beta):
    trainer = pytest.importorskip("trl").GRPOTrainer
    policy = POLICY.clone().requires_grad_()
    settings = {"epsilon_low": 0.2, "epsilon_high": 0.2, "beta": beta} | trl
    settings["loss_type"] = "grpo" if name == "gspo" else name
    level = "sequence" if name in ("gspo", "luspo") else "token"
    settings["importance_sampling_level"] = hyperparameters.get("importance_sampling_level", level)
    corrected = {"use_bias_correction_kl": hyperparameters.get("use_bias_correction_kl", False)}
    settings["args"] = settings.get("args", {}) | corrected
    theirs = Trainer(policy, **settings).loss(trainer, old, advantages)
    extras = {"mask": MASK.long(), "advantages": advantages, "ref_token_logp": REF}
    losses = get(name, beta=beta, **hyperparameters)(policy, old, **extras).losses
    close(losses.mean(), theirs)
    close(slope(losses.mean(), policy), slope(theirs, policy))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_gmpo_agrees_with_trl(beta):
    gmpo = pytest.importorskip("trl.experimental.gmpo")
    policy = POLICY.clone().requires_grad_()
    trainer = Trainer(policy, epsilon_low=0.2, epsilon_high=0.3, beta=beta)
    theirs = trainer.loss(gmpo.GMPOTrainer, OLD, ADVANTAGES)
    result, gradient = evaluate("gmpo", ref=REF, beta=beta, epsilon_low=0.2, epsilon_high=0.3)
    close(result.losses.mean(), theirs.detach())
    close(gradient / B, slope(theirs, policy))
    assert result.is_clipped.any()


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_is_reinforce(name):
    """On-policy, every one has the gradient of -A log policy, over its own number of tokens."""
    expected = -(ADVANTAGES / COUNTS.get(name, LENGTHS))[:, None] * MASK
    for old in (None, POLICY):
        result, gradient = evaluate(name, old=old)
        close(gradient, expected)
        close(result.ratio, MASK.double())
        assert not result.is_clipped.any() and result.kl is None


def test_one_surrogate_four_means():
    arguments = {"ref": REF, "beta": 0.2, "epsilon_high": 0.3, "delta": 1.5}
    grpo = evaluate("grpo", **arguments)[0].losses
    close(evaluate("dr_grpo", **arguments)[0].losses, grpo * LENGTHS / 16)
    close(evaluate("bnpo", **arguments)[0].losses, grpo * LENGTHS * B / LENGTHS.sum())
    close(evaluate("dapo", **arguments)[0], evaluate("bnpo", **arguments)[0])
    one = {"policy": POLICY[:1], "old": OLD[:1], "mask": MASK[:1], "advantages": ADVANTAGES[:1]}
    for name in ("bnpo", "dapo"):
        close(evaluate(name, **one, epsilon_high=0.2), evaluate("grpo", **one))


def test_sequence_ratios_of_one_token_are_token_ratios():
    one = {"policy": POLICY[:, :1], "old": OLD[:, :1], "mask": MASK[:, :1]}
    clip = {"epsilon_low": 0.2, "epsilon_high": 0.3}
    close(evaluate("gspo", **one, **clip), evaluate("grpo", **one, **clip))
    log_clip = {"epsilon_low": -math.log(0.8), "epsilon_high": math.log(1.3)}
    result, gradient = evaluate("gmpo", **one, **log_clip)
    close((result, gradient), evaluate("grpo", **one, **clip))


def test_geometric_means_agree_where_nothing_is_clipped():
    wide = {"epsilon_low": 20.0, "epsilon_high": 20.0}
    (gspo, gspo_slope), (gmpo, gmpo_slope) = evaluate("gspo", **wide), evaluate("gmpo", **wide)
    close((gspo.losses, gspo_slope), (gmpo.losses, gmpo_slope))
    means = ((POLICY - OLD) * MASK).sum(-1) / LENGTHS
    close(gspo.ratio, means.exp()[:, None] * MASK)
    close(gmpo.ratio, (POLICY - OLD).exp() * MASK)


def test_one_ratio_a_response_by_either_name():
    clip = {"epsilon_low": 0.1, "epsilon_high": 0.2, "beta": 0.3, "ref": REF}
    gspo, gspo_slope = evaluate("gspo", **clip)
    grpo, grpo_slope = evaluate("grpo", importance_sampling_level="sequence", **clip)
    close((gspo.losses, gspo.ratio, gspo_slope), (grpo.losses, grpo.ratio, grpo_slope))
    luspo, luspo_slope = evaluate("luspo", **clip)
    close((luspo.losses, luspo_slope), (LENGTHS * gspo.losses, LENGTHS[:, None] * gspo_slope))


def test_vespo_weighs_a_response_by_its_ratio_to_the_sampler():
    sampler = OLD - torch.where(MASK, 0.1, 0)
    direct, direct_slope = evaluate("vespo", old=sampler)
    keywords = {"sampler_ratio": torch.full((B, T), 0.1).exp()}
    policy = POLICY.clone().requires_grad_()
    extras = {"mask": MASK, "advantages": ADVANTAGES}
    for ratio in (keywords["sampler_ratio"].double(), (0.1 * LENGTHS).exp()):
        losses = get("vespo")(policy, OLD, **extras, sampler_ratio=ratio).losses
        close((losses, slope(losses, policy)), (direct.losses, direct_slope), 1e-6)
    ratio = torch.where(torch.arange(T) == 0, 0.0, 1.0).expand(B, T)
    rejected = get("vespo")(policy, OLD, **extras, sampler_ratio=ratio).losses
    assert (rejected == 0).all()


@pytest.mark.parametrize("name", [one for one in NAMES if one != "gmpo"])
def test_corrected_kl_is_the_kl_times_the_ratio(name):
    plain, _ = evaluate(name, ref=REF)
    result, gradient = evaluate(name, ref=REF, use_bias_correction_kl=True)
    close(result.kl, plain.kl * plain.ratio)
    close((result.losses, result.ratio), (plain.losses, plain.ratio))
    far = {"policy": -OLD * 3e3, "old": OLD * 3e3, "ref": 3e3 * REF}
    far = {key: value.float() for key, value in far.items()}
    result, gradient = evaluate(name, **far, beta=1.0, use_bias_correction_kl=True)
    assert all(torch.isfinite(value).all() for value in (*result, gradient))


RATIOS = torch.tensor([[0.7, 0.9, 1.1, 1.5], [0.7, 0.9, 1.1, 1.5]], dtype=torch.float64)
SIGNS = {"advantages": torch.tensor([1.0, -1.0]), "mask": torch.ones(2, 4)}


@pytest.mark.parametrize(
    ("name", "hyperparameters", "clipped", "slopes"),
    [
        ("grpo", {}, ([3], [0]), [[0.7, 0.9, 1.1, 0.0], [0.0, 0.9, 1.1, 1.5]]),
        ("grpo", {"delta": 1.2}, ([3], [0]), [[0.7, 0.9, 1.1, 0.0], [0.0, 0.9, 1.1, 0.0]]),
        ("grpo", {"epsilon_high": 0.6}, ([], [0]), [[0.7, 0.9, 1.1, 1.5], [0.0, 0.9, 1.1, 1.5]]),
        ("cispo", {"epsilon_high": 1.2}, ([3], []), [[0.7, 0.9, 1.1, 1.2]] * 2),
    ],
)
def test_what_a_clip_takes(name, hyperparameters, clipped, slopes):
    result, gradient = evaluate(name, RATIOS.log(), torch.zeros(2, 4), **SIGNS, **hyperparameters)
    for row, places in zip(result.is_clipped, clipped, strict=True):
        assert row.nonzero().flatten().tolist() == places
    close(4 * gradient, torch.tensor(slopes).double() * torch.tensor([[-1.0], [1.0]]), 1e-6)


def test_sapo_gates_by_the_sign_of_the_advantage():
    arguments = {"policy": RATIOS.log(), "old": torch.zeros(2, 4), **SIGNS}
    result, gradient = evaluate("sapo", **arguments, tau_positive=2.0, tau_negative=5.0)
    gates = torch.sigmoid(torch.tensor([[2.0], [5.0]]) * (RATIOS - 1))
    close(result.losses, (torch.tensor([[-2.0], [0.8]]) * gates).mean(-1), 1e-6)
    close(gradient, torch.tensor([[-1.0], [1.0]]) * gates * (1 - gates) * RATIOS, 1e-6)
    assert not result.is_clipped.any()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_scored_is_not_read(name):
    noise = torch.where(MASK, 0, torch.nan)
    arguments = {"advantages": TOKEN_ADVANTAGES, "ref": REF, "beta": 0.1}
    expected, expected_slope = evaluate(name, **arguments)
    spoilt = {"advantages": TOKEN_ADVANTAGES + noise, "ref": REF + noise, "beta": 0.1}
    result, gradient = evaluate(name, POLICY + noise, OLD + noise, **spoilt)
    for got, want in zip((*result, gradient), (*expected, expected_slope), strict=True):
        assert torch.equal(got, want)
    for hidden in (result.ratio, result.is_clipped, result.kl, gradient):
        assert (hidden[~MASK] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_response_counts_as_zero(name):
    mask = MASK & (torch.arange(B) != 2)[:, None]
    result, gradient = evaluate(name, mask=mask, ref=REF, beta=0.1)
    assert result.losses[2] == 0 and (gradient[2] == 0).all()
    others = torch.arange(B) != 2
    rows = {"policy": POLICY[others], "old": OLD[others], "mask": mask[others], "ref": REF[others]}
    alone, _ = evaluate(name, **rows, advantages=ADVANTAGES[others], beta=0.1)
    share = B / (B - 1) if name in BY_TOKENS else 1
    close(result.losses[others], share * alone.losses)
    nothing, gradient = evaluate(name, mask=torch.zeros(B, T))
    assert (nothing.losses == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_penalty_is_the_mean_of_kl(name):
    plain, plain_slope = evaluate(name)
    watched, watched_slope = evaluate(name, ref=REF)
    close((watched.losses, watched_slope), (plain.losses, plain_slope))
    expected = ((REF - POLICY).exp() - (REF - POLICY) - 1) * MASK
    close(watched.kl, expected)
    without = torch.zeros(B, dtype=torch.float64)
    penalised, gradient = evaluate(name, ref=REF, beta=0.7, advantages=without)
    count = COUNTS.get(name, LENGTHS)
    close(penalised.losses, 0.7 * expected.sum(-1) / count)
    close(gradient, 0.7 * (1 - (REF - POLICY).exp()) * MASK / count.reshape(-1, 1))


@pytest.mark.parametrize("name", NAMES)
def test_far_off_policy_stays_finite_and_keeps_its_direction(name):
    policy = torch.tensor([[0.0, -1e4]] * 3)
    arguments = {"policy": policy, "old": policy.flip(-1), "mask": torch.ones(3, 2)}
    arguments["advantages"] = torch.tensor([1.0, -1.0, 0.0])
    result, gradient = evaluate(name, **arguments, ref=policy.flip(-1), beta=1.0)
    assert all(torch.isfinite(value).all() for value in (*result, gradient))
    # The reference says less of the first token and more of the second.
    assert gradient[2, 0] > 0 and gradient[2, 1] < -1e20
    if name in CLIPPED:  # A bad token that became likely is still pushed down.
        assert evaluate(name, **arguments)[1][1, 0] > 1e20


@pytest.mark.parametrize("name", NAMES)
def test_beta_needs_a_reference(name):
    with pytest.raises(ValueError, match=r"beta=0.5 .* pass ref_token_logp, got None"):
        evaluate(name, beta=0.5)


CASES = {
    "no constant": (
        TypeError,
        "dr_grpo needs a value for max_completion_length",
        lambda: objectives.get("dr_grpo"),
    ),
    "advantages of another shape": (
        ValueError,
        r"grpo: advantages must be one value a response, \(8,\) or shaped like the log-probs, "
        r"\(8, 6\), got \(6,\)",
        lambda: evaluate("grpo", advantages=torch.zeros(6)),
    ),
    "mask of another shape": (
        ValueError,
        r"gspo: mask must be shaped like the log-probs, \(8, 6\), got \(8, 1\)",
        lambda: evaluate("gspo", mask=torch.ones(8, 1)),
    ),
    "sums for tokens": (
        ValueError,
        r"log-probs must all be \(B, T\), got policy_token_logp \(8,\)",
        lambda: evaluate("sapo", POLICY[:, 0], OLD[:, 0], mask=MASK[:, 0]),
    ),
    "negative clip": (
        ValueError,
        "gmpo: epsilon_low must be >= 0, got -0.1",
        lambda: get("gmpo", epsilon_low=-0.1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors(case):
    error, message, call = CASES[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", [*NAMES, "disco"])
def test_nothing_is_read_back(name):
    """Tensors without values have none to read."""
    extras = GROUPS if name == "disco" else {"advantages": ADVANTAGES, "ref_token_logp": REF}
    extras = {key: value.to("meta") for key, value in (extras | {"mask": MASK}).items()}
    policy, old = POLICY.to("meta").requires_grad_(), OLD.to("meta")
    result = get(name)(policy, old, **extras)
    assert result.losses.shape == (B,) and slope(result.losses, policy).shape == (B, T)


COUPLED = {
    "dapo": {"beta": 0.1},
    "cispo": {"beta": 0.1},
    "vespo": {"beta": 0.1},
    "disco": {"tau": 0.5, "delta": 0.01},
    "disco-b on ratios": {"tau": math.inf, "score": "likelihood_ratio", "kl_estimator": "kl"},
}


def loss_and_slopes(case, rows, group):
    """Of a policy with two parameters on these rows, with gradients averaged over ranks."""
    name = case.partition("-")[0]
    parameters = torch.tensor([0.1, 0.9], dtype=torch.float64, requires_grad=True)
    extras = {"mask": MASK[rows]}
    if name == "disco":
        extras |= {key: value[rows] for key, value in GROUPS.items()}
    else:
        extras |= {"advantages": ADVANTAGES[rows], "ref_token_logp": REF[rows]}
    policy = parameters[0] * POLICY[rows].square() + parameters[1] * POLICY[rows]
    objective = objectives.get(name, dp_group=group, **COUPLED[case])
    loss = objective(policy, OLD[rows], **extras).losses.mean()
    values = torch.cat([loss[None], *torch.autograd.grad(loss, parameters)])
    if group is not None:
        dist.all_reduce(values, group=group)
        values /= group.size()
    return values.detach()


def halves(rank):
    rows = slice(rank * B // 2, (rank + 1) * B // 2)
    return {case: loss_and_slopes(case, rows, dist.group.WORLD) for case in COUPLED}


@pytest.mark.heavy
def test_two_ranks_are_one_batch(two_ranks):
    for found in two_ranks(halves):
        for case in COUPLED:
            close(found[case], loss_and_slopes(case, slice(None), None))
