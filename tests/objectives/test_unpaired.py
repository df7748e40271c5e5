# SPDX-License-Identifier: Apache-2.0
"""Unpaired objectives: identities, edge cases, TRL, and two ranks against one process."""

import collections
import math
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastpref import objectives

GENERATOR = torch.Generator().manual_seed(0)
POLICY, REF = -40 * torch.rand(2, 12, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.arange(12) % 3 > 0
COUPLED = {"kto": {"beta": 0.3}, "bco": {"beta": 0.3}}


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def slope(objective, policy, *args, **extras):
    """Gradient of the summed losses with respect to ``policy``."""
    policy = policy.clone().requires_grad_()
    return torch.autograd.grad(objective(policy, *args, **extras).losses.sum(), policy)[0]


@pytest.mark.parametrize("shift", [-50.0, 50.0])
def test_kto_measures_kl_on_the_batch_and_never_below_zero(shift):
    ref = REF - shift
    kl = max(0.0, (POLICY - ref).mean().item())
    losses, rewards = objectives.kto(POLICY, ref, labels=LABELS)
    close(losses, objectives.kto(POLICY, ref, labels=LABELS, kl=torch.tensor(kl)).losses, 1e-5)
    margins = 0.1 * (POLICY - ref - kl)
    close(losses, torch.where(LABELS, 1 - margins.sigmoid(), margins.sigmoid()))
    close(rewards, 0.1 * (POLICY - ref))


def test_kto_takes_a_given_kl_as_it_is():
    kl = torch.tensor(-3.0, dtype=torch.float64)
    losses = objectives.kto(POLICY, REF, labels=LABELS, kl=kl).losses
    close(losses, objectives.kto(POLICY + 3, REF, labels=LABELS, kl=0 * kl).losses)


def test_statistics_of_the_batch_carry_no_gradient():
    ref = REF - 30
    margins = 0.1 * (POLICY - ref)
    share = (margins - margins.mean()).sigmoid()
    towards = 0.1 * torch.where(LABELS, -1.0, 1.0).double()
    close(slope(objectives.kto, POLICY, ref, labels=LABELS), towards * share * (1 - share))
    expected = towards * torch.where(LABELS, 1 - share, share)
    close(slope(objectives.bco, POLICY, ref, labels=LABELS), expected)


def test_a_batch_of_one():
    policy, ref, label = torch.tensor([-3.0]), torch.tensor([-8.0]), torch.tensor([True])
    # Its own mean is the reference point: no margin is left.
    close(objectives.kto(policy, ref, labels=label).losses, torch.tensor([0.5]))
    close(objectives.kto(ref, policy, labels=label).losses, torch.sigmoid(torch.tensor([0.5])))
    close(objectives.bco(policy, ref, labels=label).losses, torch.tensor([math.log(2)]), 1e-6)


def test_bco_takes_delta_and_weights():
    delta = torch.tensor(0.7, dtype=torch.float64)
    weights = torch.arange(12.0)
    losses = objectives.bco(POLICY, REF, labels=LABELS, delta=delta, sample_weights=weights).losses
    margins = 0.1 * (POLICY - REF) - 0.7
    close(losses, -weights * F.logsigmoid(torch.where(LABELS, margins, -margins)))


def test_bounded_losses_saturate_at_the_weights():
    policy, ref = torch.tensor([-1e4, 0, -1e4, 0]), torch.tensor([0, -1e4, 0, -1e4])
    labels = torch.tensor([True, True, False, False])
    weights = {"desirable_weight": 2.0, "undesirable_weight": 3.0}
    expected = torch.tensor([2.0, 0, 0, 3])
    for function, extras in [
        (objectives.kto, {"kl": torch.tensor(0.0)}),
        (objectives.apo_zero_unpaired, {}),
    ]:
        extras |= {"labels": labels} | weights
        close(function(policy, ref, **extras).losses, expected)
        assert (slope(function, policy, ref, **extras) == 0).all()


def test_apo_zero_is_kto_without_kl():
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    apo = objectives.apo_zero_unpaired(POLICY, REF, labels=LABELS, **weights)
    kto = objectives.kto(POLICY, REF, labels=LABELS, kl=torch.tensor(0.0), **weights)
    close(apo, kto)


def test_npo_becomes_gradient_ascent():
    beta = 1e-7
    losses = objectives.npo(POLICY, REF, beta=beta).losses - 2 * math.log(2) / beta
    close(losses, POLICY - REF, 1e-3)
    close(slope(objectives.npo, POLICY, REF, beta=beta), torch.ones_like(POLICY), 1e-4)


def test_simnpo_is_npo_of_mean_logps_under_a_uniform_reference():
    lengths = torch.arange(1, 13)
    result = objectives.simnpo(POLICY, lengths=lengths, beta=0.5)
    close(result, objectives.npo(POLICY / lengths, torch.zeros_like(REF), beta=0.5))


def test_simnpo_takes_an_empty_response_as_zero():
    lengths = torch.tensor([0] * 6 + [4] * 6)
    result = objectives.simnpo(POLICY, lengths=lengths, gamma=0.5)
    close(result.losses[:6], torch.full((6,), 0.8 * math.log1p(math.exp(0.5))).double(), 1e-6)
    assert (result.rewards[:6] == 0).all()
    assert (slope(objectives.simnpo, POLICY, lengths=lengths)[:6] == 0).all()


def test_ddo_where_policy_and_reference_agree():
    losses = objectives.ddo(POLICY, POLICY, labels=LABELS, alpha=4.0).losses
    close(losses, torch.where(LABELS, 1.0, 4.0).double() * math.log(2))


def test_ddo_takes_alpha_for_each_response():
    alpha = torch.linspace(0.5, 6, 12).double()
    losses = objectives.ddo(POLICY, REF, labels=LABELS, alpha=alpha).losses
    for row in range(12):
        each = objectives.ddo(POLICY, REF, labels=LABELS, alpha=alpha[row].item())
        close(losses[row], each.losses[row])
    configured = objectives.get("ddo", alpha=alpha)
    close(configured(POLICY, REF, labels=LABELS).losses, losses)


def test_labels_may_be_numbers():
    for name in ("kto", "bco", "apo_zero_unpaired", "ddo"):
        objective = objectives.get(name)
        expected = objective(POLICY, REF, labels=LABELS)
        assert torch.equal(objective(POLICY, REF, labels=LABELS.long()).losses, expected.losses)


def test_state_and_rows_are_told_apart():
    with pytest.raises(ValueError, match=r"kto: kl must be a 0-dim tensor, got \(12,\)"):
        objectives.kto(POLICY, REF, labels=LABELS, kl=REF)
    with pytest.raises(ValueError, match="bco: sample_weights must be shaped like the log-probs"):
        objectives.bco(POLICY, REF, labels=LABELS, sample_weights=torch.ones(()))


class Scored:
    """A model that TRL scores with: the log-probabilities of its completions are given."""

    training = True

    def __init__(self, logps):
        self.logps = logps

    def __call__(self, **_):
        zeros = torch.zeros_like(self.logps)
        return types.SimpleNamespace(log_probs=self.logps, entropy=zeros, mean_logits=zeros)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("drift", [-30.0, 30.0])
def test_agrees_with_trl(name, drift):
    kto_trainer = pytest.importorskip("trl.trainer.kto_trainer")
    tokens = (-5 * torch.rand(12, 6, dtype=torch.float64)).requires_grad_()
    mismatched, ref_mismatched = -40 * torch.rand(2, 12, dtype=torch.float64)
    mismatched = mismatched + drift
    model = Scored(tokens)
    settings = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=lambda value: value
        ),
        aux_loss_enabled=False,
        beta=0.2,
        calculate_KL=name == "kto",
        desirable_weight=1.3,
        loss_type=name,
        model=model,
        precompute_ref_logps=True,
        undesirable_weight=0.7,
        _compute_kl_logps=lambda model, batch: mismatched,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    batch = {
        "attention_mask": torch.ones(12, 7),
        "completion_mask": torch.ones(12, 7, dtype=torch.bool),
        "input_ids": torch.zeros(12, 7, dtype=torch.long),
        "label": LABELS,
        "ref_KL_logps": ref_mismatched,
        "ref_logps": REF,
    }
    theirs = kto_trainer.KTOTrainer._compute_loss(settings, model, batch, False)
    extras = {"labels": LABELS}
    if name == "kto":
        extras["kl"] = (mismatched - ref_mismatched).mean().clamp(min=0)
    ours = objectives.get(name, beta=0.2, desirable_weight=1.3, undesirable_weight=0.7)
    loss = ours(tokens.sum(-1), REF, **extras).losses.mean()
    close(loss, theirs)
    close(*(torch.autograd.grad(value, tokens)[0] for value in (loss, theirs)))


