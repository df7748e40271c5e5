# SPDX-License-Identifier: Apache-2.0
"""Arguments that clash, are misspelt or in the wrong place, scalars of numpy, empty batches."""

import numpy as np
import pytest
import torch

from fastpref import explain, linear_logprob, preference_loss, sequence_logp
from fastpref.objectives.registry import catalogue
from tests.preference.cases import B, Data, H, T, V, configured, extras_of, run

LENGTHS = torch.tensor([4, 3, 5, 2])
N = int(LENGTHS.sum())


def given(**changes):
    data = Data()
    every = {
        "hidden": data.hidden,
        "weight": data.weight,
        "target": data.target,
        "objective": "dpo",
        "ref_hidden": data.ref_hidden,
        "ref_weight": data.ref_weight,
    }
    return every | changes


def tokens(**changes):
    advantages = {"advantages": torch.ones(B).double()}
    return given(objective="grpo", beta=0.1, extras=advantages, **changes)


TOKENS = torch.zeros(B, T).double()
CLASHES = {
    "log-probs of the reference": (
        given(
            objective="grpo",
            ref_hidden=None,
            ref_weight=None,
            ref_logps=TOKENS,
            extras={"advantages": torch.ones(B), "ref_token_logp": TOKENS},
        ),
        ValueError,
        r"ref_logps and extras={'ref_token_logp': \.\.\.} both say what the reference",
    ),
    "a live reference": (
        given(objective="grpo", extras={"advantages": torch.ones(B), "ref_token_logp": TOKENS}),
        ValueError,
        r"ref_hidden and extras={'ref_token_logp': \.\.\.} both say",
    ),
    "a misspelt argument": (
        given(ref_logp=TOKENS),
        TypeError,
        "preference_loss has no argument 'ref_logp', .* did you mean 'ref_logps'",
    ),
    "another": (given(temprature=0.7), TypeError, "did you mean 'temperature'"),
    "TRL's name of an argument": (
        tokens(ref_per_token_logps=TOKENS),
        TypeError,
        "did you mean 'ref_logps'",
    ),
    "log-probs by TRL's name": (given(ref_chosen_logps=0), TypeError, "did you mean 'ref_logps'"),
    "a misspelt hyperparameter": (given(betta=0.1), TypeError, "betta; .* did you mean 'beta'"),
    "an extra": (
        given(objective="madpo", reward_margin=torch.ones(B // 2)),
        TypeError,
        r"reward_margin is an extra: preference_loss\(\.\.\., extras={'reward_margin'",
    ),
    "old log-probs": (
        tokens(old_logps=TOKENS),
        TypeError,
        "did you mean old_token_logp.* an extra",
    ),
    "TRL's objective": (given(objective="sigmoid"), ValueError, r"'sigmoid'; perhaps dpo\?"),
    "a layer": (given(weight=torch.nn.Linear(H, V)), TypeError, r"got Linear; pass its \.weight"),
    "the reference's layer": (
        given(ref_weight=torch.nn.Linear(H - 3, V)),
        TypeError,
        r"ref_weight must be a torch.Tensor, got Linear; pass its \.weight",
    ),
    "no number": (given(denominator=np.bool_(True)), TypeError, "denominator must be a number"),
    "no size": (
        given(objective="adpo", layout="groups", group_size=np.bool_(True)),
        TypeError,
        "group_size must be an int, got bool",
    ),
    "hidden and weight swapped": (
        given(hidden=Data().weight, weight=Data().hidden),
        ValueError,
        r"got hidden \(41, 16\), weight \(8, 7, 16\) and .*; the order is hidden, weight, target$",
    ),
    "logits": (
        given(hidden=torch.zeros(B, T, V).double()),
        ValueError,
        "; hidden looks like logits: pass the states before the head$",
    ),
    "sums of half the rows": (
        given(ref_hidden=None, ref_weight=None, ref_logps=torch.zeros(B // 2).double()),
        ValueError,
        r"got \(4,\); one sum a row, chosen and rejected rows in their order$",
    ),
    "sums for single responses": (
        given(
            objective="kto",
            ref_hidden=None,
            ref_weight=None,
            ref_logps=torch.zeros(1).double(),
            extras={"labels": torch.ones(B)},
        ),
        ValueError,
        r"got \(1,\); one sum a row, in order$",
    ),
    "sums for tokens": (
        tokens(ref_hidden=None, ref_weight=None, ref_logps=torch.zeros(B).double()),
        ValueError,
        r"got \(8,\); one value a token$",
    ),
    "a layout of lists": (
        given(layout=[[0, 1], [2, 3]]),
        ValueError,
        r"tensor of rows, got \[\[0, 1\], \[2, 3\]\]; pass torch\.tensor\(\[\.\.\.\]\)$",
    ),
    "an extra that is no tensor": (
        given(objective="madpo", extras={"reward_margin": [1.0, 2.0]}),
        TypeError,
        r"extras\['reward_margin'\] must be a tensor, got list; use torch\.tensor\(\)$",
    ),
    "an extra without a name": (
        given(extras={3: TOKENS}),
        TypeError,
        "extras must map names to tensors, got int 3; name each by the objective's argument",
    ),
    "a loss of torch": (
        given(objective=torch.nn.MSELoss()),
        TypeError,
        r"objective is called with \(policy_chosen, policy_rejected, ref_chosen, ref_rejected\), .*"
        r"but MSELoss takes \(input, target\); write a function of these that returns one loss a p",
    ),
    "numbers in a list": (
        given(beta=[0.1, 0.2]),
        TypeError,
        r"dpo: beta must be a number, or a tensor of one value a unit, got list; use torch\.tensor",
    ),
}
# Known where the objective runs.
RUNS = {
    "a misspelt extra": (
        given(objective="madpo", extras={"reward_margins": torch.ones(B // 2)}),
        ValueError,
        r"madpo needs extras={'reward_margin': ...}, .*; got 'reward_margins' instead$",
    ),
    "a float": (
        given(objective=lambda a, b, c, d: 1.0),
        TypeError,
        r"got float; the losses alone, a \(P,\) tensor, will do$",
    ),
    "floats": (
        given(objective=lambda a, b, c, d: (1.0, a, b)),
        TypeError,
        r"losses as a \(P,\) tensor, one a pair, got float; leave them unreduced$",
    ),
}


@pytest.mark.parametrize("case", CLASHES)
@pytest.mark.parametrize("call", [preference_loss, explain])
def test_what_clashes(case, call) -> None:
    arguments, error, message = CLASHES[case]
    with pytest.raises(error, match=message):
        call(**arguments)


@pytest.mark.parametrize("array", [np.ones((2, 3)), (1.0, 2.0), "text"], ids=type)
@pytest.mark.parametrize("name", ["hidden", "weight", "target", "ref_logps"])
def test_what_makes_a_tensor(name, array) -> None:
    made = "from_numpy" if isinstance(array, np.ndarray) else "tensor"
    message = rf"^{name} must be a torch.Tensor, got .*; use torch\.{made}\(\)$"
    for call in (preference_loss, explain):
        with pytest.raises(TypeError, match=message):
            call(**given(**{name: array}))
    if name != "ref_logps":
        data = {one: given()[one] for one in ("hidden", "weight", "target")}
        with pytest.raises(TypeError, match=message):
            linear_logprob(**data | {name: array})


@pytest.mark.parametrize("case", RUNS)
def test_what_the_objective_cannot_use(case) -> None:
    arguments, error, message = RUNS[case]
    with pytest.raises(error, match=message):
        preference_loss(**arguments)


def test_a_hyperparameter_of_ones_own_may_be_called_anything() -> None:
    def own(chosen, rejected, *, weights: float = 1.0, softcaps: float = 2.0):
        return weights * (rejected - chosen) * softcaps

    reference = {"ref_hidden": None, "ref_weight": None}
    plain = preference_loss(**given(objective=own, **reference)).losses
    doubled = preference_loss(**given(objective=own, weights=2.0, **reference)).losses
    assert torch.equal(doubled, 2 * plain)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("objective", ["simpo", "dpo", "kto"])
def test_lengths_in_place_of_boundaries(objective, dtype) -> None:
    """Before rows are counted by them: three would be no pairs."""
    hidden, target = torch.randn(N, H), torch.zeros(N, dtype=torch.int64)
    arguments = hidden, torch.randn(V, H), target, objective
    message = r"cu_seqlens must rise from 0 to N = 14, got 4 to 2, which look like lengths.*cumsum"
    for call in (preference_loss, explain):
        with pytest.raises(ValueError, match=message):
            call(*arguments, cu_seqlens=LENGTHS.to(dtype))
    with pytest.raises(ValueError, match="which look like lengths"):
        sequence_logp(torch.zeros(N), cu_seqlens=LENGTHS.to(dtype))
    with pytest.raises(TypeError, match="cu_seqlens must be an integer tensor"):
        preference_loss(*arguments, cu_seqlens=LENGTHS.float())
    with pytest.raises(ValueError, match=r"from 0 to N = 14, got 0 to 14, not rising throughout$"):
        sequence_logp(torch.zeros(N), cu_seqlens=torch.tensor([0, 5, 4, 14]))
    advised = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0))
    assert sequence_logp(torch.ones(N), cu_seqlens=advised).tolist() == LENGTHS.tolist()


def numbers(objective):
    """Its hyperparameters that are numbers, a little off where they are not 0."""
    return {
        name: value
        for name, value in objective.hyperparameters.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


@pytest.mark.parametrize("name", [one.name for one in catalogue()])
def test_hyperparameters_of_numpy(name: str) -> None:
    objective, found = configured(next(one for one in catalogue() if one.name == name)), []
    layout = {"layout": "groups", "group_size": np.int64(4)} if objective.unit == "list" else {}
    for kind in (float, np.float64, np.float32):
        data = Data()
        hyperparameters = {}
        for key, value in numbers(objective).items():
            exact = float(np.float32(value)) if isinstance(value, float) else value
            hyperparameters[key] = kind(exact) if isinstance(value, float) else np.int64(exact)
            if kind is float:
                hyperparameters[key] = exact
        layout |= {"denominator": kind(2), "ignore_index": np.int64(-100)}
        own = objective.replace(**hyperparameters)
        output = run(own, data, extras=extras_of(objective), **layout)
        found.append((output.losses, output.loss.detach()))
        torch.autograd.grad(output.loss, data.hidden)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])


def empty(extra: torch.Tensor, facts) -> torch.Tensor:
    return extra if "number" in facts.shapes else extra[:0]


@pytest.mark.parametrize("name", [one.name for one in catalogue()])
def test_metrics_of_nothing_are_zero(name: str) -> None:
    """Where a micro-batch has no row at all."""
    objective = configured(next(one for one in catalogue() if one.name == name))
    extras = {
        key: empty(one, objective.extras[key])
        for key, one in extras_of(objective).items()
        if key in objective.extras
    }
    changes = {"layout": "groups", "group_size": 4} if objective.unit == "list" else {}
    if objective.needs_reference:
        changes |= {"ref_hidden": torch.zeros(0, T, H), "ref_weight": torch.zeros(V, H)}
    output = preference_loss(
        torch.zeros(0, T, H),
        torch.zeros(V, H),
        torch.zeros(0, T, dtype=torch.int64),
        objective,
        extras=extras,
        outputs=("entropy", "mean_logits", "accuracy"),
        **changes,
    )
    assert output.metrics and all(one == 0 for one in output.metrics.values())
