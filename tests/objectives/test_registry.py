# SPDX-License-Identifier: Apache-2.0
"""Objectives as values: lookup, configuration, a user's functions, and error messages."""

import copy
import functools
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastpref import objectives
from fastpref.objectives import Objective, PairLosses, registry

LOGPS = [torch.tensor(row) for row in ([-1.0, -2, -3], [-2.0, -5, -1], [-1.0] * 3, [-2.0] * 3)]
LENGTHS = {"chosen_lengths": torch.ones(3), "rejected_lengths": torch.ones(3)}


def logistic(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta=0.5):
    margin = beta * (policy_chosen - ref_chosen - policy_rejected + ref_rejected)
    return -F.logsigmoid(margin)


def shifted(chosen, rejected, *, shift: float):
    return shift * rejected - chosen


def test_names_lists_the_catalogue():
    assert {"dpo", "ipo", "hinge", "simpo", "sft"} <= set(objectives.names())


def test_get_records_what_an_engine_must_know():
    ipo = objectives.get("ipo", beta=0.2)
    assert (ipo.name, ipo.unit, ipo.scope, ipo.needs_reference) == ("ipo", "pair", "pair", True)
    assert ipo.hyperparameters == {"beta": 0.2, "normalize": "mean"}
    assert list(ipo.extras) == ["chosen_lengths", "rejected_lengths"]
    assert all(facts.filled and not facts.required for facts in ipo.extras.values())
    simpo = objectives.get("simpo")
    assert not simpo.needs_reference
    assert all(facts.filled and facts.required for facts in simpo.extras.values())
    assert objectives.get("sft").extras["chosen_nll"].differentiable
    assert objectives.get("sft").scope == "unit"


@pytest.mark.parametrize(
    ("unit", "trainer", "elsewhere"),
    # sft there is a mean over the tokens of all responses; gspo is grpo with other ratios.
    [("pair", "dpo", {"sft"}), ("unit", "kto", set()), ("token", "grpo", set())],
)
def test_loss_types_are_those_of_trl(unit, trainer, elsewhere):
    module = pytest.importorskip(f"trl.trainer.{trainer}_trainer")
    text = Path(module.__file__).read_text(encoding="utf-8")
    found = set(re.findall(r'loss_type == "(\w+)"', text))
    for several in re.findall(r"self\.loss_type in \[([^]]*)\]", text):
        found |= set(re.findall(r'"(\w+)"', several))
    assert set(registry.loss_types(unit)) == found - elsewhere


def test_a_registration_is_found_by_the_function_alone():
    registration = objectives.get("robust_dpo", beta=0.3).registration
    assert registration.loss_type == "robust" and registration.objective.name == "robust_dpo"
    assert registration.objective.hyperparameters["beta"] == 0.1

    @functools.wraps(objectives.dpo)
    def dpo(*args, **keywords):
        losses, *rewards = objectives.dpo(*args, **keywords)
        return PairLosses(2 * losses, *rewards)

    wrapped = Objective(dpo, unit="pair", scope="pair")
    assert wrapped.registration is None
    assert torch.equal(wrapped(*LOGPS).losses, 2 * objectives.dpo(*LOGPS).losses)


def test_objective_is_frozen_and_a_value():
    dpo = objectives.get("dpo", beta=0.2)
    with pytest.raises(AttributeError):
        dpo.scope = "batch"
    dpo.hyperparameters["beta"] = 9.0
    assert dpo.hyperparameters["beta"] == 0.2
    assert dpo == objectives.get("dpo", beta=0.2) != objectives.get("dpo")
    assert hash(dpo) == hash(objectives.get("dpo", beta=0.2))
    for twin in (copy.deepcopy(dpo), pickle.loads(pickle.dumps(dpo))):
        assert twin == dpo
        assert torch.equal(twin(*LOGPS).losses, dpo(*LOGPS).losses)


def test_replace_keeps_the_other_settings():
    dpo = objectives.get("dpo", beta=0.2).replace(label_smoothing=0.1)
    assert dpo.hyperparameters == {"beta": 0.2, "label_smoothing": 0.1}


