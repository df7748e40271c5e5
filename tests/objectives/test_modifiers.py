# SPDX-License-Identifier: Apache-2.0
"""Objectives made of others: weighted pairs and weighted sums, as values, against TRL, errors."""

import collections
import copy
import pickle
import types

import pytest
import torch

from fastpref import objectives
from fastpref.objectives import Objective, combine, get, wpo

P, T = 6, 5
GENERATOR = torch.Generator().manual_seed(0)
LOGPS = [-30 * torch.rand(P, generator=GENERATOR, dtype=torch.float64) for _ in range(4)]
LENGTHS = {
    "chosen_lengths": torch.tensor([4, 7, 1, 12, 3, 9]),
    "rejected_lengths": torch.tensor([2, 9, 5, 3, 8, 1]),
}
LENGTHS_OF_CHOSEN = {"chosen_lengths": LENGTHS["chosen_lengths"]}
WEIGHTS = {
    "chosen_weights": torch.tensor([0.1, 0.5, 3.0, 1.0, 0.0, 2.0]),
    "rejected_weights": torch.tensor([0.2, 1.5, 4.0, 1.0, 7.0, 0.25]),
}
MPO = combine([get("dpo"), get("bco_pair"), get("sft")], [0.8, 0.2, 1.0])


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def shifted(chosen, rejected, *, shift: float, note=None):
    return shift + rejected - chosen


