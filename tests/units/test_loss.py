# SPDX-License-Identifier: Apache-2.0
"""Numbers to losses without a head: what no scoring has made."""

import ast
from pathlib import Path

import pytest
import torch

import fastpref
from fastpref import objectives
from fastpref.units import Numbers, TokenNumbers, unit_loss
from fastpref.units.layouts import arrange

B = 6
PACKAGE = Path(fastpref.__file__).parent


def loss_of(name: str, numbers: Numbers, extras=None, **arguments):
    objective = objectives.get(name)
    layout = ("groups", 3) if objective.unit == "list" else ("halves", None)
    arrangement = arrange(*layout, B, objective)
    return unit_loss(objective, numbers, arrangement, extras=extras or {}, **arguments)


def imported(path: Path) -> set[Path]:
    """Modules of the package that a file of it imports, and the packages around them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(one.name.startswith("fastpref") for one in node.names), path
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        origin = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for one in (origin, *(origin / alias.name for alias in node.names)):
            found |= {one.with_suffix(".py"), one / "__init__.py", one.parent / "__init__.py"}
    return {one for one in found if one.exists() and one != PACKAGE / "__init__.py"}


def test_knows_no_head() -> None:
    """Nothing that it imports, at any remove, is of scoring, of the sequences or above."""
    reached = set()
    waiting = set((PACKAGE / "units").glob("*.py"))
    while waiting:
        path = waiting.pop()
        reached.add(path)
        waiting |= imported(path) - reached
    rooms = {one.relative_to(PACKAGE).parts[0] for one in reached}
    assert rooms == {"units", "objectives", "_extension.py"}


def test_log_ratios_of_ones_own() -> None:
    """As of denoising errors: log-ratios, and a reference of zeros."""
    ratios = torch.randn(B, dtype=torch.float64, requires_grad=True)
    numbers = Numbers(logps=ratios, ref_logps=torch.zeros_like(ratios))
    output = loss_of("dpo", numbers)
    want = torch.nn.functional.softplus(-0.1 * (ratios[:3] - ratios[3:]))
    torch.testing.assert_close(output.losses, want.detach())
    assert torch.equal(output.loss, output.losses.mean())
    torch.testing.assert_close(output.rewards, 0.1 * ratios.detach())
    assert torch.equal(output.rejected_logps, ratios[3:]) and output.logps is ratios
    got, wanted = (torch.autograd.grad(one, ratios)[0] for one in (output.loss, want.mean()))
    torch.testing.assert_close(got, wanted)
    ranked = loss_of("plackett_luce", numbers, extras={"scores": torch.rand(2, 3)})
    assert ranked.losses.shape == (2,) and ranked.rewards.shape == (B,)


def test_reduction_and_denominator() -> None:
    numbers = Numbers(logps=torch.randn(B), ref_logps=torch.zeros(B))
    extras = dict.fromkeys(("chosen_lengths", "rejected_lengths"), torch.ones(3))
    each = loss_of("ipo", numbers, extras=extras)
    for changes, want in (
        ({"reduction": "none"}, each.losses),
        ({"reduction": "sum"}, each.losses.sum()),
        ({"denominator": 7}, each.losses.sum() / 7),
    ):
        assert torch.equal(loss_of("ipo", numbers, extras=extras, **changes).loss, want)


def test_lengths_are_asked_for_where_an_objective_takes_them() -> None:
    asked = []

    def lengths():
        asked.append(None)
        return torch.arange(1, B + 1)

    numbers = Numbers(logps=-torch.rand(B, dtype=torch.float64), lengths=lengths)
    means = numbers.logps / torch.arange(1, B + 1)
    got = loss_of("simpo", numbers)
    sides = objectives.get("simpo")(
        numbers.logps[:3],
        numbers.logps[3:],
        chosen_lengths=torch.arange(1, 4),
        rejected_lengths=torch.arange(4, 7),
    )
    assert torch.equal(got.losses, sides.losses) and len(asked) == 1
    nll = loss_of("sft", numbers)
    torch.testing.assert_close(nll.losses, -means[:3])
    asked.clear()
    loss_of("dpo", Numbers(logps=numbers.logps, ref_logps=torch.zeros(B), lengths=lengths))
    assert not asked


def test_without_tokens_lengths_are_missing() -> None:
    numbers = Numbers(logps=torch.randn(B))
    with pytest.raises(ValueError, match=r"simpo needs extras={'chosen_lengths': ...}, a \(P,\) t"):
        loss_of("simpo", numbers)
    with pytest.raises(ValueError, match="grpo works on tokens, and these are numbers of whole"):
        loss_of("grpo", numbers, extras={"advantages": torch.ones(B), "mask": torch.ones(B, 2)})


def test_extras_that_are_made_elsewhere() -> None:
    made = []

    def divergences():
        made.append(None)
        return torch.full((3,), 0.5), torch.full((3,), 0.25)

    numbers = Numbers(
        logps=torch.randn(B),
        ref_logps=torch.zeros(B),
        makers={("chosen_kl", "rejected_kl"): divergences},
    )
    names = ("chosen_kl", "rejected_kl")
    got = loss_of("tdpo", numbers)
    given = dict(zip(names, divergences(), strict=True))
    assert torch.equal(got.losses, loss_of("tdpo", numbers, extras=given).losses)
    assert len(made) == 2  # once by itself, once here
    one = loss_of("tdpo", numbers, extras={"chosen_kl": torch.zeros(3)})
    want = loss_of("tdpo", numbers, extras=given | {"chosen_kl": torch.zeros(3)})
    assert torch.equal(one.losses, want.losses)
    loss_of("dpo", numbers)
    assert len(made) == 3


def test_tokens() -> None:
    scored = torch.arange(4) < torch.tensor([4, 3, 2, 1, 4, 2])[:, None]
    logp, ref = (torch.where(scored, -torch.rand(B, 4), 0) for _ in range(2))
    numbers = Numbers(
        logps=logp.sum(1),
        ref_logps=ref.sum(1),
        lengths=lambda: scored.sum(1),
        tokens=TokenNumbers(logp, ref, scored),
    )
    extras = {"advantages": torch.randn(B)}
    got = loss_of("grpo", numbers, extras=extras)
    want = objectives.get("grpo")(logp, mask=scored, ref_token_logp=ref, **extras)
    assert torch.equal(got.losses, want.losses)
    torch.testing.assert_close(got.metrics["kl"], want.kl.sum() / scored.sum())
    torch.testing.assert_close(got.rewards, (logp - ref).sum(1))