def test_logps_by_keyword():
    names = [
        f"{model}_{side}_logps" for model in ("policy", "ref") for side in ("chosen", "rejected")
    ]
    keywords = dict(zip(names, LOGPS, strict=True))
    expected = objectives.dpo(*LOGPS).losses
    assert torch.equal(objectives.dpo(**keywords).losses, expected)
    assert torch.equal(objectives.get("dpo")(**keywords).losses, expected)


def test_as_objective():
    dpo = objectives.as_objective("dpo", beta=0.3)
    assert dpo == objectives.get("dpo", beta=0.3)
    assert objectives.as_objective(dpo, label_smoothing=0.1).hyperparameters["beta"] == 0.3
    assert objectives.as_objective(objectives.dpo, beta=0.3) == dpo
    bare = objectives.as_objective(logistic, beta=0.3)
    assert (bare.unit, bare.scope, bare.name) == ("pair", "batch", "logistic")
    with pytest.raises(TypeError, match="a name, an Objective or a callable, got int"):
        objectives.as_objective(3)


def test_bare_losses_get_log_ratios_as_rewards():
    result = Objective(logistic, unit="pair", scope="pair")(*LOGPS)
    assert isinstance(result, PairLosses)
    torch.testing.assert_close(result.losses, objectives.dpo(*LOGPS, beta=0.5).losses)
    assert torch.equal(result.chosen_rewards, LOGPS[0] - LOGPS[2])
    assert torch.equal(result.rejected_rewards, LOGPS[1] - LOGPS[3])


def test_function_without_reference_parameters():
    objective = Objective(lambda chosen, rejected: rejected - chosen, unit="pair", scope="pair")
    assert not objective.needs_reference
    chosen = LOGPS[0].clone().requires_grad_()
    for result in (objective(chosen, LOGPS[1]), objective(chosen, LOGPS[1], None, None)):
        assert torch.equal(result.losses, LOGPS[1] - chosen)
        assert torch.equal(result.chosen_rewards, chosen.detach())
        assert not result.chosen_rewards.requires_grad
    with pytest.raises(TypeError, match=r"takes \(chosen, rejected\), got 4"):
        objective(*LOGPS)


def test_plain_tuple_becomes_the_result_of_the_family():
    def fn(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, *, reward_margin, note=None):
        assert not reward_margin.requires_grad
        return chosen - rejected - reward_margin, beta * chosen, beta * rejected

    objective = Objective(fn, unit="pair", scope="batch").replace(beta=0.2)
    assert list(objective.extras) == ["reward_margin", "note"]
    margin = torch.ones(3, requires_grad=True)
    result = objective(*LOGPS, reward_margin=margin)
    assert isinstance(result, PairLosses)
    torch.testing.assert_close(result.chosen_rewards, 0.2 * LOGPS[0])
    with pytest.raises(TypeError, match="fn needs the extra reward_margin"):
        objective(*LOGPS)


@pytest.mark.parametrize(("unit", "shape"), [("unit", (3,)), ("list", (3, 5))])
def test_other_families(unit, shape):
    def fn(policy, ref):
        return (policy - ref).reshape(3, -1).sum(-1)

    objective = Objective(fn, unit=unit, scope=unit)
    policy, ref = torch.randn(2, *shape)
    losses, rewards = objective(policy, ref)
    assert losses.shape == (3,) and torch.equal(rewards, policy - ref)
    with pytest.raises(ValueError, match="pass zeros"):
        objective(policy)


def test_token_family_takes_old_or_nothing():
    def fn(policy, old=None, *, mask):
        ratio = (policy - (policy.detach() if old is None else old)).exp()
        return objectives.TokenLosses((ratio * mask).sum(-1), ratio, ratio > 9, None)

    objective = Objective(fn, unit="token", scope="unit")
    assert not objective.needs_reference
    policy, mask = torch.randn(2, 4, requires_grad=True), torch.ones(2, 4)
    assert objective(policy, mask=mask).losses.tolist() == [4.0, 4.0]
    result = objective(policy, policy.detach() + 1, mask=mask)
    assert not result.ratio.requires_grad and result.losses.requires_grad


