# SPDX-License-Identifier: Apache-2.0
"""preference_loss of predictions: any objective on log-ratios of float64, layouts, extras, metrics,
what the loss block of diffusers' script computes, and what it refuses."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fastpref
from fastpref import objectives
from fastpref.diffusion import errors as module
from fastpref.diffusion import log_ratio, preference_loss
from tests.diffusion import formulas
from tests.diffusion.cases import predictions
from tests.objectives.test_catalogue import plain_extras, ready

ROWS = {"pair": 8, "unit": 4, "list": 12}
SERVED = [ready(one) for one in objectives.registry.catalogue() if one.unit != "token"]


@pytest.mark.parametrize("objective", SERVED, ids=lambda one: one.name)
def test_any_objective(objective: objectives.Objective) -> None:
    """On z, with 0 for the reference, as the catalogue's own function; lengths given."""
    model, ref, target = predictions(ROWS[objective.unit], 3, 5)
    model.requires_grad_()
    extras = plain_extras(objective, torch.float64)
    layout: dict[str, Any] = {"layout": "units"}
    if objective.unit == "pair":
        layout = {"layout": "halves"}
    if objective.unit == "list":
        layout = {"layout": "groups", "group_size": 4}
    found = preference_loss(model, ref, target, objective, weight=40.0, extras=extras, **layout)
    exact = model.detach().clone().requires_grad_()
    z = 40.0 * (formulas.errors(ref, target) - formulas.errors(exact, target))
    rows = z.view(3, 4) if objective.unit == "list" else z
    given = rows.chunk(2) if objective.unit == "pair" else (rows,)
    if objective.needs_reference:
        given += tuple(torch.zeros_like(one) for one in given)
    want = objective(*given, **extras)
    torch.testing.assert_close(found.losses, want.losses, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.loss, want.losses.mean(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.logps, z, rtol=1e-9, atol=1e-10)
    rewards = torch.cat([one.flatten() for one in want[1:]])
    torch.testing.assert_close(found.rewards, rewards, rtol=1e-9, atol=1e-10)
    if objective.name != "sft":  # whose likelihood was given
        found.loss.backward()
        want.losses.mean().backward()
        torch.testing.assert_close(model.grad, exact.grad, rtol=1e-8, atol=1e-10)
    assert (found.ref_logps is None) is not objective.needs_reference


@pytest.mark.parametrize("objective", SERVED, ids=lambda one: one.name)
def test_what_text_alone_has_is_refused(objective: objectives.Objective) -> None:
    filled = {name for name, facts in objective.extras.items() if facts.filled and facts.required}
    if not filled:
        return
    extras = plain_extras(objective, torch.float64)
    given = {name: one for name, one in extras.items() if name not in filled}
    layout = {"layout": "groups", "group_size": 4} if objective.unit == "list" else {}
    predicted = predictions(ROWS[objective.unit], 3)
    with pytest.raises(ValueError, match=f"{objective.name} needs .*made of tokens"):
        preference_loss(*predicted, objective, extras=given, **layout)


def test_layouts() -> None:
    model, ref, target = predictions(6, 4, 5)
    halves = preference_loss(model, ref, target, "dpo", weight=100.0)
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    mixed = [one[order] for one in (model, ref, target)]
    interleaved = preference_loss(*mixed, "dpo", layout="interleaved", weight=100.0)
    torch.testing.assert_close(interleaved.losses, halves.losses)
    torch.testing.assert_close(interleaved.chosen_rewards, halves.chosen_rewards)
    pairs = torch.tensor([[0, 3], [2, 5]])
    chosen = preference_loss(model, ref, target, "dpo", layout=pairs, weight=100.0)
    torch.testing.assert_close(chosen.losses, halves.losses[[0, 2]])
    ranked = preference_loss(
        model,
        ref,
        target,
        "plackett_luce",
        layout="groups",
        group_size=3,
        extras={"scores": torch.rand(2, 3)},
    )
    assert ranked.losses.shape == (2,) and ranked.rewards.shape == (6,)


def test_a_pairwise_function_of_ones_own() -> None:
    model, ref, target = predictions(4, 7)

    def own(chosen: Tensor, rejected: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * (rejected - chosen)

    found = preference_loss(model, ref, target, own, scale=3.0)
    chosen, rejected = log_ratio(model, ref, target).chunk(2)
    torch.testing.assert_close(found.losses, 3 * (rejected - chosen))


def test_denominator() -> None:
    model, ref, target = predictions(8, 5)
    whole = preference_loss(model, ref, target, "dpo", weight=50.0, layout="interleaved")
    parts = [
        preference_loss(
            *(one[rows] for one in (model, ref, target)),
            "dpo",
            weight=50.0,
            layout="interleaved",
            denominator=4,
        ).loss
        for rows in (slice(0, 2), slice(2, 8))
    ]
    torch.testing.assert_close(sum(parts), whole.loss)


def test_hyperparameters_of_each_unit() -> None:
    model, ref, target = predictions(6, 5)
    beta = torch.tensor([10.0, 0.0, 300.0], requires_grad=True)
    found = preference_loss(model, ref, target, "dpo", beta=beta)
    want = formulas.diffusion_dpo(model, ref, target, beta=beta.detach().double(), half=1.0)
    torch.testing.assert_close(found.losses, want, rtol=1e-6, atol=1e-9)
    found.loss.backward()
    assert beta.grad[0] != 0
    alpha = torch.rand(6) + 0.5
    labels = torch.tensor([1, 0, 0, 1, 1, 0])
    given = {"labels": labels}
    found = preference_loss(model, ref, target, "ddo", extras=given, alpha=alpha, beta=9.0)
    z = 9.0 * log_ratio(model, ref, target)
    want = torch.where(labels == 1, F.softplus(-z), alpha.double() * F.softplus(z))
    torch.testing.assert_close(found.losses, want)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mask", [None, "spatial", "numbers"])
def test_metrics_are_mean_squared_errors(reduction: Any, mask: str | None) -> None:
    """Whatever the reduction of the log-ratio, and without a pass of their own."""
    model, ref, target = predictions(4, 3, 6, 10, dtype=torch.float32)
    kept = None if mask is None else torch.rand(4, 1, 6, 10) < 0.5
    if mask == "numbers":
        kept = torch.arange(4)[:, None, None, None]  # nothing is left of the first sample
    passes: list[int] = []
    reduced = module._reduced

    def counted(*given: Any) -> Any:
        passes.append(1)
        return reduced(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_reduced", counted)
        found = preference_loss(
            model.requires_grad_(), ref, target, "dpo", reduction=reduction, mask=kept
        )
    assert len(passes) == 1
    for name, pred in (("loss/model", model), ("loss/reference", ref)):
        own = formulas.errors(pred, target, kept).nan_to_num() if kept is not None else None
        want = formulas.errors(pred, target).mean() if own is None else own.mean()
        torch.testing.assert_close(found.metrics[name].double(), want.detach())
        assert not found.metrics[name].requires_grad and found.metrics[name].dim() == 0
    assert {"rewards/chosen", "rewards/accuracies", "logps/rejected"} <= set(found.metrics)


def test_loss_block_of_diffusers() -> None:
    """Its script for SDXL: loss, the three values that it logs, and the gradient."""
    beta, rows = 5000.0, (8, 4, 6, 6)
    model, ref, target = predictions(*rows, dtype=torch.float32)
    model.requires_grad_()

    def block(model: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        of_model = F.mse_loss(model, target, reduction="none").mean((1, 2, 3))
        of_ref = F.mse_loss(ref, target, reduction="none").mean((1, 2, 3))
        gap = of_model - of_ref
        inside = -0.5 * beta * (gap[:4] - gap[4:])
        logged = {
            "raw_model_loss": of_model.mean(),
            "raw_ref_loss": of_ref.mean(),
            "implicit_acc": (inside > 0).double().mean(),
        }
        return -F.logsigmoid(inside).mean(), logged

    found = preference_loss(model, ref, target, "dpo", beta=beta, weight=0.5)
    leaf = model.detach().double().requires_grad_()
    loss, logged = block(leaf)
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-4, atol=1e-5)
    for ours, theirs in (
        ("loss/model", "raw_model_loss"),
        ("loss/reference", "raw_ref_loss"),
        ("rewards/accuracies", "implicit_acc"),
    ):
        torch.testing.assert_close(
            found.metrics[ours].double(), logged[theirs].double(), rtol=1e-6, atol=1e-7
        )
    found.loss.backward()
    loss.backward()
    torch.testing.assert_close(model.grad.double(), leaf.grad, rtol=1e-3, atol=1e-6)


def test_no_rows() -> None:
    empty = torch.zeros(0, 3, requires_grad=True)
    found = preference_loss(empty, empty, empty, "dpo")
    found.loss.backward()
    assert found.loss == 0 and found.metrics["loss/model"] == 0


@pytest.mark.heavy
def test_compile() -> None:
    def losses(model: Tensor, ref: Tensor, target: Tensor, beta: Tensor) -> Tensor:
        output = preference_loss(model, ref, target, "dpo", weight=0.5, beta=beta)
        return output.loss + output.metrics["loss/model"]

    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    model, ref, target = predictions(4, 3, 8, dtype=torch.float32)
    leaves = model.requires_grad_(), torch.tensor([900.0, 20.0], requires_grad=True)
    expected, found = (one(model, ref, target, leaves[1]) for one in (losses, compiled))
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(one, leaves) for one in (found, expected))
    torch.testing.assert_close(ours, theirs)


def rank_losses(rank: int, given: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    own = slice(0, 2) if rank == 0 else slice(2, 6)
    model, ref, target = (one[own] for one in given)
    model.requires_grad_()
    found = preference_loss(
        model,
        ref,
        target,
        "kto",
        beta=30.0,
        layout="units",
        extras={"labels": labels[own]},
        denominator=6,
        dp_group=dist.group.WORLD,
    )
    found.loss.backward()
    return found.loss.detach(), model.grad


@pytest.mark.heavy
def test_two_ranks(two_ranks: Any) -> None:
    """The mean log-ratio that KTO shifts by is that of both."""
    _, ref, target = predictions(6, 5)
    better = target + 0.9 * (ref - target)  # or the shift is 0
    labels = torch.tensor([True, False, True, True, False, False])
    (first, of_first), (second, of_second) = two_ranks(
        rank_losses, [better.clone(), ref, target], labels
    )
    better.requires_grad_()
    want = formulas.diffusion_kto(better, ref, target, beta=30.0, labels=labels).mean()
    want.backward()
    torch.testing.assert_close(first + second, want.detach())
    torch.testing.assert_close(torch.cat((of_first, of_second)), better.grad)


def test_imports_no_scoring() -> None:
    """Nor what stands on it."""
    package = Path(fastpref.__file__).parent
    rooms = {one.name for one in package.iterdir() if one.is_dir()}
    allowed = {"objectives", "units", "kernels", "diffusion"}
    for path in (package / "diffusion").rglob("*.py"):
        above = len(path.relative_to(package).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == above:
                names = [node.module] if node.module else [one.name for one in node.names]
                found = {name.split(".")[0] for name in names} & rooms
                assert found <= allowed, path


ONE = torch.ones(4, 3)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"target": ONE[:, :2]}, ValueError, "target must be shaped like model_pred"),
    ({"ref_pred": ONE.int()}, ValueError, "ref_pred must be float16"),
    ({"weight": torch.ones(3)}, ValueError, r"weight.*\(4,\), one a sample, got shape \(3,\)"),
    ({"weight": -1}, ValueError, "weight must be finite and not negative"),
    ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum'"),
    ({"mask": torch.ones(2)}, ValueError, "mask must broadcast"),
    ({"objective": "dop"}, ValueError, "no objective is called 'dop'; perhaps dpo"),
    ({"objective": 3}, TypeError, "objective must be a name"),
    ({"objective": "simpo"}, ValueError, "simpo needs chosen_lengths and rejected_lengths.*tokens"),
    ({"objective": "simnpo"}, ValueError, "simnpo needs lengths, which are made of tokens"),
    ({"objective": "ipo"}, ValueError, "ipo needs chosen_lengths.*pass normalize='sum'"),
    ({"objective": "cpo"}, ValueError, "a per-token mean needs the number of scored tokens"),
    ({"objective": "tdpo"}, ValueError, "tdpo needs chosen_kl and rejected_kl"),
    ({"objective": "grpo"}, ValueError, "grpo works on tokens.*step_log_prob"),
    ({"objective": "kto"}, ValueError, r"kto needs extras={'labels': ...}"),
    ({"objective": "rank_dpo"}, ValueError, "rank_dpo compares lists: pass layout='groups'"),
    (
        {"objective": "rank_dpo", "layout": "groups", "group_size": 1},
        ValueError,
        "group_size must be at least 2, got 1: rank_dpo",
    ),
    ({"layout": "thirds"}, ValueError, "layout must be.*got 'thirds'"),
    ({"layout": torch.tensor([[0, 4]])}, ValueError, "layout must name rows from 0 to 3"),
    ({"extras": [1]}, TypeError, "extras must map names to tensors, got list"),
    ({"denominator": 0}, ValueError, "denominator must be positive"),
    ({"dp_group": 0}, TypeError, "dp_group must be a torch.distributed.ProcessGroup or None"),
    ({"beta": 0}, ValueError, "dpo: beta must be > 0"),
    (
        {"beta": torch.ones(4)},
        ValueError,
        r"dpo: beta must be a number or one value a unit, \(2,\)",
    ),
    ({"betta": 1.0}, TypeError, "betta; .*did you mean 'beta'"),
]


@pytest.mark.parametrize("given, error, message", BAD, ids=[one[2][:40] for one in BAD])
def test_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"model_pred": ONE, "ref_pred": ONE, "target": ONE, "objective": "dpo"} | given
    with pytest.raises(error, match=message):
        preference_loss(**arguments)


def test_an_odd_number_of_rows() -> None:
    with pytest.raises(ValueError, match="an even number of rows, got 3"):
        preference_loss(ONE[:3], ONE[:3], ONE[:3], "dpo")


def test_ipo_of_sums() -> None:
    model, ref, target = predictions(4, 5)
    found = preference_loss(model, ref, target, "ipo", normalize="sum", beta=2.0)
    chosen, rejected = log_ratio(model, ref, target).chunk(2)
    torch.testing.assert_close(found.losses, (chosen - rejected - 0.25).square())
