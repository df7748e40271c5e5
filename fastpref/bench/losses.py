# SPDX-License-Identifier: Apache-2.0
"""Losses of token log-probabilities: fastpref, the objective on the log-probabilities of its peers,
and Liger's chunked losses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ScoringOptions, objectives, preference_loss
from ..scoring.types import Schedule
from . import exact, scorers
from .experiment import Case, Experiment, Implementation, Loss, Outcome, bare_products, missing
from .scorers import Logp
from .work import IGNORE, Work

OVERFLOWING = "fastpref, 1% overflowing"


Extras = dict[str, Tensor]


class Kind(NamedTuple):
    """An objective and what the work gives it."""

    objective: str
    liger: Callable[[Extras], Loss] | None  # None: it has none
    hyperparameters: dict[str, float]
    reference: bool = False
    extras: Callable[[Work], Extras] = lambda work: {}

    @property
    def pairs(self) -> bool:
        return objectives.get(self.objective).unit == "pair"


def loss_of_scores(
    kind: Kind, extras: Extras, work: Work, logp: Tensor, ref_logp: Tensor | None
) -> Tensor:
    """The objective on log-probabilities (B, T), 0 where not scored."""
    objective = objectives.get(kind.objective, **kind.hyperparameters)
    extras = dict(extras)
    if objective.unit == "token":
        old = extras.pop("old_token_logp")
        return objective(logp, old, mask=work.scored, **extras).losses.mean()
    models = [one.sum(-1) for one in (logp, ref_logp) if one is not None]
    rows = [part for one in models for part in (one.chunk(2) if kind.pairs else (one,))]
    lengths = work.scored.sum(-1).chunk(2)
    names = ("chosen_lengths", "rejected_lengths")
    extras |= {n: one for n, one in zip(names, lengths, strict=True) if n in objective.extras}
    return objective(*rows, **extras).losses.mean()


def uniform_reference(work: Work, logp: Tensor) -> Tensor:
    """DPO whose reference is given, and the same for each response: Liger takes no other."""
    given = KINDS["dpo"]._replace(hyperparameters={"beta": _given_beta(work)})
    return loss_of_scores(given, {}, work, logp, torch.zeros_like(logp))


def _given_beta(work: Work) -> float:
    """Of sums that differ from a uniform reference's by nats a token: a usual beta would saturate,
    and rows without a gradient cost fastpref no backward."""
    return 1 / work.shape.completion


def _liger_score(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    make = _liger_pairs("LigerFusedLinearDPOLoss", beta=_given_beta(work), use_ref_model=False)
    return make({})(work, hidden, weight)


def score_implementations(case: Case) -> list[Implementation]:
    ways = [
        scorers.Scorer(one.name, scorers.fastpref(one.options), one.unavailable)
        for one in scorers.own(case, ("recompute",))
    ]
    return [
        *(
            Implementation(one.name, _scored(one.logp), one.unavailable, one.compiles)
            for one in (*ways, *scorers.peers(case.device))
        ),
        Implementation("Liger", _liger_score, missing("liger_kernel"), compiles=True),
    ]


def score_experiment(case: Case) -> Experiment:
    """Scores with a loss on them that asks a different gradient of every pair."""
    own, *others = score_implementations(case)
    overflowing = own._replace(name=OVERFLOWING)
    work, harder = case.work(), case.work(overflowing=0.01)
    answer = _answer(case, work)
    usual = [one.candidate(work, case.mode, answer) for one in (own, *others)]
    usual.insert(1, overflowing.candidate(harder, case.mode, _answer(case, harder)))
    return Experiment(bare_products(work, case.mode), usual, work.entropy)


def _answer(case: Case, work: Work) -> Callable[[], Outcome]:
    """Computed once, when first asked for."""
    return functools.cache(
        lambda: exact.of_scores(
            work, case.mode, lambda logp, _: uniform_reference(work, logp), reference=False
        )
    )


def _scored(logp: Logp) -> Loss:
    return lambda work, hidden, weight: uniform_reference(work, logp(work, hidden, weight))


def loss_experiment(kind: Kind, case: Case) -> Experiment:
    """One call from hidden states to loss, with a live reference where there is one."""
    work = case.work()
    extras = kind.extras(work)
    loss = functools.partial(loss_of_scores, kind, extras, work)
    answer = functools.cache(lambda: exact.of_scores(work, case.mode, loss, kind.reference))
    schedules: tuple[Schedule, ...] = ("recompute",)
    if objectives.get(kind.objective).scope in ("unit", "pair", "list"):
        schedules += ("batches",)
    found = [
        Implementation(one.name, _one_call(kind, extras, one.options), one.unavailable)
        for one in scorers.own(case, schedules)
    ]
    found += [
        Implementation(way.name, _composed(kind, extras, way.logp), way.unavailable, way.compiles)
        for way in scorers.peers(case.device)
    ]
    if kind.liger is not None:
        liger = kind.liger(extras)
        found.append(Implementation("Liger", liger, missing("liger_kernel"), compiles=True))
    limit = bare_products(work, case.mode, models=1 + kind.reference)
    candidates = [one.candidate(work, case.mode, answer) for one in found]
    return Experiment(limit, candidates, work.entropy)


def _one_call(kind: Kind, extras: Extras, options: ScoringOptions) -> Loss:
    def loss(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        given: dict[str, Any] = {"extras": extras, **kind.hyperparameters}
        if kind.reference:
            given |= {"ref_hidden": work.ref_hidden, "ref_weight": work.ref_weight}
        return preference_loss(
            hidden, weight, work.target, kind.objective, options=options, **given
        ).loss

    return loss


def _composed(kind: Kind, extras: Extras, scored: Logp) -> Loss:
    """The objective on the log-probabilities of ``scored``."""

    def loss(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        logp, ref_logp = scored(work, hidden, weight), None
        if kind.reference:
            with torch.no_grad():
                ref_logp = scored(work, work.ref_hidden, work.ref_weight)
        return loss_of_scores(kind, extras, work, logp, ref_logp)

    return loss


def _labels(work: Work) -> Extras:
    rows = torch.arange(work.target.shape[0], device=work.target.device, dtype=torch.int64)
    # As many of each kind would cancel.
    return {"labels": rows < 3 * len(rows) // 4}


def _labels_and_kl(work: Work) -> Extras:
    return _labels(work) | {"kl": work.hidden.new_zeros((), dtype=torch.float32)}


def _sampled(work: Work) -> Extras:
    """Advantages, and log-probabilities of a sampler so near the policy that little is clipped."""
    rows, device = work.target.shape[0], work.target.device
    noise = torch.randn(
        work.target.shape,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float32,
        device="cpu",
    ).to(device)
    with torch.no_grad():
        policy = exact.scores(work, work.hidden.double(), work.weight.double())
    old = torch.where(work.scored, policy.float() + 0.05 * noise, 0.0)
    return {
        "advantages": torch.linspace(-1, 2, rows, device=device, dtype=torch.float32),
        "old_token_logp": old,
    }


def _liger(name: str, settings: dict[str, Any], *tensors: Tensor, **given: Any) -> Tensor:
    import liger_kernel.chunked_loss as chunked

    # It marks dimensions of its arguments as dynamic, which other compiled functions then see.
    own = [one.view_as(one) for one in tensors]
    own_given = {name: one.view_as(one) for name, one in given.items()}
    loss: Tensor = getattr(chunked, name)(**settings)(*own, **own_given)[0]
    return loss


def _liger_pairs(name: str, reference: bool = False, **settings: Any) -> Callable[[Extras], Loss]:
    settings = {"ignore_index": IGNORE, **settings}

    def loss(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        models = {"ref_input": work.ref_hidden, "ref_weight": work.ref_weight}
        return _liger(name, settings, weight, hidden, work.target, **(models if reference else {}))

    return lambda extras: loss


def _liger_kto(extras: Extras) -> Loss:
    settings = {"ignore_index": IGNORE, "beta": 0.1, "use_ref_model": True}

    def loss(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        return _liger(
            "LigerFusedLinearKTOLoss",
            settings,
            hidden,
            weight,
            work.target,
            preference_labels=extras["labels"],
            ref_input=work.ref_hidden,
            ref_weight=work.ref_weight,
            kl=extras["kl"],
        )

    return loss


def _liger_grpo(extras: Extras) -> Loss:
    settings = {"beta": 0.0, "loss_type": "grpo", "use_ref_model": False}

    def loss(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        return _liger(
            "LigerFusedLinearGRPOLoss",
            settings,
            hidden,
            weight,
            work.target.clamp(min=0),
            work.scored.long(),
            extras["advantages"],
            old_per_token_logps=extras["old_token_logp"],
        )

    return loss


KINDS = {
    "dpo": Kind(
        "dpo",
        _liger_pairs("LigerFusedLinearDPOLoss", True, beta=0.1),
        {"beta": 0.1},
        reference=True,
    ),
    "kto": Kind("kto", _liger_kto, {"beta": 0.1}, reference=True, extras=_labels_and_kl),
    "ddo": Kind("ddo", None, {"beta": 0.02}, reference=True, extras=_labels),
    "simpo": Kind(
        "simpo",
        _liger_pairs("LigerFusedLinearSimPOLoss", beta=2.5, gamma=1.0, compute_nll_loss=False),
        {"beta": 2.5, "gamma": 1.0},
    ),
    # Of the odds ratio alone: Liger means the other term over the batch's tokens.
    "orpo": Kind(
        "orpo",
        _liger_pairs("LigerFusedLinearORPOLoss", beta=1.0, compute_nll_loss=False),
        {"beta": 1.0, "sft_weight": 0.0},
    ),
    "grpo": Kind("grpo", _liger_grpo, {"beta": 0.0}, extras=_sampled),
}