def evaluate(objective, **extras):
    """The result, and the gradient of the summed losses."""
    logps = [logp.clone().requires_grad_() for logp in LOGPS]
    logps = logps if objective.needs_reference else logps[:2]
    result = objective(*logps, **extras)
    total = result.losses.sum()
    return result, torch.autograd.grad(total, logps, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("name", ["dpo", "simpo", "sft"])
def test_wpo_weighs_losses_and_gradients(name, clamp):
    extras = {key: value for key, value in LENGTHS.items() if key in get(name).extras}
    weights = WEIGHTS["chosen_weights"].double() * WEIGHTS["rejected_weights"].double()
    weights = weights.clamp(max=1) if clamp else weights
    plain, slopes = evaluate(get(name), **extras)
    result, gradients = evaluate(wpo(name, clamp=clamp), **extras, **WEIGHTS)
    close(result.losses, weights * plain.losses)
    close(gradients, tuple(weights * one for one in slopes))
    close(result[1:], plain[1:])


def test_wpo_of_ones_changes_nothing():
    ones = {name: torch.ones(P) for name in WEIGHTS}
    for clamp in (True, False):
        close(evaluate(wpo("hinge", clamp=clamp), **ones), evaluate(get("hinge")))


def test_weights_get_no_gradient():
    weights = {name: value.clone().requires_grad_() for name, value in WEIGHTS.items()}
    chosen = LOGPS[0].clone().requires_grad_()
    wpo("dpo")(chosen, *LOGPS[1:], **weights).losses.sum().backward()
    assert chosen.grad is not None and all(one.grad is None for one in weights.values())


@pytest.mark.parametrize("name", ["dpo", "simpo", "sft", "amapo"])
def test_a_single_one_with_weight_one_is_itself(name):
    objective = get(name)
    extras = {key: value for key, value in LENGTHS.items() if key in objective.extras}
    logps = LOGPS if objective.needs_reference else LOGPS[:2]
    single = combine([objective], [1.0])
    close(single(*logps, **extras), objective(*logps, **extras))
    for fact in ("unit", "scope", "needs_reference", "extras", "hyperparameters"):
        assert getattr(single, fact) == getattr(objective, fact)


def test_mixed_preference_optimization():
    extras = {"chosen_lengths": LENGTHS["chosen_lengths"], "delta": torch.tensor(0.3)}
    result, slopes = evaluate(MPO, **extras)
    dpo, dpo_slopes = evaluate(get("dpo"))
    bco, bco_slopes = evaluate(get("bco_pair"), delta=torch.tensor(0.3))
    nll = -LOGPS[0] / LENGTHS["chosen_lengths"]
    close(result.losses, 0.8 * dpo.losses + 0.2 * bco.losses + nll)
    expected = [0.8 * one + 0.2 * two for one, two in zip(dpo_slopes, bco_slopes, strict=True)]
    expected[0] -= 1 / LENGTHS["chosen_lengths"].double()
    close(slopes, tuple(expected))
    close(result[1:], dpo[1:])


def test_a_union_of_what_the_parts_take():
    assert (MPO.unit, MPO.scope, MPO.needs_reference) == ("pair", "running", True)
    assert list(MPO.extras) == ["delta", "chosen_lengths", "chosen_nll"]
    assert MPO.extras["chosen_nll"].differentiable
    free = combine(["simpo", "sft"], [1, 1])
    assert (free.scope, free.needs_reference) == ("pair", False)
    assert free.extras["chosen_lengths"].required and free.extras["chosen_lengths"].filled
    assert combine(["sft", "sppo_hard"], [1, 1]).scope == "unit"
    assert wpo("sppo_hard").scope == "pair" and wpo("amapo").scope == "batch"
    weighted = wpo("ipo")
    assert list(weighted.extras) == [*LENGTHS, *WEIGHTS]
    assert all(weighted.extras[one].required and weighted.extras[one].filled for one in WEIGHTS)
    assert (wpo(MPO).name, wpo(MPO).scope) == ("wpo(combine(dpo, bco_pair, sft))", "running")


def test_hyperparameters_are_those_of_the_parts():
    assert wpo(get("dpo", beta=0.3)).hyperparameters == {"beta": 0.3, "label_smoothing": 0.0}
    assert wpo("dpo").replace(beta=0.3) == wpo(get("dpo", beta=0.3)) != wpo("dpo")
    assert objectives.as_objective(wpo("dpo"), beta=0.3) == wpo(get("dpo", beta=0.3))
    assert MPO.hyperparameters == {"beta": 0.1, "label_smoothing": 0.0}
    parts = [get("dpo", beta=0.3), get("bco_pair", beta=0.3), get("sft")]
    assert MPO.replace(beta=0.3) == combine(parts, [0.8, 0.2, 1.0])
    # One that they hold at different values is no single number any more.
    mixed = combine([get("dpo", beta=0.3), get("hinge")], [1, 1])
    assert mixed.hyperparameters == {"label_smoothing": 0.0}
    smooth = mixed.replace(label_smoothing=0.1)
    assert smooth == combine([get("dpo", beta=0.3, label_smoothing=0.1), get("hinge")], [1, 1])
    # The delta of slic is a number, that of bco_pair an extra.
    assert "delta" not in combine(["slic", "bco_pair"], [1, 1]).hyperparameters


def test_functions_of_ones_own():
    """Here without a reference, beside one that has it."""
    shift = combine([objectives.as_objective(shifted, shift=2.0), "hinge"], [1, 0.5])
    assert shift.hyperparameters == {"shift": 2.0, "beta": 0.1} and shift.needs_reference
    result = shift(*LOGPS)
    close(result.losses, 2 + LOGPS[1] - LOGPS[0] + get("hinge")(*LOGPS).losses / 2)
    close(result[1:], tuple(LOGPS[:2]))
    close(shift.replace(shift=3.0)(*LOGPS).losses, 1 + result.losses)


@pytest.mark.parametrize("objective", [wpo("dpo"), MPO, wpo(MPO)], ids=lambda one: one.name)
def test_they_are_values(objective):
    extras = LENGTHS_OF_CHOSEN if "chosen_lengths" in objective.extras else {}
    extras = extras | (WEIGHTS if "chosen_weights" in objective.extras else {})
    with pytest.raises(AttributeError):
        objective.function.objectives = ()
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert twin == objective and hash(twin) == hash(objective)
        close(twin(*LOGPS, **extras), objective(*LOGPS, **extras))
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *logps: objective(*logps, **extras), fullgraph=True, backend="eager"
    )
    close(compiled(*LOGPS), objective(*LOGPS, **extras))


