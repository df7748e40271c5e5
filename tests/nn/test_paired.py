# SPDX-License-Identifier: Apache-2.0
"""The likelihood term inside the losses: one pass where the engine takes one, and the same
numbers."""

import pytest
import torch

from fastpref import ScoringOptions, explain, objectives
from fastpref.nn import FusedLinearCPOLoss, FusedLinearDPOLoss, FusedLinearSimPOLoss, paired
from tests.nn.peers import close, gradients, leaves, tensors

MODULES = {
    "dpo": FusedLinearDPOLoss(compute_nll_loss=True, alpha=0.6),
    "dpo of means": FusedLinearDPOLoss(compute_nll_loss=True, average_log_prob=True),
    "cpo": FusedLinearCPOLoss(alpha=0.6),
    "simpo": FusedLinearSimPOLoss(),
}


@pytest.mark.parametrize("case", MODULES)
def test_batches_in_one_pass(case, monkeypatch):
    module, plans = MODULES[case], []
    names = ("_input", "lin_weight", "target", "bias")
    given = leaves(tensors())
    if not case.startswith("dpo"):
        given = {name: given[name] for name in names}
    expected, returned = module(**given)
    expected = expected, returned, gradients(expected, given)
    whole = paired.preference_loss

    def in_batches(*args, **keywords):
        options = ScoringOptions(schedule="batches", memory_budget=1)
        plans.append(explain(*args, **keywords, options=options).policy)
        return whole(*args, **keywords, options=options)

    monkeypatch.setattr(paired, "preference_loss", in_batches)
    loss, returned = module(**given)
    close((loss, returned, gradients(loss, given)), expected, 1e-9)
    assert plans[0].schedule == "batches" and len(plans[0].plans) > 1


def test_an_objective_with_its_likelihood_is_one():
    objective, plain = paired._WITH_LIKELIHOOD["dpo"], objectives.get("dpo")
    assert objective.name == "dpo" and objective.needs_reference
    sharper = objective.replace(beta=0.3)
    assert sharper.hyperparameters == plain.replace(beta=0.3).hyperparameters
    logps = -torch.rand(4, 3).double()
    lengths = (tensors()["target"] != -100).sum(-1)
    shares = FusedLinearDPOLoss()._shares(lengths, averages=False)
    lengths = lengths[:3]
    for whole, beta in ((objective, 0.1), (sharper, 0.3)):
        without = plain.replace(beta=beta)(*logps).losses
        losses = whole(*logps, likelihood_shares=shares).losses
        close(losses - without, -3 * logps[0] / lengths.sum(), 1e-9)