def loss_and_gradient(name, rows, group):
    """Of a linear policy on these rows of the batch, with gradients averaged over ranks."""
    parameter = torch.ones(1, dtype=torch.float64, requires_grad=True)
    objective = objectives.get(name, dp_group=group, **COUPLED[name])
    result = objective(parameter * POLICY[rows], REF[rows] - 30, labels=LABELS[rows])
    values = torch.cat(
        [result.losses.mean()[None], *torch.autograd.grad(result.losses.mean(), parameter)]
    )
    if group is not None:
        dist.all_reduce(values, group=group)
        values /= group.size()
    return values.detach()


def halves(rank):
    rows = slice(6 * rank, 6 * rank + 6)
    return {name: loss_and_gradient(name, rows, dist.group.WORLD) for name in COUPLED}


@pytest.mark.heavy
def test_two_ranks_are_one_batch(two_ranks):
    for found in two_ranks(halves):
        for name in COUPLED:
            close(found[name], loss_and_gradient(name, slice(None), None))


def test_ddo_checks_a_weight_for_each_response():
    logps, labels = torch.zeros(3), torch.tensor([True, False, True])
    with pytest.raises(ValueError, match="ddo: alpha must be > 0, got -1"):
        objectives.ddo(logps, logps, labels=labels, alpha=torch.tensor([1.0, -1.0, 2.0]))
