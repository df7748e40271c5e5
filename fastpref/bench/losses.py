# SPDX-License-Identifier: Apache-2.0
"""The losses that are compared, with a live reference where they have one: fastpref in one call,
the objective on others' per-token log-probabilities, and Liger's chunked losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import objectives, preference_loss
from .implementations import Implementation, Loss, missing, plain_logp, trl_logp
from .work import IGNORE, Work


class Kind(NamedTuple):
    """An objective and what the work gives it."""

    objective: str
    liger: Loss
    hyperparameters: dict[str, float]
    reference: bool = False
    extras: Callable[[Work], dict[str, Tensor]] = lambda work: {}


def _labels(work: Work) -> dict[str, Tensor]:
    rows = torch.arange(work.target.shape[0], device=work.target.device)
    return {"labels": rows < len(rows) // 2, "kl": work.hidden.new_zeros((), dtype=torch.float32)}


def _advantages(work: Work) -> dict[str, Tensor]:
    return {"advantages": torch.linspace(-1, 1, work.target.shape[0], device=work.target.device)}


def _liger_loss(name: str, work: Work, *tensors: Tensor, **arguments: Any) -> Tensor:
    chunked = __import__("liger_kernel.chunked_loss", fromlist=[name])
    settings = arguments.pop("settings")
    loss: Tensor = getattr(chunked, name)(**settings)(*tensors, **arguments)[0]
    return loss


def _liger_dpo(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    return _liger_loss(
        "LigerFusedLinearDPOLoss",
        work,
        weight,
        hidden,
        work.target,
        ref_input=work.ref_hidden,
        ref_weight=work.ref_weight,
        settings={"ignore_index": IGNORE, "beta": 0.1},
    )


def _liger_kto(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    given = _labels(work)
    return _liger_loss(
        "LigerFusedLinearKTOLoss",
        work,
        hidden,
        weight,
        work.target,
        preference_labels=given["labels"],
        ref_input=work.ref_hidden,
        ref_weight=work.ref_weight,
        kl=given["kl"],
        settings={"ignore_index": IGNORE, "beta": 0.1, "use_ref_model": True},
    )


def _liger_simpo(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    settings = {"ignore_index": IGNORE, "beta": 2.5, "gamma": 1.0, "compute_nll_loss": False}
    return _liger_loss(
        "LigerFusedLinearSimPOLoss", work, weight, hidden, work.target, settings=settings
    )


def _liger_orpo(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    settings = {"ignore_index": IGNORE, "beta": 0.1}
    return _liger_loss(
        "LigerFusedLinearORPOLoss", work, weight, hidden, work.target, settings=settings
    )


def _liger_grpo(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    return _liger_loss(
        "LigerFusedLinearGRPOLoss",
        work,
        hidden,
        weight,
        work.target.clamp(min=0),
        work.scored.long(),
        _advantages(work)["advantages"],
        settings={"beta": 0.0, "loss_type": "grpo", "use_ref_model": False},
    )


KINDS = {
    "dpo": Kind("dpo", _liger_dpo, {"beta": 0.1}, reference=True),
    "kto": Kind("kto", _liger_kto, {"beta": 0.1}, reference=True, extras=_labels),
    "simpo": Kind("simpo", _liger_simpo, {"beta": 2.5, "gamma": 1.0}),
    "orpo": Kind("orpo", _liger_orpo, {"beta": 0.1}),
    "grpo": Kind("grpo", _liger_grpo, {"beta": 0.0}, extras=_advantages),
}


def loss_implementations(kind: Kind) -> list[Implementation]:
    return [
        Implementation("fastpref", _fused(kind)),
        Implementation("plain torch", _composed(kind, plain_logp)),
        Implementation("TRL fused head", _composed(kind, trl_logp), missing("trl")),
        Implementation("Liger", kind.liger, missing("liger_kernel")),
    ]


def _fused(kind: Kind) -> Loss:
    def loss(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        given: dict[str, Any] = {"extras": kind.extras(work), **kind.hyperparameters}
        if kind.reference:
            given |= {"ref_hidden": work.ref_hidden, "ref_weight": work.ref_weight}
        return preference_loss(hidden, weight, work.target, kind.objective, **given).loss

    return loss


def _composed(kind: Kind, scored: Loss) -> Loss:
    """The objective on the per-token log-probabilities of ``scored``."""

    def loss(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        objective = objectives.get(kind.objective, **kind.hyperparameters)
        extras = kind.extras(work)
        logp = scored(work, hidden, weight)
        if objective.unit == "token":
            return objective(logp, mask=work.scored, **extras).losses.mean()
        models = [logp.sum(-1)]
        if kind.reference:
            with torch.no_grad():
                models.append(scored(work, work.ref_hidden, work.ref_weight).sum(-1))
        rows = [part for one in models for part in (one.chunk(2) if _pairs(kind) else (one,))]
        lengths = work.scored.sum(-1).chunk(2)
        names = ("chosen_lengths", "rejected_lengths")
        extras |= {n: one for n, one in zip(names, lengths, strict=True) if n in objective.extras}
        return objective(*rows, **extras).losses.mean()

    return loss


def _pairs(kind: Kind) -> bool:
    return objectives.get(kind.objective).unit == "pair"
