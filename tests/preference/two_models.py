# SPDX-License-Identifier: Apache-2.0
"""What compares whole distributions of two models, in plain torch, and groups of a few rows in
pieces."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from fastpref.scoring import batches
from fastpref.scoring import plan as schedule
from tests.preference.cases import Data, halves

MAPS = {"plain": {}, "capped": {"softcap": 4.0, "temperature": 1.3, "logit_scale": 0.7}}


def logits(data: Data, policy: bool, map) -> Tensor:
    hidden, weight, bias = (
        (data.hidden, data.weight, data.bias)
        if policy
        else (data.ref_hidden, data.ref_weight, data.ref_bias)
    )
    z = torch.where(data.scored[..., None], hidden, 0) @ weight.t() + bias
    z = z * map.get("logit_scale", 1)
    if map:
        z = map["softcap"] * torch.tanh(z / map["softcap"]) / map["temperature"]
    return z


def gathered(values: Tensor, data: Data) -> Tensor:
    own = values.log_softmax(-1).gather(-1, data.target.clamp(min=0)[..., None])[..., 0]
    return torch.where(data.scored, own, 0)


def sums(values: Tensor, data: Data, weighted: bool) -> Tensor:
    return (values * data.token_weights if weighted else values).sum(1)


def reference_losses(objective, data: Data, map, weighted: bool) -> Tensor:
    policy, reference = logits(data, True, map), logits(data, False, map)
    rows = [sums(gathered(one, data), data, weighted) for one in (policy, reference)]
    if objective.name == "tdpo":
        log_q, log_p = policy.log_softmax(-1), reference.log_softmax(-1)
        kl = torch.where(data.scored, (log_p.exp() * (log_p - log_q)).sum(-1), 0)
        chosen, rejected = halves(sums(kl, data, weighted))
        extras = {"chosen_kl": chosen, "rejected_kl": rejected}
    else:
        epsilon = objective.hyperparameters["epsilon"]
        extras = {}
        for name, sign in (("margin_plus", 1), ("margin_minus", -1)):
            mixed = policy + sign * epsilon * (policy - reference)
            chosen, rejected = halves(sums(gathered(mixed, data), data, weighted))
            extras[name] = chosen - rejected
    return objective(*(side for row in rows for side in halves(row)), **extras).losses


@contextlib.contextmanager
def pieces_of(rows: int) -> Iterator[None]:
    """Within it no batch of directed rows is too small, and tiles of two rows are."""
    with (
        mock.patch.object(batches, "LEAST_ROWS", rows),
        mock.patch.object(batches, "ACCUMULATION_ROWS", {}),
        mock.patch.object(schedule, "LEAST_ROWS", 2),
    ):
        yield
