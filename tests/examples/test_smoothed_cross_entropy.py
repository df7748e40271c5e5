# SPDX-License-Identifier: Apache-2.0
"""The example's losses against ``F.cross_entropy`` of whole logits, to the error contract."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastpref import ScoringOptions
from tests.examples.loading import FOLDER, load
from tests.scoring.cases import DTYPES, check_contract, make_case

SMOOTHING = 0.1


@pytest.fixture(scope="module")
def example():
    return load("smoothed_cross_entropy")


def plain_losses(hidden, weight, target, *, bias, z_loss):
    exact = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden @ weight.T).to(exact) + bias
    losses = F.cross_entropy(logits, target, label_smoothing=SMOOTHING, reduction="none")
    return losses + z_loss * logits.logsumexp(-1).square() * (target >= 0)


def results(losses_of, case, dtype, **arguments):
    """Losses of tokens, and gradients of their mean."""
    leaves = [one.to(dtype) for one in (case.hidden, case.weight, case.bias)]
    hidden, weight, bias = leaves = [one.detach().clone().requires_grad_() for one in leaves]
    losses = losses_of(hidden, weight, case.target, bias=bias, **arguments)
    gradients = torch.autograd.grad(losses.sum() / case.scored.sum(), leaves)
    named = zip(("d hidden", "d weight", "d bias"), gradients, strict=True)
    return {"losses": losses.detach(), **dict(named)}


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", ["auto", "recompute"])
def test_as_plain_torch(example, schedule, dtype, z_loss):
    # Of fewer numbers the largest error is a matter of luck, and of the processor's products.
    case = make_case(600, 32, dtype=dtype, bias=True, ignored=0.3)
    eager, exact = (
        results(plain_losses, case, one, z_loss=z_loss) for one in (dtype, torch.float64)
    )
    options = ScoringOptions(schedule=schedule)
    given = {"label_smoothing": SMOOTHING, "z_loss": z_loss, "options": options}
    check_contract(results(example.smoothed_losses, case, dtype, **given), eager, exact)


@pytest.mark.heavy
def test_it_runs():
    done = subprocess.run(
        [sys.executable, str(FOLDER / "smoothed_cross_entropy.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours, torchs = (part.split()[-1] for part in done.stdout.strip().split(","))
    assert float(ours) == pytest.approx(float(torchs), rel=1e-5)