def test_settings_make_a_difference():
    assert wpo("dpo") != wpo("dpo", clamp=False) != wpo("hinge", clamp=False)
    assert combine(["dpo"], [1]) == combine([objectives.dpo], [1.0]) != combine(["dpo"], [2])


def test_logps_by_keyword():
    names = MPO.signature.logps
    keywords = dict(zip(names[1:], LOGPS[1:], strict=True)) | LENGTHS_OF_CHOSEN
    close(MPO(LOGPS[0], **keywords), MPO(*LOGPS, **LENGTHS_OF_CHOSEN))


def test_tokens_share_old_log_probabilities():
    policy, old = -torch.rand(2, P, T, dtype=torch.float64)
    extras = {"mask": torch.ones(P, T), "advantages": torch.randn(P).double()}
    both = combine(["grpo", "gspo"], [0.3, 0.7])
    grpo, gspo = (get(name)(policy, old, **extras) for name in ("grpo", "gspo"))
    result = both(policy, old, **extras)
    close(result.losses, 0.3 * grpo.losses + 0.7 * gspo.losses)
    assert torch.equal(result.ratio, grpo.ratio) and not both.needs_reference
    assert both(policy, **extras).ratio.eq(1).all()


class Trainer(types.SimpleNamespace):
    """What TRL's loss method reads of its trainer; each response has T tokens."""

    def __init__(self, **settings):
        super().__init__(
            accelerator=types.SimpleNamespace(
                device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value
            ),
            aux_loss_enabled=False,
            beta=0.2,
            f_divergence_type="reverse_kl",
            label_smoothing=0.0,
            ld_alpha=None,
            model=types.SimpleNamespace(training=False),
            precompute_ref_logps=True,
            _total_train_tokens=0,
            _metrics={"eval": collections.defaultdict(list)},
        )
        vars(self).update(settings)

    def loss(self, token_logps, log_sum_sq_probs):
        nothing = torch.zeros_like(token_logps)
        outputs = types.SimpleNamespace(
            log_probs=token_logps,
            log_sum_sq_probs=log_sum_sq_probs,
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )
        completion = torch.ones(2 * P, T + 1).long()
        inputs = {"input_ids": completion, "completion_mask": completion}
        inputs |= {"attention_mask": completion}
        inputs |= {"ref_chosen_logps": LOGPS[2], "ref_rejected_logps": LOGPS[3]}
        trainer = pytest.importorskip("trl").DPOTrainer
        return trainer._compute_loss(self, lambda **_: outputs, inputs, False)


@pytest.mark.parametrize(
    ("loss_types", "weights", "ours"),
    [
        (["sigmoid"], [1.0], wpo(get("dpo", beta=0.2), clamp=False)),
        (
            ["sigmoid", "bco_pair"],
            [0.3, 0.5],
            wpo(combine(["dpo", "bco_pair"], [0.3, 0.5]), clamp=False),
        ),
        (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], MPO),
    ],
    ids=["wpo", "wpo of a mixture", "mpo"],
)
def test_agrees_with_trl(loss_types, weights, ours):
    tokens = -4 * torch.rand(2 * P, T, generator=GENERATOR, dtype=torch.float64)
    tokens.requires_grad_()
    log_sum_sq_probs = -2 * torch.rand(2 * P, T, generator=GENERATOR, dtype=torch.float64)
    settings = {"loss_types": loss_types, "loss_weights": weights}
    trainer = Trainer(**settings, use_weighting="chosen_weights" in ours.extras)
    theirs = trainer.loss(tokens, log_sum_sq_probs)
    extras = {"chosen_lengths": torch.full((P,), T)} if "chosen_lengths" in ours.extras else {}
    if trainer.use_weighting:
        weights = (tokens - log_sum_sq_probs).mean(-1).exp()
        extras |= dict(zip(WEIGHTS, weights.chunk(2), strict=True))
    policy = tokens.sum(-1).chunk(2)
    loss = ours.replace(beta=0.2)(*policy, *LOGPS[2:], **extras).losses.mean()
    close(loss, theirs)
    close(*(torch.autograd.grad(one, tokens)[0] for one in (loss, theirs)))


