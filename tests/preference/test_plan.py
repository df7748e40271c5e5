# SPDX-License-Identifier: Apache-2.0
"""One pass in batches of whole groups: the same numbers as two passes, its cost, and when it is
chosen."""

import pytest
import torch
from torch import Tensor

from fastpref import ScoringOptions, explain, linear_logprob, objectives, preference_loss
from fastpref.objectives import registry
from fastpref.preference import plan as planning
from fastpref.scoring import batches
from tests.preference.cases import (
    LAYOUTS,
    SPLITS,
    B,
    Data,
    H,
    T,
    V,
    by_hand,
    compare,
    configured,
    extras_of,
    run,
    run_packed,
    token_logp,
)
from tests.scoring.operations import Operations

ROW = V * 8  # bytes of a row of exponentials in float64
SEVERAL = ScoringOptions(schedule="batches", memory_budget=2 * T * ROW * 4 // 3)  # two rows of T
TINY = ScoringOptions(schedule="batches", memory_budget=ROW)  # less than any group
SEPARABLE = [
    one
    for one in registry.catalogue()
    if one.scope in ("unit", "pair", "list") and one.name != "tdpo"
]


def frozen_weights(data: Data) -> Data:
    data.token_weights.requires_grad_(False)
    return data


@pytest.mark.parametrize("options", [SEVERAL, TINY], ids=["several", "tiny"])
@pytest.mark.parametrize("declared", SEPARABLE, ids=lambda one: one.name)
def test_every_separable_objective_as_by_hand(declared, options) -> None:
    objective, data, extras = configured(declared), frozen_weights(Data()), extras_of(declared)
    if declared.name == "mallows_po":
        extras["ref_entropy"] = 0.1 + 0.8 * torch.rand(4).double()
    grouped = {"layout": "groups", "group_size": 4} if declared.unit == "list" else {}
    losses = by_hand(objective, data, SPLITS[declared.unit], extras)
    compare(data, losses, run(objective, data, extras=extras, options=options, **grouped))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_layouts(layout, packed, weighted, name) -> None:
    objective, data = objectives.get(name), frozen_weights(Data())
    given, split = LAYOUTS[layout]
    losses = by_hand(objective, data, split, {}, weighted)
    changes = {"layout": given, "options": SEVERAL}
    if weighted:
        changes["token_weights"] = data.token_weights
    compare(data, losses, (run_packed if packed else run)(objective, data, **changes))


# Rows 0, 1 and 4 are connected, 2 and 6 as well as 7 and 3; 5, without tokens, is in no pair.
SHARED = torch.tensor([[0, 4], [7, 3], [1, 4], [6, 2], [0, 1]])


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_rows_that_several_pairs_share(name) -> None:
    objective, data = objectives.get(name), frozen_weights(Data())
    chosen, rejected = SHARED.t()
    for options in (SEVERAL, TINY):
        losses = by_hand(objective, data, lambda rows: (rows[chosen], rows[rejected]), {})
        compare(data, losses, run(objective, data, layout=SHARED, options=options))
    scored = data.scored.sum(1)
    groups = [scored[[0, 1, 4]], scored[[2, 6]], scored[[3, 7]]]
    plans = plan_of(data, layout=SHARED, options=TINY).policy.plans
    assert [one.scored for one in plans] == [int(group.sum()) for group in groups]


def test_rows_are_not_connected_where_all_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    connected = planning._connected
    monkeypatch.setattr(planning, "_connected", lambda *a: asked.append(1) or connected(*a))
    data = frozen_weights(Data())
    assert plan_of(data, options=None).schedule == "keep" and not asked
    assert plan_of(data).schedule == "batches" and len(asked) == 1


def plan_of(data: Data, objective="dpo", **changes):
    reference = {"ref_hidden": data.ref_hidden, "ref_weight": data.ref_weight}
    arguments = (data.hidden, data.weight, data.target, objective)
    return explain(*arguments, **({"options": SEVERAL} | reference | changes))


def test_batches_hold_whole_groups_within_the_budget() -> None:
    data = frozen_weights(Data())
    plan = plan_of(data)
    scored = data.scored.sum(1)
    pairs = (scored[:4] + scored[4:]).tolist()
    sizes = [one.scored for one in plan.policy.plans]
    assert len(sizes) > 1 and sum(sizes) == sum(pairs)
    assert set(torch.tensor(sizes).cumsum(0).tolist()) <= set(
        torch.tensor(pairs).cumsum(0).tolist()
    )
    assert all(one.schedule == "keep" for one in plan.policy.plans)
    tiny = plan_of(data, options=TINY)
    assert [one.scored for one in tiny.policy.plans] == [size for size in pairs if size]
    assert {one.schedule for one in tiny.policy.plans} == {"recompute"}


def test_terms_of_ones_own_on_the_log_probs() -> None:
    """A gradient that arrives at logps is answered by scoring again."""
    data = frozen_weights(Data())
    losses = by_hand(objectives.get("dpo"), data, SPLITS["pair"], {})
    sums = token_logp(data.hidden, data.weight, data.bias, data).sum(1)
    factors = torch.randn(B, dtype=torch.float64)
    leaves = [data.hidden, data.weight, data.bias]
    for share in (0.0, 0.7):
        output = run(objectives.get("dpo"), data, options=SEVERAL)
        own = share * output.loss + (factors * output.logps).sum()
        want = share * losses.mean() + (factors * sums).sum()
        got = torch.autograd.grad(own, leaves)
        for a, b in zip(got, torch.autograd.grad(want, leaves, retain_graph=True), strict=True):
            torch.testing.assert_close(a, b)


def test_backward_twice_and_a_second_derivative() -> None:
    data = frozen_weights(Data())
    loss = run(objectives.get("dpo"), data, options=SEVERAL).loss
    leaves = [data.hidden, data.weight, data.bias]
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(2 * loss, leaves, create_graph=True)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(2 * a, b.detach())
    with pytest.raises(RuntimeError, match="no second derivative"):
        twice[1].sum().backward()


def test_accumulation_over_batches_is_exact() -> None:
    """In float32, whatever the products' dtype: many batches are no worse than one."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(64, 4, 32, generator=generator).bfloat16()
    weight = (0.1 * torch.randn(64, 32, generator=generator)).bfloat16()
    target = torch.randint(64, (64, 4), generator=generator)
    errors = []
    exact = gradient_of(hidden.double(), weight.double(), target, None)
    for rows in (256, 8):
        budget = rows * 64 * 2 * 4 // 3
        options = ScoringOptions(schedule="batches", memory_budget=budget)
        got = gradient_of(hidden, weight, target, options)
        errors.append(float((got.double() - exact).norm() / exact.norm()))
    assert errors[1] < 1.3 * errors[0] and errors[0] < 8e-3, errors


def gradient_of(hidden: Tensor, weight: Tensor, target: Tensor, options) -> Tensor:
    leaf = weight.clone().requires_grad_()
    preference_loss(hidden, leaf, target, "simpo", options=options).loss.backward()
    return leaf.grad


@pytest.mark.parametrize("needs", [("hidden", "weight"), ("weight",), ("hidden",)])
def test_cost_is_what_explain_says(needs) -> None:
    data = frozen_weights(Data())
    hidden, weight = data.hidden.detach(), data.weight.detach()
    hidden.requires_grad_("hidden" in needs)
    weight.requires_grad_("weight" in needs)
    arguments = (hidden, weight, data.target, "simpo")
    plan = explain(*arguments, options=SEVERAL).policy
    with Operations() as operations:
        preference_loss(*arguments, options=SEVERAL).loss.backward()
    unit = 2 * int(data.scored.sum()) * H * V
    products = sum(one.units * one.scored for one in plan.plans) / plan.scored
    assert operations.flop / unit == pytest.approx(products) == 1 + len(needs)
    assert plan.units == pytest.approx(
        products + ("weight" in needs) * 100 * len(plan.plans) / plan.scored
    )


def test_an_update_of_low_rank_is_what_is_added_up() -> None:
    """Columns of the gradient that batches add up under ``lora=``: the rank's, not the head's."""
    data, rank = frozen_weights(Data()), 4
    a, b = (torch.zeros(*shape, dtype=torch.float64) for shape in ((rank, H), (V, rank)))
    hidden, weight = data.hidden.detach(), data.weight.detach()
    given = {"options": SEVERAL, "lora": (a.requires_grad_(), b.requires_grad_(), 1.0)}
    policy = explain(hidden, weight, data.target, "simpo", **given).policy
    count, rows = len(policy.plans), policy.scored
    assert count > 1
    wide = H + rank
    assert policy.accumulation_units == pytest.approx(100 * count * rank / wide / rows)
    assert policy.saved_bytes == 8 * (rows * (wide + 1) + V * rank)


def test_pairs_without_a_gradient_cost_no_products() -> None:
    data = frozen_weights(Data())
    unit = 2 * H * V
    # A margin of zero for half of the pairs: hinge has nothing to do there.
    ref = torch.zeros(B, dtype=torch.float64)
    ref[:2] = -1e4
    with Operations() as operations:
        loss = preference_loss(
            data.hidden, data.weight, data.target, "hinge", ref_logps=ref, options=SEVERAL
        ).loss
        loss.backward()
    scored = data.scored.sum(1)
    active = int(scored[[2, 3, 6, 7]].sum())
    assert operations.flop == unit * (int(scored.sum()) + 2 * active)


CHOICES = {
    "fits": ({}, {}, "keep"),
    "over budget": ({}, {"memory_budget": 400}, "batches"),
    "scope batch": ({"objective": "aot"}, {"memory_budget": 400}, "keep/recompute"),
    "each loss": ({"reduction": "none"}, {"memory_budget": 400}, "keep/recompute"),
    "frozen": ({"frozen": True}, {"memory_budget": 400}, "direct"),
    "small batches": ({}, {"memory_budget": 70}, "recompute"),
    "asked for": ({}, {"memory_budget": 400, "schedule": "recompute"}, "recompute"),
    "index": ({"layout": torch.tensor([[0, 1], [2, 3]])}, {"memory_budget": 400}, "batches"),
    "all connected": (
        {"layout": torch.stack([torch.zeros(15).long(), torch.arange(1, 16)], 1)},
        {"memory_budget": 400},
        "keep/recompute",
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_choice(name: str) -> None:
    """800 rows; the budget counts rows, of which it keeps three quarters."""
    changes, options, expected = CHOICES[name]
    columns = 1024
    changes = dict(changes)
    frozen = changes.pop("frozen", False)
    if "memory_budget" in options:
        options = options | {"memory_budget": options["memory_budget"] * columns * 4}
    hidden = torch.randn(16, 50, 8).requires_grad_()
    weight = torch.randn(columns, 8).requires_grad_(not frozen)
    target = torch.randint(columns, (16, 50))
    objective = changes.pop("objective", "dpo")
    plan = explain(
        hidden,
        weight,
        target,
        objective,
        ref_logps=torch.zeros(16),
        options=ScoringOptions(**options),
        **changes,
    )
    assert plan.schedule == expected, str(plan)
    assert expected in str(plan) and "\n" not in str(plan)


def test_a_callable_takes_two_passes() -> None:
    data = frozen_weights(Data())
    options = ScoringOptions(memory_budget=SEVERAL.memory_budget)

    def own(policy_chosen, policy_rejected):
        return (policy_rejected - policy_chosen).exp()

    arguments = (data.hidden, data.weight, data.target, own)
    assert explain(*arguments, options=options).schedule != "batches"
    pairwise = objectives.Objective(own, unit="pair", scope="pair")
    assert explain(*arguments[:3], pairwise, options=SEVERAL).schedule == "batches"
    got = preference_loss(*arguments[:3], pairwise, options=SEVERAL)
    want = preference_loss(*arguments, options=options)
    torch.testing.assert_close(got.losses, want.losses)


def test_what_needs_a_gradient_of_its_own_takes_two_passes() -> None:
    data = Data()
    assert data.token_weights.requires_grad
    options = ScoringOptions(memory_budget=1)
    for changes in (
        {"token_weights": data.token_weights},
        {"denominator": torch.tensor(4.0, requires_grad=True)},
        {"objective": "flex_dpo", "extras": {"chosen_nll": torch.ones(4, requires_grad=True)}},
    ):
        with pytest.raises(ValueError, match=r"schedule='batches' cannot .* need a gradient too"):
            plan_of(data, **changes)
        assert plan_of(data, **(changes | {"options": options})).schedule == "recompute"


def test_parameters_of_a_function_get_their_gradient() -> None:
    """Also where batches would be the better schedule, as a smaller budget shows."""
    data, gradients = frozen_weights(Data()), []
    for budget in (SEVERAL.memory_budget, 1 << 20):
        scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

        def own(chosen, rejected, scale=scale):
            return torch.nn.functional.softplus(scale * (rejected - chosen))

        objective = objectives.Objective(own, unit="pair", scope="pair")
        options = ScoringOptions(memory_budget=budget)
        arguments = (data.hidden, data.weight, data.target, objective)
        preference_loss(*arguments, options=options).loss.backward()
        gradients.append(scale.grad)
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="the objective has parameters that need a gradient"):
        preference_loss(*arguments, options=SEVERAL)


def test_evaluation_takes_the_same_options() -> None:
    data = frozen_weights(Data())
    want = run(objectives.get("dpo"), data, options=SEVERAL).loss
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got = run(objectives.get("dpo"), data, options=SEVERAL).loss
        assert not got.requires_grad
        torch.testing.assert_close(got, want.detach())


REFUSED = {
    "scope": ({"objective": "aot"}, "aot has scope batch"),
    "reduction": ({"reduction": "none"}, "with reduction='none'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_batches_cannot_serve(name: str) -> None:
    changes, reason = REFUSED[name]
    with pytest.raises(
        ValueError, match=f"cannot serve this call: .*{reason}.* use schedule='auto'"
    ):
        plan_of(frozen_weights(Data()), **changes)


def test_float16_waits_for_the_loss_scaler() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(16, 32, 32, generator=generator).half()
    weight = (0.02 * torch.randn(200, 32, generator=generator)).half()
    target = torch.randint(200, (16, 32), generator=generator)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        leaves = [one.to(dtype).requires_grad_() for one in (hidden, weight)]
        options = ScoringOptions(memory_budget=40 * 200 * 2 * 4)
        loss = preference_loss(
            *leaves,
            target,
            "dpo",
            ref_logps=torch.full((16,), -150.0),
            denominator=4096.0,
            options=options,
        ).loss
        return list(torch.autograd.grad(65536 * loss, leaves))

    for got, want in zip(gradients(torch.float16), gradients(torch.float64), strict=True):
        assert (got.double() - want).norm() < 1e-3 * want.norm()
    with pytest.raises(ValueError, match="gradients in float16 would underflow"):
        preference_loss(hidden, weight.requires_grad_(), target, "simpo", options=SEVERAL)


def test_linear_logprob_knows_no_groups() -> None:
    data = Data()
    with pytest.raises(ValueError, match=r"call fastpref\.preference_loss"):
        linear_logprob(data.hidden, data.weight, data.target, options=SEVERAL)


def test_units_of_both_models() -> None:
    data = frozen_weights(Data())
    plan = plan_of(data, options=None)
    assert plan.units == pytest.approx(3 + (H - 3) / H)
    assert plan.workspace_bytes >= plan.policy.workspace_bytes
    assert "reference" in str(plan)


def test_nothing_scored() -> None:
    data = frozen_weights(Data())
    target = torch.full_like(data.target, -100)
    loss = preference_loss(data.hidden, data.weight, target, "simpo", options=SEVERAL).loss
    loss.backward()
    assert not data.hidden.grad.any() and not data.weight.grad.any()


def test_twice_the_groups_take_no_more_workspace() -> None:
    """Beyond the gradient that is held until backward."""
    sizes = []
    for pairs in (8, 16):
        hidden, weight = torch.randn(2 * pairs, 100, 8), torch.randn(4096, 8)
        arguments = (hidden.requires_grad_(), weight.requires_grad_())
        target = torch.randint(4096, (2 * pairs, 100))
        options = ScoringOptions(memory_budget=400 * 4096 * 4)
        plan = explain(*arguments, target, "simpo", options=options).policy
        assert isinstance(plan, batches.BatchedPlan)
        sizes.append(plan.workspace_bytes - plan.saved_bytes)
    assert sizes[0] == sizes[1]
