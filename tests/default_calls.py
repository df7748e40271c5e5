# SPDX-License-Identifier: Apache-2.0
"""A call of every public function, on tensors whose device and dtype are said."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastpref
from fastpref import ScoringOptions, diffusion, nn, objectives, sequences
from fastpref.integrations import trl
from fastpref.objectives import registry
from fastpref.scoring.backends.divergence_formulas import DIVERGENCES
from fastpref.scoring.statistics import OUTPUTS
from tests.nn import distilled, peers
from tests.objectives.test_catalogue import plain_extras, plain_logps, ready
from tests.preference.cases import Data, configured, extras_of, run
from tests.scoring.cases import BACKENDS

N, H, V, T = 40, 8, 131, 5
LEAST = ScoringOptions(memory_budget=1)
Call = Callable[[], Any]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


HIDDEN, WEIGHT, BIAS = draw(N, H), draw(V, H, seed=1), draw(V, seed=2)
TEACHER = draw(N, H + 3, seed=3), draw(V, H + 3, seed=4)
TARGET = torch.arange(N, dtype=torch.int64) * 37 % V
TARGET[::5] = -100
CHOSEN = torch.stack([TARGET.clamp(min=0), (TARGET + 101) % V], dim=-1)
LORA = draw(3, H, seed=5), draw(V, 3, seed=6), 0.5
MASK = torch.arange(T, dtype=torch.int64) < torch.tensor([[5], [0], [3], [4]])
LENGTHS, IDS = torch.tensor([2, 4, 0, 5]), torch.arange(T, dtype=torch.int64).expand(4, T)
LOGP = -draw(4, T, seed=7).abs()


def with_gradients(function: Callable[..., Any], *given: Tensor, **options: Any) -> Any:
    """What it returns, and gradients of all that is differentiable at what is floating point."""
    leaves = [one.detach().clone().requires_grad_(one.is_floating_point()) for one in given]
    found = function(*leaves, **options)
    tensors = [found] if isinstance(found, Tensor) else [one for one in found if one is not None]
    trained = [one for one in tensors if isinstance(one, Tensor) and one.requires_grad]
    total = sum(one.sum() for one in trained)
    asked = [one for one in leaves if one.requires_grad]
    return found, torch.autograd.grad(total, asked, allow_unused=True) if trained else ()


def scoring_calls() -> dict[str, Call]:
    score = functools.partial(with_gradients, fastpref.linear_logprob)
    diverge = functools.partial(with_gradients, fastpref.linear_divergence)
    two = HIDDEN, WEIGHT, *TEACHER
    calls: dict[str, Call] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = HIDDEN.to(dtype), WEIGHT.to(dtype), TARGET
        for backend in BACKENDS:
            for schedule, budget in (("auto", None), ("recompute", 1)):
                options = ScoringOptions(backend=backend, schedule=schedule, memory_budget=budget)
                calls[f"linear_logprob {dtype} {backend} {schedule}"] = functools.partial(
                    score, *given, bias=BIAS, outputs=OUTPUTS, softcap=4.0, options=options
                )
    calls["linear_logprob updated"] = lambda: with_gradients(
        lambda hidden: fastpref.linear_logprob(hidden, WEIGHT, TARGET, lora=LORA), HIDDEN
    )
    chosen = functools.partial(with_gradients, fastpref.linear_logits)
    calls["linear_logits"] = lambda: chosen(HIDDEN, WEIGHT, CHOSEN, softcap=4.0)
    calls["linear_logits least"] = lambda: chosen(HIDDEN, WEIGHT, CHOSEN, options=LEAST)
    calls["linear_logprob restricted"] = lambda: score(
        HIDDEN, WEIGHT, TARGET, restrict_to=CHOSEN, outputs=OUTPUTS
    )
    sparse = functools.partial(with_gradients, fastpref.sparse_divergence, HIDDEN, WEIGHT, CHOSEN)
    teacher = -1 - draw(N, 2, seed=8).abs()
    for kind in ("forward_kl", "reverse_kl"):
        for tail in ("ignore", "bucket"):
            calls[f"sparse_divergence {kind} {tail}"] = functools.partial(
                sparse, teacher, TARGET >= 0, divergence=kind, tail=tail
            )
    calls["release_workspace"] = fastpref.release_workspace
    calls["explain"] = lambda: str(fastpref.explain(HIDDEN, WEIGHT, TARGET))
    calls["explain_divergence"] = lambda: str(fastpref.explain_divergence(*two))
    for kind in DIVERGENCES:
        calls[f"linear_divergence {kind}"] = functools.partial(diverge, *two, divergence=kind)
        least = functools.partial(diverge, *two, TARGET >= 0, divergence=kind, options=LEAST)
        calls[f"linear_divergence {kind} least"] = least
    head = peers.leaves({"_input": HIDDEN, "lin_weight": WEIGHT, "bias": BIAS})
    tensors = [*head.values(), TARGET.clamp(min=0)]
    if importlib.util.find_spec("transformers") is not None:  # which it asks about ZeRO-3
        calls["adapter"] = lambda: trl.LogProbAdapter.apply(*tensors, 0.7, 64, 5.0)
    sizes = {"trains_weight": True, "keeps": True, "device_memory": 1 << 34}
    calls["default_budget"] = lambda: trl.default_budget(
        N, H, V, torch.bfloat16, torch.float32, **sizes
    )
    return calls


def preference_calls() -> dict[str, Call]:
    calls: dict[str, Call] = {}
    data = Data(torch.float32)
    leaves = [data.hidden, data.weight, data.bias]

    def call(objective: objectives.Objective, how: Callable[..., Any], **changes: Any) -> Any:
        given = {name: one.float() for name, one in extras_of(objective).items()}
        extras = {n: one.bool() if n == "labels" else one for n, one in given.items()}
        if objective.unit == "list":
            changes |= {"layout": "groups", "group_size": 4}
        found = how(objective, data, extras=extras, **changes)
        return found, torch.autograd.grad(found.loss, leaves, allow_unused=True)

    for declared in registry.catalogue():
        objective = configured(declared)
        calls[f"preference_loss {declared.name}"] = functools.partial(call, objective, run)
    dpo = objectives.get("dpo")
    batches = ScoringOptions(schedule="batches", memory_budget=1 << 14)
    given = {
        "outputs": ("entropy", "mean_logits", "accuracy"),
        "token_weights": data.token_weights.detach().float(),
    }
    packed = data.hidden.detach().flatten(0, 1), data.weight, data.target.flatten()
    bounds = torch.arange(0, 8 * 7 + 1, 7, dtype=torch.int64)
    sums = {"cu_seqlens": bounds, "ref_logps": -draw(8).abs()}
    calls["preference_loss packed"] = lambda: fastpref.preference_loss(*packed, "dpo", **sums)
    calls["preference_loss batches"] = functools.partial(call, dpo, run, options=batches, **given)
    index = torch.tensor([[3, 0], [1, 6]])
    calls["preference_loss index"] = functools.partial(call, dpo, run, layout=index, **given)
    return calls


def objective_calls() -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for declared in registry.catalogue():
        objective = ready(declared)
        extras = plain_extras(objective)
        logps = plain_logps(objective, dtype=torch.float32)
        calls[f"objectives.{declared.name}"] = functools.partial(
            with_gradients, objective, *logps, **extras
        )
    pair = plain_logps(objectives.get("dpo"), dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float64):
        low = [one.to(dtype) for one in pair]
        calls[f"objectives.dpo {dtype}"] = functools.partial(with_gradients, objectives.dpo, *low)
    both = objectives.combine(["dpo", "ipo"], [1.0, 0.5])
    lengths = {"chosen_lengths": LENGTHS + 1, "rejected_lengths": LENGTHS + 2}
    calls["objectives.combine"] = lambda: with_gradients(both, *pair, **lengths)
    weights = {"chosen_weights": -pair[0] / 12, "rejected_weights": -pair[1] / 12}
    calls["objectives.wpo"] = lambda: with_gradients(objectives.wpo("dpo"), *pair, **weights)
    calls["objectives.epsilon_dpo_beta"] = lambda: objectives.epsilon_dpo_beta(0.1, *pair[:3], 0.01)
    rewards, groups = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])
    calls["objectives.group_advantages"] = lambda: objectives.group_advantages(rewards, groups)
    calls["objectives.get"] = lambda: repr(objectives.get("dpo", beta=0.2))
    calls["objectives.names"] = objectives.names
    calls["objectives.as_objective"] = lambda: repr(objectives.as_objective("dpo"))

    def moments() -> dict[str, Any]:
        running = objectives.RunningMoments()
        for batch in pair[:2]:
            running.update(batch)
        other = objectives.RunningMoments()
        other.load_state_dict(running.state_dict())
        return other.state_dict() | {"new": objectives.RunningMoments().mean}

    calls["objectives.RunningMoments"] = moments
    return calls


def sequence_calls() -> dict[str, Call]:
    sums = functools.partial(with_gradients, fastpref.sequence_logp)
    packed = LOGP.flatten()
    bounds, ids = torch.tensor([0, 3, 3, 20]), torch.arange(20, dtype=torch.int64) % 4 - 1
    halves = torch.full((4, T), 0.5, dtype=torch.float32)
    made: dict[str, Call] = {
        "sequence_logp": lambda: sums(LOGP, mask=MASK, token_weights=halves, reduction="mean"),
        "sequence_logp packed": lambda: sums(packed, cu_seqlens=bounds, reduction="mean"),
        "sequence_logp ids": lambda: sums(packed, sequence_ids=ids, num_sequences=3),
        "decay_weights": lambda: sequences.decay_weights(MASK, gamma=0.7),
        "divergence_mask": lambda: sequences.divergence_mask(IDS, IDS.flip(1), MASK),
        "length_desensitized_weights": lambda: sequences.length_desensitized_weights(
            MASK, LENGTHS, alpha=0.3
        ),
        "sampled_weights": lambda: sequences.sampled_weights(
            MASK, LENGTHS, generator=torch.Generator("cpu").manual_seed(0)
        ),
        "step_weights": lambda: sequences.step_weights(IDS, LOGP.abs(), MASK),
        "token_credit": lambda: sequences.token_credit(LOGP, LOGP.flip(1), beta=0.1),
        "turn_mask": lambda: sequences.turn_mask(IDS, LENGTHS, MASK),
    }
    return {f"sequences.{name}": call for name, call in made.items()}


def diffusion_calls() -> dict[str, Call]:
    model, ref, target = (draw(4, 3, 5, seed=seed) for seed in (8, 9, 10))
    weight, mask = draw(4, seed=11).abs(), MASK[:, None]
    path = weight + 1, torch.full((4,), 0.5, dtype=torch.float32, device="cpu")
    ratio = functools.partial(with_gradients, diffusion.log_ratio, model, ref)
    kinds = {"source": diffusion.NOISE, "target": diffusion.FLOW}
    made: dict[str, Call] = {
        "log_ratio": lambda: ratio(target, weight=weight),
        "log_ratio mask": lambda: ratio(target, mask=mask),
        "log_ratio strided": lambda: ratio(target.transpose(1, 2).contiguous().transpose(1, 2)),
        "log_ratio of nothing": lambda: diffusion.log_ratio(
            *(one[:0] for one in (model, ref, ref))
        ),
        "step_log_prob": lambda: with_gradients(diffusion.step_log_prob, model, ref, std=weight),
        "step_log_ratio": lambda: diffusion.step_log_ratio(model, ref, target, std=0.5),
        "convert": lambda: with_gradients(diffusion.convert, model, ref, path=path, **kinds),
        "error_weight": lambda: diffusion.error_weight(path, **kinds),
        "velocity": lambda: diffusion.velocity(*path).a,
        "k_prediction": lambda: diffusion.k_prediction(weight).b,
        **_diffusion_losses(model, ref, target),
    }
    return {f"diffusion.{name}": call for name, call in made.items()}


def _diffusion_losses(model: Tensor, ref: Tensor, target: Tensor) -> dict[str, Call]:
    lone = functools.partial(with_gradients, weight=torch.ones_like(WEIGHT[:4, 0]))
    labels, shares = MASK[:, 0], draw(4, seed=12).sigmoid()
    pairs = shares[:2], shares[2:]

    def paired(function: Callable[..., Any], **options: Any) -> Call:
        return lambda: with_gradients(function, model, ref, target, **options)

    extras = {"labels": labels}
    return {
        "preference_loss": lambda: lone(
            lambda *given, **more: diffusion.preference_loss(*given, "dpo", **more)[:5],
            *(model, ref, target),
        ),
        "mapo": lambda: with_gradients(diffusion.mapo, model, target),
        "dspo": paired(diffusion.dspo),
        "diffusion_orpo": lambda: with_gradients(diffusion.diffusion_orpo, model, target),
        "negative_aware": paired(lambda *given: diffusion.negative_aware(*given, shares)),
        "clipped_step_dpo": lambda: with_gradients(diffusion.clipped_step_dpo, *pairs),
        "smoothed_preference_scale": lambda: diffusion.smoothed_preference_scale(
            *pairs, low=0.0, high=1.0
        ),
        "preset": paired(
            lambda *given: diffusion.preset("ddo_edm")(*given, sigma=shares, **extras)[:5]
        ),
        "preset steps": paired(lambda *given: diffusion.preset("d3po")(*given, std=shares)[:5]),
        "presets": lambda: diffusion.presets(),
    }


def module_calls() -> dict[str, Call]:
    pairs = peers.leaves(peers.tensors(torch.float32))
    plain = {name: one for name, one in pairs.items() if not name.startswith("ref_")}
    likely = plain | {"nll_target": plain["target"]}
    distil = {
        name: one.float() if one.is_floating_point() else one
        for name, one in distilled.batch().items()
    }
    rows = torch.arange(peers.B, dtype=torch.int64)
    labelled = pairs | {"preference_labels": rows % 2 == 0, "kl": draw(1).abs()}
    sampled = {name: one for name, one in pairs.items() if name != "target"}
    sampled |= {"selected_token_ids": pairs["target"].clamp(min=0)}
    sampled |= {"attention_mask": (pairs["target"] >= 0).long(), "advantages": draw(peers.B)}
    given = {
        "FusedLinearCPOLoss": plain,
        "FusedLinearCosineSimilarityLoss": distil,
        "FusedLinearDPOLoss": pairs,
        "FusedLinearGRPOLoss": sampled,
        "FusedLinearJSDLoss": distil,
        "FusedLinearKTOLoss": labelled,
        "FusedLinearORPOLoss": likely,
        "FusedLinearSimPOLoss": plain,
    }

    def call(name: str) -> Any:
        return getattr(nn, name)()(**given[name])

    return {f"nn.{name}": functools.partial(call, name) for name in given}


@functools.cache
def every_call() -> dict[str, Call]:
    made = (
        *(scoring_calls, preference_calls, objective_calls, sequence_calls, diffusion_calls),
        module_calls,
    )
    return {name: call for calls in made for name, call in calls().items()}