CASES = {
    "not pairwise": (ValueError, "wpo weighs pairs, but kto has unit 'unit'", lambda: wpo("kto")),
    "sorted losses": (
        ValueError,
        "wpo weighs pairs, but the losses of aot are sorted or those of a batch",
        lambda: wpo(combine(["dpo", "aot"], [1, 1])),
    ),
    "clamp is a number": (TypeError, "clamp must be a bool, got int", lambda: wpo("dpo", clamp=1)),
    "nothing to modify": (TypeError, "a name, an Objective or a callable", lambda: wpo(3)),
    "no such objective": (ValueError, "no objective is called 'dppo'", lambda: wpo("dppo")),
    "a name for a list": (
        TypeError,
        "objectives must be a list, got str",
        lambda: combine("dpo", [1]),
    ),
    "a weight for a list": (
        TypeError,
        "weights must be a list, got float",
        lambda: combine(["dpo"], 1.0),
    ),
    "nothing to combine": (ValueError, "got 0 objectives and 0 weights", lambda: combine([], [])),
    "too few weights": (
        ValueError,
        "one weight for each, got 2 objectives and 1 weights",
        lambda: combine(["dpo", "sft"], [1]),
    ),
    "weight of zero": (
        ValueError,
        "weights: that of sft must be > 0, got 0",
        lambda: combine(["dpo", "sft"], [1, 0]),
    ),
    "units differ": (
        ValueError,
        "the same unit, got dpo 'pair', kto 'unit'",
        lambda: combine(["dpo", "kto"], [1, 1]),
    ),
    "outside a part's domain": (
        ValueError,
        "dpo: beta must be > 0, got -1",
        lambda: MPO.replace(beta=-1),
    ),
    "unknown hyperparameter": (
        TypeError,
        r"combine\(dpo, bco_pair, sft\) has no hyperparameter bta; it has: beta, label_smoothing",
        lambda: MPO.replace(bta=1),
    ),
    "required hyperparameter": (
        TypeError,
        "shifted needs a value for shift",
        lambda: combine([Objective(shifted, unit="pair", scope="pair")], [1]),
    ),
    "weights missing": (
        TypeError,
        r"wpo\(dpo\) needs the extra chosen_weights",
        lambda: wpo("dpo")(*LOGPS),
    ),
    "a part's extra missing": (
        TypeError,
        r"combine\(dpo, simpo\) needs the extra chosen_lengths",
        lambda: combine(["dpo", "simpo"], [1, 1])(*LOGPS),
    ),
    "weights of another shape": (
        ValueError,
        r"wpo\(dpo\): chosen_weights must be shaped like the log-probs, \(6,\), got \(\)",
        lambda: wpo("dpo")(*LOGPS, **WEIGHTS | {"chosen_weights": torch.tensor(1.0)}),
    ),
    "no reference": (
        ValueError,
        r"combine\(sft, dpo\) needs a reference but ref_chosen_logps is None",
        lambda: combine(["sft", "dpo"], [1, 1])(*LOGPS[:2], **LENGTHS_OF_CHOSEN),
    ),
    "useless reference": (
        ValueError,
        r"wpo\(simpo\) takes no reference, got ref_chosen_logps",
        lambda: wpo("simpo")(*LOGPS, **LENGTHS, **WEIGHTS),
    ),
    "a part's own error": (
        ValueError,
        "pass chosen_lengths and rejected_lengths",
        lambda: MPO(*LOGPS),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_name_the_part(case):
    error, message, call = CASES[case]
    with pytest.raises(error, match=message):
        call()
