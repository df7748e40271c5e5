# SPDX-License-Identifier: Apache-2.0
"""Batches of an objective whose gradient has a direction that is known before the scores: one
matrix kept of a row, groups in pieces, heads that are frozen."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import ScoringOptions, explain, objectives, preference_loss
from fastpref.scoring import batches, scaled
from tests.preference import plain_pairs
from tests.preference.cases import LAYOUTS, B, Data, H, T, V, compare, run, run_packed
from tests.preference.two_models import MAPS, pieces_of, reference_losses
from tests.scoring.cases import check_contract

ROW = V * 8  # bytes of a row of logits in float64
PIECE = 3  # rows
BUDGETS = {"all": None, "some pairs": 30 * ROW, "half a pair": 8 * ROW, "nothing": 1}
OBJECTIVES = {
    "version 1": {"version": 1},
    "version 2": {"version": 2},
    "more by the divergence": {"alpha": 4.0},
    "not by the divergence": {"alpha": 0.0},
    "saturated": {"beta": 40.0},
}


@pytest.fixture(autouse=True)
def pieces() -> Iterator[None]:
    with pieces_of(PIECE):
        yield


def batches_of(budget: str) -> ScoringOptions:
    return ScoringOptions(schedule="batches", memory_budget=BUDGETS[budget])


def data_of(needs: tuple[str, ...]) -> Data:
    data = Data()
    for name in ("hidden", "weight", "bias", "token_weights"):
        getattr(data, name).requires_grad_(name in needs)
    return data


def plan_of(data: Data, objective: Any = "tdpo", **changes: Any) -> Any:
    reference = {"ref_hidden": data.ref_hidden, "ref_weight": data.ref_weight}
    arguments = data.hidden, data.weight, data.target, objective
    return explain(*arguments, **({"bias": data.bias} | reference | changes)).policy


NEEDS = [("hidden", "weight", "bias"), ("hidden",), ("weight",), ("bias",), ("hidden", "bias")]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_as_whole_distributions(name: str) -> None:
    objective = objectives.get("tdpo", **OBJECTIVES[name])
    for needs in NEEDS:
        for budget in BUDGETS:
            data = data_of(needs)
            losses = reference_losses(objective, data, {}, False)
            compare(data, losses, run(objective, data, options=batches_of(budget)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("map", MAPS)
def test_maps_and_weights(map: str, weighted: bool) -> None:
    objective, data = objectives.get("tdpo"), data_of(NEEDS[0])
    changes: dict[str, Any] = dict(MAPS[map])
    if weighted:
        data.token_weights[data.token_weights < 0.3] = 0
        changes["token_weights"] = data.token_weights
    for budget in BUDGETS:
        losses = reference_losses(objective, data, MAPS[map], weighted)
        compare(data, losses, run(objective, data, options=batches_of(budget), **changes))


def alike(data: Data, budget: str, call: Any = run, **given: Any) -> None:
    """In two passes that keep both matrices of a row, for an upstream gradient at logps too."""
    leaves = [one for one in (data.hidden, data.weight, data.bias) if one.requires_grad]
    leaves += [one for one in given.get("lora", ()) if isinstance(one, Tensor)]
    objective, found = given.pop("objective", objectives.get("tdpo")), []
    for options in (batches_of(budget), ScoringOptions(schedule="keep")):
        output = call(objective, data, options=options, **given)
        alone = torch.autograd.grad(output.loss, leaves, retain_graph=True)
        both = torch.autograd.grad(1.3 * output.loss + output.logps.sum(), leaves)
        found.append([output.losses, *alone, *both])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


CALLS: dict[str, dict[str, Any]] = {
    "a weight of 0": {"objective": objectives.get("tdpo", beta=torch.tensor([0.1, 0, 2, 0.3]))},
    "weighted pairs": {"objective": objectives.wpo("tdpo")},
    "beside others": {"objective": objectives.combine(["tdpo", "sft"], [1.0, 0.3])},
    "temperatures": {"temperature": torch.linspace(0.4, 1.8, B * T).view(B, T)},
    "interleaved": {"layout": "interleaved"},
    "index": {"layout": LAYOUTS["index"][0]},
    "shared rows": {"layout": torch.tensor([[0, 4], [4, 1], [0, 2], [3, 6]])},
    "packed": {"call": run_packed},
    "sum": {"reduction": "sum"},
    "accumulated": {"denominator": 3.0},
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    for budget in BUDGETS:
        alike(data_of(NEEDS[0]), budget, **CALLS[name])


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_low_rank_update(budget: str) -> None:
    data = data_of(("hidden",))
    a, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, H), (V, 3)))
    alike(data, budget, lora=(a.requires_grad_(), b.requires_grad_(), 0.3))


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_projected_gradient(budget: str) -> None:
    found, columns = [], torch.linalg.qr(torch.randn(H, 4, dtype=torch.float64))[0]
    for options in (batches_of(budget), ScoringOptions(schedule="keep")):
        data, out = data_of(("hidden",)), torch.zeros(V, 4, dtype=torch.float32)
        given = {"options": options, "weight_grad_basis": (columns, out)}
        (2 * run(objectives.get("tdpo"), data, **given).loss).backward()
        found.append([data.hidden.grad, out])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("upstream", [1.0, -3.7])
@pytest.mark.parametrize("rows", [None, 50, 1])
def test_error(rows: int | None, upstream: float, dtype: torch.dtype) -> None:
    """A pair has 29 rows or so. Products of fewer than 16 rows have errors of their own."""
    given = plain_pairs.batch(dtype)
    exact = {name: one.double() if one.is_floating_point() else one for name, one in given.items()}
    for one in (given, exact):
        one["hidden"].requires_grad_()
        one["weight"].requires_grad_()
    budget = None if rows is None else rows * plain_pairs.V * dtype.itemsize
    options = ScoringOptions(schedule="batches", memory_budget=budget)
    with pieces_of(16):
        output = preference_loss(**given, objective="tdpo", options=options)
    check_contract(
        plain_pairs.found(output.loss, output.logps, given, upstream),
        plain_pairs.found(*plain_pairs.plain(given, "tdpo"), given, upstream),
        plain_pairs.found(*plain_pairs.plain(exact, "tdpo"), exact, upstream),
    )


def test_memory_that_runs_out_between_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(NEEDS[0])
    losses = reference_losses(objectives.get("tdpo"), data, {}, False)
    calls, own = [], batches.forward

    def forward(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return own(*arguments)

    monkeypatch.setattr(batches, "forward", forward)
    compare(data, losses, run(objectives.get("tdpo"), data, options=batches_of("nothing")))
    assert len(calls) == 2


def test_the_plan() -> None:
    data = data_of(NEEDS[0])
    scored = data.scored.sum(1)
    pairs = (scored[:4] + scored[4:]).tolist()
    for budget in BUDGETS:
        plan = plan_of(data, options=batches_of(budget))
        found = [sum(one.scored for one in pieces) for pieces in plan.batches]
        assert {one.schedule for one in plan.plans} == {"keep"}
        assert all(one.kept_row_bytes == ROW for one in plan.plans)
        assert sum(found) == sum(pairs)
        assert set(torch.tensor(found).cumsum(0).tolist()) <= set(
            torch.tensor(pairs).cumsum(0).tolist()
        )
        assert plan.in_pieces == (budget in ("half a pair", "nothing"))
    assert found == pairs and all(one.scored <= PIECE for pieces in plan.batches for one in pieces)
    assert plan.largest.temporary_bytes >= scaled.temporary_bytes(torch.float64)
    # Of a group sums of its own lie beside those of all.
    held = V * H * 8 + V * 8
    assert plan.saved_bytes == scored.sum() * (H + 1) * 8 + held
    assert plan.workspace_bytes == plan.saved_bytes + held + plan.largest.workspace_bytes


def test_where_there_is_no_direction() -> None:
    data = data_of(NEEDS[0])
    undirected = (
        {"objective": objectives.combine(["tdpo", "sft"], [1.0, 0.3])},
        {"layout": torch.tensor([[0, 4], [4, 1], [0, 2], [3, 6]])},
    )
    for given in undirected:
        plan = plan_of(data, options=batches_of("nothing"), **given)
        assert not plan.in_pieces and plan.largest.kept_row_bytes == 2 * ROW
    assert plan_of(data, objectives.wpo("tdpo"), options=batches_of("nothing")).in_pieces


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_frozen_head_keeps_no_matrix(budget: str) -> None:
    plan = plan_of(data_of(("hidden",)), options=batches_of(budget))
    assert [one.schedule for one in plan.plans] == ["direct"]
