# SPDX-License-Identifier: Apache-2.0
"""preference_loss against the same by hand: scoring, sums and objective in plain torch, float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import ScoringOptions, objectives, preference_loss
from fastpref.objectives import registry
from tests.preference.cases import (
    EXTRAS,
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


@pytest.mark.parametrize("declared", registry.catalogue(), ids=lambda one: one.name)
def test_every_objective_as_by_hand(declared: objectives.Objective) -> None:
    objective, data, extras = configured(declared), Data(), extras_of(declared)
    if declared.name == "mallows_po":
        extras["ref_entropy"] = 0.1 + 0.8 * torch.rand(4).double()
    grouped = {"layout": "groups", "group_size": 4} if declared.unit == "list" else {}
    losses = by_hand(objective, data, SPLITS[declared.unit], extras)
    compare(data, losses, run(objective, data, extras=extras, **grouped))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["dpo", "cpo", "simpo"])
def test_layouts(layout: str, packed: bool, weighted: bool, name: str) -> None:
    objective, data = objectives.get(name), Data()
    given, split = LAYOUTS[layout]
    losses = by_hand(objective, data, split, {}, weighted)
    changes = {"layout": given}
    if weighted:
        changes["token_weights"] = data.token_weights
    output = (run_packed if packed else run)(objective, data, **changes)
    logp = token_logp(data.hidden, data.weight, data.bias, data)
    sums = (logp * data.token_weights if weighted else logp).sum(1)
    torch.testing.assert_close(output.logps, sums)
    for got, want in zip((output.chosen_logps, output.rejected_logps), split(sums), strict=True):
        torch.testing.assert_close(got, want)
    assert output.rewards.shape == (B,) and not output.rewards.requires_grad
    compared = torch.cat(split(torch.arange(B)))
    left_out = [row for row in range(B) if row not in compared]
    assert not output.rewards[left_out].any()
    empty = data.scored.sum(1) == 0
    assert torch.equal(output.rewards[compared] != 0, ~empty[compared])
    assert torch.equal(output.chosen_rewards, split(output.rewards)[0])
    compare(data, losses, output)


def test_reference_log_probs_by_token_are_those_of_a_live_reference() -> None:
    objective, data = objectives.get("dpo"), Data()
    live = run(objective, data, token_weights=data.token_weights)
    ref = token_logp(data.ref_hidden, data.ref_weight, data.ref_bias, data).detach()
    arguments = (data.hidden, data.weight, data.target, objective)
    given = preference_loss(
        *arguments, bias=data.bias, ref_logps=ref, token_weights=data.token_weights
    )
    torch.testing.assert_close(given.losses, live.losses)
    keep = torch.ones(B, T, dtype=torch.bool)
    packed = preference_loss(
        data.hidden[keep],
        data.weight,
        data.target[keep],
        objective,
        bias=data.bias,
        cu_seqlens=torch.arange(0, B * T + 1, T),
        ref_logps=ref[keep],
        token_weights=data.token_weights[keep],
    )
    torch.testing.assert_close(packed.losses, live.losses)
    sums = preference_loss(*arguments, bias=data.bias, ref_logps=ref.sum(1))
    torch.testing.assert_close(sums.losses, run(objective, data).losses)
    with pytest.raises(ValueError, match="sums cannot be weighed"):
        preference_loss(*arguments, ref_logps=ref.sum(1), token_weights=data.token_weights)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("schedule", ["keep", "batches"])
def test_reference_log_probs_receive_no_gradient(by_token: bool, schedule: Any) -> None:
    """Also where they come out of a graph of their own, in two passes and in batches."""
    data = Data()
    leaf = -torch.rand(*((B, T) if by_token else (B,)), dtype=torch.float64)
    leaf.requires_grad_()
    output = preference_loss(
        data.hidden,
        data.weight,
        data.target,
        "dpo",
        ref_logps=2 * leaf,
        options=ScoringOptions(schedule=schedule),
    )
    assert not output.ref_logps.requires_grad
    output.loss.backward()
    assert leaf.grad is None and data.weight.grad.any()


@pytest.mark.parametrize("reference", ["hidden", "by token", "sums"])
def test_packed_rows_with_a_leading_dimension_of_one(reference: str) -> None:
    """As the collators of FlashAttention give them."""
    data = Data()
    hidden, target = data.hidden.flatten(0, 1), data.target.flatten()
    given = {"token_weights": data.token_weights.detach().flatten()}
    if reference == "hidden":
        given |= {"ref_hidden": data.ref_hidden.flatten(0, 1), "ref_weight": data.ref_weight}
    elif reference == "by token":
        given["ref_logps"] = -torch.rand(B * T).double()
    else:
        given = {"ref_logps": -torch.rand(B).double()}
    boundaries = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    found = []
    for wide in (True, False):
        changes = {
            key: one[None] if wide and len(one) == B * T else one for key, one in given.items()
        }
        rows, own = (one[None] if wide else one for one in (hidden, target))
        output = preference_loss(rows, data.weight, own, "dpo", cu_seqlens=boundaries, **changes)
        gradients = torch.autograd.grad(output.loss, (data.hidden, data.weight), retain_graph=True)
        found.append((output.loss, output.logps, *gradients))
    assert all(map(torch.equal, *found))


def test_reductions_and_denominator() -> None:
    objective, data = objectives.get("ipo"), Data()
    each = run(objective, data, reduction="none").loss
    assert each.shape == (4,) and each.requires_grad
    for reduction, expected in (("sum", each.sum()), ("mean", each.mean())):
        found = run(objective, data, reduction=reduction).loss
        torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)
    for denominator in (16, torch.tensor(16.0)):
        loss = run(objective, data, denominator=denominator).loss
        torch.testing.assert_close(loss, each.sum() / 16, check_dtype=False)


def test_accumulated_batches_have_the_gradient_of_the_whole_one() -> None:
    objective, data = objectives.get("dpo"), Data()
    (whole,) = torch.autograd.grad(run(objective, data, layout="interleaved").loss, data.weight)
    parts = torch.zeros_like(whole)
    for rows in (slice(0, 2), slice(2, 8)):
        loss = preference_loss(
            data.hidden[rows],
            data.weight,
            data.target[rows],
            objective,
            layout="interleaved",
            bias=data.bias,
            ref_hidden=data.ref_hidden[rows],
            ref_weight=data.ref_weight,
            ref_bias=data.ref_bias,
            denominator=4,
        ).loss
        parts += torch.autograd.grad(loss, data.weight)[0]
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("name", ["dapo", "bnpo", "cispo"])
def test_accumulation_of_what_is_divided_by_tokens(name: str) -> None:
    objective, data = objectives.get(name), Data()
    extras = {key: EXTRAS["token"][key] for key in ("advantages", "old_token_logp")}

    def loss(rows: slice, denominator: float | None) -> Tensor:
        return preference_loss(
            data.hidden[rows],
            data.weight,
            data.target[rows],
            objective,
            bias=data.bias,
            extras={key: one[rows] for key, one in extras.items()},
            denominator=denominator,
        ).loss

    tokens = data.scored.sum(1)
    parts = [
        loss(rows, len(tokens[rows]) * tokens.sum().item() / tokens[rows].sum().item())
        for rows in (slice(0, 3), slice(3, 8))
    ]
    torch.testing.assert_close(sum(parts), loss(slice(0, 8), None))


def test_metrics_of_lists_leave_absent_responses_out() -> None:
    data = Data()
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    scores = torch.tensor([[1.0, 2, torch.nan, 9], [0.1, 0.5, 0.2, torch.nan]])
    output = run(
        objectives.get("adpo"),
        data,
        layout="groups",
        group_size=4,
        extras={"mask": mask, "scores": scores},
    )
    rewards = output.rewards.view(2, 4)
    right = [rewards[0, :2].argmax() == 1, rewards[1, :3].argmax() == 1]
    assert output.metrics["rewards/accuracies"].item() == sum(right) / 2
    there = rewards[mask != 0]
    torch.testing.assert_close(output.metrics["rewards/mean"], there.mean())


def test_further_metrics() -> None:
    data = Data()
    output = run(objectives.get("dpo"), data, outputs=("entropy", "mean_logits", "accuracy"))
    safe = torch.where(data.scored[..., None], data.hidden, 0)
    logits = (safe @ data.weight.t() + data.bias).detach()
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    hit = logits.argmax(-1) == data.target
    chosen = data.scored & (torch.arange(B) < 4)[:, None]
    rejected = data.scored & ~chosen
    for name, values, tokens in (
        ("entropy", entropy, data.scored),
        ("logits/chosen", logits.mean(-1), chosen),
        ("logits/rejected", logits.mean(-1), rejected),
        ("mean_token_accuracy", hit.double(), chosen),
    ):
        expected = values[tokens].mean()
        torch.testing.assert_close(output.metrics[name], expected, check_dtype=False)
        assert output.metrics[name].dim() == 0 and not output.metrics[name].requires_grad


WRONG = {
    "target": ({"target": [1]}, TypeError, "target must be a torch.Tensor, got list"),
    "odd rows": ({"layout": "halves", "rows": 7}, ValueError, "an even number of rows, got 7"),
    "lists": ({"objective": "adpo"}, ValueError, "adpo compares lists: pass layout='groups'"),
    "uneven groups": (
        {"objective": "adpo", "layout": "groups", "group_size": 3},
        ValueError,
        "group_size must divide the number of rows, got 3 and 8 rows",
    ),
    "no reference": ({"ref_hidden": None}, ValueError, "dpo compares with a reference: pass"),
    "reference's vocabulary": (
        {"ref_weight": torch.randn(V + 3, H - 3).double()},
        ValueError,
        "ref_weight must have the vocabulary of weight, 41 rows, got .*44.*; cut both heads",
    ),
    "reference's width": (
        {"ref_weight": torch.randn(V, H).double()},
        ValueError,
        "ref_hidden must end in the weight's hidden size",
    ),
    "reference's update": (
        {"ref_hidden": None, "ref_lora": (1, 2, 3)},
        ValueError,
        "ref_lora updates the head that scores ref_hidden, which is None",
    ),
    "boundaries": (
        {
            "cu_seqlens": torch.tensor([0, 5, 9]),
            "hidden": torch.randn(8, H),
            "target": torch.zeros(8, dtype=torch.int64),
            "weight": torch.randn(V, H),
            "objective": "simpo",
            "ref_hidden": None,
        },
        ValueError,
        "cu_seqlens must rise from 0 to N = 8, got 0 to 9",
    ),
    "useless reference": ({"objective": "simpo"}, ValueError, "simpo takes no reference"),
    "missing extra": (
        {"objective": "madpo"},
        ValueError,
        r"madpo needs extras={'reward_margin': ...}, a \(P,\) tensor",
    ),
    "unknown extra": ({"extras": {"foo": torch.ones(4)}}, TypeError, "dpo has no extra foo"),
    "extras": ({"extras": [1]}, TypeError, "extras must map names to tensors, got list"),
    "layout": ({"layout": "rows"}, ValueError, "layout must be 'halves', 'interleaved'"),
    "index": ({"layout": torch.tensor([[0, 8]])}, ValueError, "layout must name rows from 0 to 7"),
    "both references": ({"ref_logps": torch.zeros(8)}, ValueError, "both say what the reference"),
    "cu_seqlens": ({"cu_seqlens": torch.tensor([0, 8])}, ValueError, r"target must be \(B, T\)"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be one of"),
    "a near reduction": ({"reduction": "means"}, ValueError, r"'means'; did you mean 'mean'\?"),
    "a near layout": ({"layout": "half"}, ValueError, r"got 'half'; did you mean 'halves'\?"),
    "a near output": ({"outputs": ["mean logits"]}, ValueError, "did you mean 'mean_logits'"),
    "denominator": ({"denominator": "3"}, TypeError, "denominator must be a number, got str"),
    "negative denominator": (
        {"denominator": torch.tensor(-3)},
        ValueError,
        "denominator must be positive, got -3.0",
    ),
    "bool denominator": ({"denominator": torch.tensor(True)}, ValueError, "denominator must be a"),
    "seq_group": ({"seq_group": "x"}, TypeError, "seq_group must be a torch.distributed.Process"),
    "dp_group": ({"dp_group": 3}, TypeError, "dp_group must be a torch.distributed.ProcessGroup"),
    "a name for outputs": (
        {"outputs": "entropy"},
        ValueError,
        r"got 'entropy'; write \('entropy',",
    ),
    "outputs": ({"outputs": None}, ValueError, "outputs must be a tuple of names"),
    "weights": ({"token_weights": torch.ones(8)}, ValueError, "token_weights must be shaped like"),
    "hyperparameter": ({"gamma": 1.0}, TypeError, "dpo has no hyperparameter gamma"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_named(case: str) -> None:
    changes, error, message = WRONG[case]
    rows, data = changes.get("rows", B), Data()
    given = {
        "hidden": data.hidden[:rows],
        "weight": data.weight,
        "target": data.target[:rows],
        "objective": "dpo",
        "ref_hidden": data.ref_hidden[:rows],
        "ref_weight": data.ref_weight,
    }
    given |= {name: value for name, value in changes.items() if name != "rows"}
    if given["ref_hidden"] is None:
        given["ref_weight"] = None
    with pytest.raises(error, match=message):
        preference_loss(**given)


def test_sides_of_what_was_replaced() -> None:
    output = run(objectives.get("dpo"), Data(), layout="interleaved")
    assert torch.equal(output._replace(loss=output.loss * 2).chosen_logps, output.logps[0::2])
    unit = run(objectives.get("npo"), Data())
    with pytest.raises(AttributeError, match="of a pairwise objective"):
        _ = unit.chosen_logps
