# SPDX-License-Identifier: Apache-2.0
"""What goes around a loss, given what it cannot use: each argument of each public function of
fastpref.reference, .curriculum, .diagnostics and .optim raises ValueError or TypeError that names
it and what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from fastpref import curriculum, diagnostics, optim, reference
from tests.diagnostics.tiny import make_batch, make_model
from tests.reference.models import Small, lora


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.int64)


def nan(tensor: Tensor) -> Tensor:
    return tensor.clone().fill_(math.nan)


class Case(NamedTuple):
    function: Callable[..., Any]
    good: dict[str, Any]
    wrong: dict[str, list[Any]]


NO_TENSOR = [None, "text", 3.0, [1.0]]
NO_NUMBER = [None, "1", math.nan, True, [1.0], torch.ones(2)]
NO_INTEGER = [None, "1", 1.5, math.nan, True, -1, [1]]
NO_FLAG = [None, "yes", 1]
P, PK, ROWS, FEATURES = draw(5), draw(2, 4), draw(6, 4), draw(9, 3)
LABELS = torch.tensor([1, -1, 1, -1, 1, -1])
BATCH: Any = make_batch()


def real(tensor: Tensor) -> list[Any]:
    """What is no tensor of real numbers of this many dimensions."""
    other = [tensor.bool(), tensor.to(torch.complex64), nan(tensor), tensor[None], tensor[0]]
    return NO_TENSOR + other


def floating(tensor: Tensor) -> list[Any]:
    infinite = torch.full_like(tensor, -math.inf)
    return [*NO_TENSOR, tensor.long(), nan(tensor), infinite, tensor[None], tensor[:0]]


def integer(tensor: Tensor) -> list[Any]:
    return [*NO_TENSOR, tensor.float(), tensor.bool(), tensor[None]]


def curriculum_cases() -> dict[str, Case]:
    c = curriculum
    low, above = [*NO_NUMBER, -1.0], [*NO_NUMBER, 0.0, -1.0]
    pairs = {"chosen_scores": P, "rejected_scores": P}
    features = {"chosen_features": FEATURES, "rejected_features": FEATURES}
    hidden = {"hidden": draw(2, 4, 3), "step_ids": ones(2, 4), "best": ones(2) * 0}
    sampler = c.StageSampler(P, 2)
    return {
        "ranked_pairs": Case(c.ranked_pairs, {"scores": PK}, {
            "scores": real(PK), "mask": ["x", 3, [1], PK, ones(3, 3)],
            "pairing": ["rest", None, 3, ["all"]], "min_gap": low}),
        "clear_margin": Case(c.clear_margin, pairs, {
            "chosen_scores": [*real(P), draw(4)], "rejected_scores": [*real(P), draw(4)],
            "own": ["x", 3, P, ones(4)], "min_chosen": NO_NUMBER, "min_gap": low,
            "min_own_gap": low}),
        "top_fraction": Case(c.top_fraction, {"values": P, "fraction": 0.5}, {
            "values": real(P), "fraction": [*above, 1.5], "largest": NO_FLAG}),
        "vote_difficulty": Case(c.vote_difficulty, {"scores": PK}, {
            "scores": [*real(PK), draw(0, 5)]}),
        "margin_weights": Case(c.margin_weights, {"reward_margin": P}, {
            "reward_margin": real(P), "c_min": [*above, 1.5], "c_max": [*NO_NUMBER, 0.5],
            "slope": above, "tau": above}),
        "minimax_pairs": Case(c.minimax_pairs, {"passes": ones(3, 4)}, {
            "passes": [*NO_TENSOR, draw(3, 4), ones(4), ones(0, 4)]}),
        "mixture_weights": Case(
            c.mixture_weights, {"domain_posteriors": FEATURES.softmax(1), "components": 2}, {
                "domain_posteriors": [*real(FEATURES), FEATURES, 2 * ones(6, 3), draw(0, 3)],
                "components": [*NO_INTEGER, 0, 4]}),
        "ridge_difficulty": Case(
            c.ridge_difficulty, {"features": FEATURES, "targets": draw(9)}, {
                "features": [*real(FEATURES), FEATURES[:1]],
                "targets": [*real(draw(9, 2)), draw(5)], "ridge": above}),
        "separability": Case(c.separability, features, {
            "chosen_features": [*real(FEATURES), draw(8, 3)],
            "rejected_features": [*real(FEATURES), draw(8, 3), draw(9, 4)],
            "folds": [*NO_INTEGER, 1, 10], "ridge": above, "seed": NO_INTEGER}),
        "singular_kernel_scores": Case(
            c.singular_kernel_scores, {"features": draw(6, 3), "labels": LABELS}, {
                "features": [*real(draw(6, 3)), draw(1, 3), draw(6, 1), torch.zeros(6, 3)],
                "labels": [*integer(LABELS), LABELS[:5], 2 * LABELS],
                "power": [*above[1:], math.inf]}),
        "StageSampler": Case(c.StageSampler, {"difficulty": P, "stages": 2}, {
            "difficulty": [*real(P), P[:0]], "seed": NO_INTEGER, "shuffle": NO_FLAG,
            "stages": [None, "2", 0, 6, [1, 1], [1.5, 3.5], 2.0, True, -1, []]}),
        "StageSampler.set_epoch": Case(sampler.set_epoch, {"epoch": 1}, {"epoch": NO_INTEGER}),
        "StageSampler.last_steps": Case(sampler.last_steps, {"pairs_per_step": 1}, {
            "pairs_per_step": [*NO_INTEGER, 0]}),
        "tree_steps": Case(
            c.tree_steps, {"parents": torch.tensor([-1, 0, 0]), "values": draw(3)}, {
                "parents": [*integer(ones(3)), ones(2), 5 * ones(3)],
                "values": [*real(draw(3)), draw(2)]}),
        "step_rewards": Case(c.step_rewards, hidden, {
            "hidden": [*NO_TENSOR, draw(2, 4), ones(2, 4, 3), draw(2, 5, 3)],
            "step_ids": [*integer(ones(2, 4)), ones(2, 3)],
            "best": [*integer(ones(2)), ones(3), 2 * ones(2), -ones(2)]}),
    }  # fmt: skip


def diagnostics_cases() -> dict[str, Case]:
    d, model, length = diagnostics, make_model(), [*integer(ones(5))[:4], ones(4), -ones(5)]
    states = {
        "chosen_hidden": draw(2, 3, 4), "rejected_hidden": draw(2, 5, 4),
        "chosen_mask": ones(2, 3) > 0, "rejected_mask": ones(2, 5) > 0,
    }  # fmt: skip
    layers = {"hidden_a": ROWS, "hidden_b": ROWS, "weight": draw(9, 4)}
    both = [*NO_TENSOR, (P,), (P, draw(4)), (nan(P), P), (P, None), (P, ones(5))]
    no_batch = [None, "x", [1], {}, {"ids": 1}, BATCH | {"input_ids": None},
                BATCH | {"input_ids": draw(6, 11)}, BATCH | {"input_ids": ones(6)}]  # fmt: skip
    positive = [*NO_NUMBER, 0.0, -1.0]
    scale = ["1", math.nan, math.inf]
    return {
        "did_entropy": Case(d.did_entropy, {"policy_logps": PK, "ref_logps": PK}, {
            "policy_logps": [*floating(PK), draw(2, 0)],
            "ref_logps": [*floating(PK), draw(2, 3)]}),
        "log_margin_order": Case(d.log_margin_order, {"margins_a": P, "margins_b": P}, {
            "margins_a": floating(P), "margins_b": [*floating(P), draw(4)]}),
        "length_bias": Case(
            d.length_bias, {"margins": P, "chosen_lengths": ones(5), "rejected_lengths": ones(5)}, {
                "margins": floating(P), "chosen_lengths": [*length, P > 0, nan(P)],
                "rejected_lengths": length}),
        "ches": Case(d.ches, states, {
            "chosen_hidden": [*NO_TENSOR, draw(2, 3), ones(2, 3, 4), nan(draw(2, 3, 4))],
            "rejected_hidden": [*NO_TENSOR, draw(3, 5, 4), draw(2, 5, 3), draw(2, 0, 4)],
            "chosen_mask": [*NO_TENSOR, ones(2, 3), ones(2, 4) > 0],
            "rejected_mask": [*NO_TENSOR, ones(2, 5), ones(2, 4) > 0], "normalize": NO_FLAG}),
        "displacement": Case(d.displacement, {"before": (P, P), "after": (P, P)}, {
            "before": [*both, (P, P, P)], "after": both}),
        "layer_transport": Case(d.layer_transport, layers, {
            "hidden_a": [*NO_TENSOR, draw(6, 3), draw(5, 4), ones(6, 4)],
            "hidden_b": [*NO_TENSOR, draw(6, 3), draw(5, 4)],
            "weight": [*NO_TENSOR, draw(9, 3), draw(9), ones(9, 4)],
            "mask": ["x", ones(5) > 0, draw(6)], "bias": ["x", draw(8)],
            "softcap": [*scale, 0.0, -1.0], "logit_scale": scale,
            "temperature": [*scale, 0.0, -1.0], "options": ["x"]}),
        "layer_contraction": Case(d.layer_contraction, {"hidden": ROWS}, {
            "hidden": floating(ROWS), "tail": [*positive, 1.5]}),
        "spinal": Case(d.spinal, {"model": model, "batch": BATCH}, {
            "model": [None, "x", torch.nn.Linear(2, 2)], "batch": no_batch,
            "tail": [*positive, 1.5], "options": ["x"]}),
        "credit_map": Case(
            d.credit_map, {"tokens": ["a", "b"], "credit": [1.0, 2.0], "path": "x"}, {
                "tokens": [None, "ab", [1, 2], 3, ["a"], []],
                "credit": [None, "x", [1.0], [math.nan, 1.0], ["a", "b"], [[1.0, 2.0]]],
                "path": [None, 3, "/nowhere/at/all"], "title": [None, 3]}),
        "PreferenceMonitorCallback": Case(d.PreferenceMonitorCallback, {"probe": BATCH}, {
            "probe": [*no_batch, make_batch(5), {"input_ids": ones(4, 3)}],
            "unseen": [*no_batch[1:], {"input_ids": ones(4, 3)}], "every": [*NO_INTEGER, 0],
            "beta": positive, "trainer": ["x", 3]}),
    }  # fmt: skip


def optim_cases() -> dict[str, Case]:
    weight = draw(9, 4)

    def made(rank: int) -> Any:
        return optim.DCTAdamW(weight, rank=rank)

    low, least = [*NO_NUMBER, -1.0], [*NO_INTEGER, 0]
    foreign = torch.optim.AdamW([draw(9, 4)]).state_dict()
    return {
        "dct_matrix": Case(optim.dct_matrix, {"size": 4}, {
            "size": least, "dtype": [None, "x", 3, torch.int64], "device": [None, "x", 3.5]}),
        "DCTAdamW": Case(optim.DCTAdamW, {"weight": weight, "rank": 2}, {
            "weight": [*NO_TENSOR, draw(9), ones(9, 4), draw(9, 4).requires_grad_()],
            "rank": [*least, 5], "lr": low, "eps": low, "weight_decay": low,
            "betas": [None, 0.9, (0.9,), (0.9, 1.0), ("a", "b"), (math.nan, 0.9), "ab"],
            "update_every": least}),
        "DCTAdamW.load_state_dict": Case(
            made(2).load_state_dict, {"state_dict": made(2).state_dict()}, {
                "state_dict": [None, {}, "x", {"state": {}}, made(3).state_dict(), foreign]}),
    }  # fmt: skip


def reference_cases() -> dict[str, Case]:
    r, model, low = reference, lora(adapters=("fast", "slow")), [*NO_NUMBER, -1.0]
    pair, no_model = r.AdapterPair(model), [None, "x", Small(1), torch.ones(1)]
    no_weights = [None, "x", 3.0, torch.ones(2), [1.0], [torch.ones(3)], [], [None], Small(1)]
    no_adapter = [None, 3, "other", ["fast"]]
    no_role = {"role": [None, "other", 3]}
    state = pair.state_dict()

    def activate(role: Any) -> None:
        with pair.active(role):
            pass

    def switch(dp_group: Any) -> None:
        pair.record(P, P)
        pair.switch(dp_group=dp_group)

    def combine(model: Any = model, **given: Any) -> None:
        try:
            r.combine_adapters(model, **given)
        finally:
            pair.model.delete_adapter("new") if "new" in pair.model.peft_config else None

    given = {"names": ["fast", "slow"], "weights": [1.0, 2.0], "new_name": "new"}
    return {
        "update_": Case(
            r.update_, {"reference": [torch.ones(2)], "policy": [torch.zeros(2)], "decay": 0.5}, {
                "reference": no_weights, "policy": no_weights,
                "decay": [*NO_NUMBER, 1.0, -0.1]}),
        "frozen_copy": Case(r.frozen_copy, {"model": Small(1)}, {
            "model": [None, "x", torch.ones(2)]}),
        "adapter_tensors": Case(r.adapter_tensors, {"model": model, "name": "fast"}, {
            "model": no_model, "name": no_adapter}),
        "combine_adapters": Case(combine, given, {
            "names": [None, 3, "fast", ["fast"], ["fast", "fast"], ["fast", "x"], [1, 2], []],
            "weights": [None, 3.0, [1.0], ["a", "b"], [math.nan, 1], [True, 1.0], "ab"],
            "new_name": [None, 3, "", "a.b", "fast"], "model": no_model}),
        "AdapterPair": Case(r.AdapterPair, {"model": model}, {
            "model": no_model, "fast": [*no_adapter, "slow"], "slow": [*no_adapter, "fast"]}),
        "AdapterPair.parameters": Case(pair.parameters, {"role": "fast"}, no_role),
        "AdapterPair.active": Case(activate, {"role": "fast"}, no_role),
        "AdapterPair.parameter_groups": Case(
            pair.parameter_groups, {"fast_lr": 1.0, "slow_lr": 1.0},
            {"fast_lr": low, "slow_lr": low}),
        "AdapterPair.record": Case(pair.record, {"fast_loss": P, "slow_loss": P}, {
            "fast_loss": [*NO_TENSOR, P[:0]], "slow_loss": [*NO_TENSOR, P[:0]]}),
        "AdapterPair.switch": Case(switch, {"dp_group": None}, {"dp_group": ["x", 3]}),
        "AdapterPair.swap": Case(pair.swap, {}, {
            "optimizer": ["x", 3, torch.optim.SGD([torch.ones(1)], lr=1.0)]}),
        "AdapterPair.load_state_dict": Case(pair.load_state_dict, {"state": state}, {
            "state": [None, "x", {}, state | {"fast": "a"}, {"fast": "fast", "slow": "slow"},
                      state | {"losses": "x"}, state | {"losses": [1.0]}]}),
        "ReferenceCallback": Case(r.ReferenceCallback, {"reference": "ref", "every": 2}, {
            "reference": [None, 3, torch.ones(2)], "decay": [*NO_NUMBER, 1.0, -0.1],
            "every": [None, 0, -1, 1.5, "step", [], [0], [1.5], True, math.nan],
            "checkpoint": [3, [1]]}),
        "AdapterPairCallback": Case(r.AdapterPairCallback, {"pair": pair, "every": 2}, {
            "pair": [None, "x", model], "every": [*NO_INTEGER, 0]}),
    }  # fmt: skip


PACKAGES = {
    curriculum: curriculum_cases,
    diagnostics: diagnostics_cases,
    optim: optim_cases,
    reference: reference_cases,
}
CASES = {name: case for make in PACKAGES.values() for name, case in make().items()}


def test_every_public_function_is_here() -> None:
    named = {name.partition(".")[0] for name in CASES}
    for package in PACKAGES:
        for name in package.__all__:
            one = getattr(package, name)
            result = hasattr(one, "_fields") or hasattr(one, "__dataclass_fields__")
            assert name in named or result, name


@pytest.mark.parametrize("name", CASES)
def test_each_argument(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    case.function(**case.good)
    for argument, values in case.wrong.items():
        for value in values:
            with pytest.raises((TypeError, ValueError)) as raised:
                case.function(**case.good | {argument: value})
            said = str(raised.value)
            assert argument in said and "got" in said, f"{argument}={value!r}: {said}"