def test_callables_without_annotations_or_names():
    partial = functools.partial(objectives.dpo, beta=0.4)
    result = objectives.as_objective(partial)(*LOGPS)
    assert torch.equal(result.losses, objectives.dpo(*LOGPS, beta=0.4).losses)
    star = objectives.as_objective(lambda *logps: sum(logps))
    assert star(*LOGPS).losses.shape == (3,)


CASES = {
    "unknown name": (
        ValueError,
        r"no objective is called 'dppo'; perhaps dpo",
        lambda: objectives.get("dppo"),
    ),
    "name of nothing near": (
        ValueError,
        r"^no objective is called ''; objectives\.names\(\) lists them all$",
        lambda: objectives.get(""),
    ),
    "name of a function on objectives": (
        ValueError,
        r"^wpo weighs another objective: help\(fastpref\.objectives\.wpo\)$",
        lambda: objectives.as_objective("wpo"),
    ),
    "unknown hyperparameter": (
        TypeError,
        "dpo has no hyperparameter bta; it has: beta, label_smoothing",
        lambda: objectives.get("dpo", bta=1.0),
    ),
    "unknown extra": (
        TypeError,
        "ipo has no extra margin; it has: chosen_lengths, rejected_lengths",
        lambda: objectives.get("ipo")(*LOGPS, margin=LOGPS[0]),
    ),
    "hyperparameter at the call": (
        TypeError,
        "dpo has no extra beta; it has: none",
        lambda: objectives.get("dpo")(*LOGPS, beta=0.2),
    ),
    "unknown keyword of a function": (
        TypeError,
        "unexpected keyword argument 'bta'",
        lambda: objectives.dpo(*LOGPS, bta=1.0),
    ),
    "wrong type": (
        TypeError,
        r"dpo: beta must be a number, or a tensor of .* a unit, got str; use float\(\)$",
        lambda: objectives.get("dpo", beta="0.1"),
    ),
    "numbers of one value a unit": (
        TypeError,
        r"dpo: beta must be a number, or .*, got list; use torch\.tensor\(\)$",
        lambda: objectives.get("dpo", beta=[0.1, 0.2]),
    ),
    "numbers for one of the batch": (
        TypeError,
        "dr_dpo: tau must be a number, got tuple; the whole batch shares it$",
        lambda: objectives.get("dr_dpo", tau=(0.1, 0.2)),
    ),
    "bool for a number": (
        TypeError,
        "dpo: beta must be a number, or a tensor of one value a unit, got bool$",
        lambda: objectives.get("dpo", beta=True),
    ),
    "required hyperparameter not set": (
        TypeError,
        "shifted needs a value for shift",
        lambda: objectives.as_objective(shifted),
    ),
    "tensor hyperparameter": (
        ValueError,
        r"dpo: beta must be a number or one value a unit, got a tensor of shape \(\); take",
        lambda: objectives.dpo(*LOGPS, beta=torch.tensor(0.1)),
    ),
    "paper's condition": (
        ValueError,
        r"label_smoothing must be in \[0, 0.5\) \(the share of flipped labels",
        lambda: objectives.get("dpo", label_smoothing=0.5),
    ),
    "missing extra": (
        TypeError,
        "simpo needs the extra chosen_lengths; pass chosen_lengths=... by keyword",
        lambda: objectives.simpo(*LOGPS[:2]),
    ),
    "an extra misspelt": (
        TypeError,
        "madpo needs the extra reward_margin; got 'reward_margins' instead$",
        lambda: objectives.madpo(*LOGPS, reward_margins=LOGPS[0]),
    ),
    "extra of another shape": (
        ValueError,
        r"chosen_lengths must be shaped like the log-probs, \(3,\), got \(3, 1\)",
        lambda: objectives.simpo(*LOGPS[:2], **LENGTHS | {"chosen_lengths": torch.ones(3, 1)}),
    ),
    "extra not a tensor": (
        TypeError,
        r"chosen_lengths must be a tensor, got list; use torch\.tensor\(\)$",
        lambda: objectives.simpo(*LOGPS[:2], **LENGTHS | {"chosen_lengths": [1, 1, 1]}),
    ),
    "logps of unequal shape": (
        ValueError,
        r"must all be \(P,\), got policy_chosen_logps \(3,\) and ref_chosen_logps \(1,\)",
        lambda: objectives.dpo(*LOGPS[:2], LOGPS[2][:1], LOGPS[3]),
    ),
    "logps per token": (
        ValueError,
        r"must all be \(P,\), got policy_chosen_logps \(3, 2\)",
        lambda: objectives.dpo(*[torch.zeros(3, 2)] * 4),
    ),
    "integer logps": (
        TypeError,
        r"ref_chosen_logps must be a floating tensor, got torch.int64; use \.float\(\)$",
        lambda: objectives.dpo(*LOGPS[:2], torch.zeros(3).long(), LOGPS[3]),
    ),
    "logps in lists": (
        TypeError,
        r"simpo: policy_chosen_logps must be a floating tensor, got list; use torch\.tensor\(\)$",
        lambda: objectives.simpo([1.0], [2.0], **LENGTHS),
    ),
    "a module with other arguments": (
        TypeError,
        r"objective is called with \(policy, ref\), log-probabilities, but TripletMarginLoss takes "
        r"\(anchor, positive, negative\); write a function of these that returns one loss a unit",
        lambda: Objective(torch.nn.TripletMarginLoss(), unit="unit", scope="unit"),
    ),
    "too few logps": (
        TypeError,
        "simpo needs the log-probabilities policy_rejected_logps",
        lambda: objectives.simpo(LOGPS[0], **LENGTHS),
    ),
    "reduced losses": (
        ValueError,
        r"one loss a pair, shape \(3,\), not reduced; got \(\)",
        lambda: objectives.as_objective(lambda a, b, c, d: a.mean())(*LOGPS),
    ),
    "name of no kind": (
        TypeError,
        "name must be the name of an objective, got NoneType",
        lambda: objectives.get(None),
    ),
    "hyperparameter in a call": (
        TypeError,
        r"dpo has no extra beta; it has: none; hyperparameters are set by objectives.get",
        lambda: objectives.get("dpo")(*LOGPS, beta=0.3),
    ),
    "wrong result": (
        TypeError,
        r"must return PairLosses\(losses, chosen_rewards, rejected_rewards\), got dict; the losses "
        r"alone, a \(P,\) tensor, will do$",
        lambda: objectives.as_objective(lambda a, b, c, d: {})(*LOGPS),
    ),
    "unknown unit": (
        ValueError,
        "unit must be one of pair, unit, list, token, got 'pairs'",
        lambda: Objective(logistic, unit="pairs", scope="pair"),
    ),
    "unknown scope": (
        ValueError,
        "scope must be one of unit, pair, list, batch, running, got 'token'",
        lambda: Objective(logistic, unit="pair", scope="token"),
    ),
    "too few parameters": (
        TypeError,
        r"at least 2 positional log-probabilities, got \(x\)",
        lambda: Objective(lambda x: x, unit="pair", scope="pair"),
    ),
    "reference without parameters": (
        ValueError,
        "has no reference parameters but needs_reference=True",
        lambda: Objective(lambda a, b: a, unit="pair", scope="pair", needs_reference=True),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_name_the_argument_and_the_remedy(case):
    error, message, call = CASES[case]
    with pytest.raises(error, match=message):
        call()


def test_compiles_without_a_graph_break():
    ipo = objectives.get("ipo")
    compiled = torch.compile(lambda *x: ipo(*x, **LENGTHS), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*LOGPS), ipo(*LOGPS, **LENGTHS))
