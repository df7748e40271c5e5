# SPDX-License-Identifier: Apache-2.0
"""Every objective of pairs, responses and lists under ``seq_group``, whose rows are spread over two
ranks in one piece each, in ring attention's zigzag, or wholly on one of them, against one process:
losses, rewards and sums, and the gradients of what each rank holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.objectives import registry
from tests.preference.cases import Data, T, configured, extras_of, run
from tests.ranks import Ranks

pytestmark = pytest.mark.heavy

FORMS: dict[str, list[list[int]]] = {
    "contiguous": [[0, 1, 2, 3], [4, 5, 6]],
    "zigzag": [[0, 1, 6], [2, 3, 4, 5]],
    "none on the first": [[], list(range(T))],
}
DECLARED = {one.name: one for one in registry.catalogue() if one.unit != "token"}
OF_TOKENS = ("hidden", "target", "scored", "ref_hidden", "token_weights")


def loss_and_gradients(
    name: str, extras: dict[str, Tensor], positions: list[int], **changes: Any
) -> dict[str, Tensor]:
    objective, data = configured(DECLARED[name]), Data()
    for one in OF_TOKENS:
        own = getattr(data, one).detach()[:, positions].clone()
        setattr(data, one, own.requires_grad_(one == "hidden"))
    if objective.unit == "list":
        changes |= {"layout": "groups", "group_size": 4}
    output = run(objective, data, extras=extras, **changes)
    leaves = data.hidden, data.weight, data.bias
    gradients = torch.autograd.grad(output.loss, leaves, allow_unused=True, materialize_grads=True)
    found = {"loss": output.loss, "losses": output.losses, "rewards": output.rewards}
    found = {key: one.detach() for key, one in (found | {"logps": output.logps}).items()}
    return found | dict(zip(("d hidden", "d weight", "d bias"), gradients, strict=True))


def on_a_rank(
    rank: int, form: str, extras: dict[str, dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    group, positions = dist.group.WORLD, FORMS[form][rank]
    return {
        name: loss_and_gradients(name, given, positions, seq_group=group)
        for name, given in extras.items()
    }


@pytest.mark.parametrize(
    "form",
    [one if one == "zigzag" else pytest.param(one, marks=pytest.mark.slow) for one in FORMS],
)
def test_every_objective_as_one_process(form: str, two_ranks: Ranks) -> None:
    extras = {name: extras_of(one) for name, one in DECLARED.items()}
    assert len(extras) > 50
    ranks = two_ranks(on_a_rank, form, extras)
    order = [at for part in FORMS[form] for at in part]
    for name, given in extras.items():
        whole = loss_and_gradients(name, given, list(range(T)))
        assert whole["d weight"].abs().max() > 1e-8, name  # simnpo is saturated
        for key, want in whole.items():
            found = [one[name][key] for one in ranks]
            if key == "d hidden":
                want, found = want[:, order], [torch.cat(found, 1)]
            elif key.startswith("d "):
                found = [found[0] + found[1]]
            least = 1e-10 * float(want.abs().max())
            for got in found:
                torch.testing.assert_close(
                    got, want, rtol=1e-9, atol=least, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
                )
