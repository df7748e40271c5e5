# SPDX-License-Identifier: Apache-2.0
"""The extras that an objective takes and a batch already says: lengths, masks, mean likelihoods.

Each is made under its name in ``_FILLINGS`` when the objective takes it and the caller gave none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..objectives import Objective
from ..objectives.signature import ExtraFacts
from ..scoring import TokenScores
from ..sequences import sequence_logp
from .comparison import Comparison
from .layouts import Arrangement
from .sequence_parallel import sum_over_ranks


@dataclass
class Batch:
    """Which tokens are scored, and which row each belongs to."""

    target: Tensor  # (B, T), or (N,) with cu_seqlens
    ignore_index: int
    cu_seqlens: Tensor | None  # (B + 1,)
    seq_group: dist.ProcessGroup | None  # over which each row's tokens are spread

    # Not functools.cached_property: torch.compile cannot trace its lock.
    def __post_init__(self) -> None:
        self.scored = self.target != self.ignore_index  # like target
        self._lengths: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, the number of scored tokens of each row."""
        if self._lengths is None:
            self._lengths = self.sums(self.scored.double()).long()
        return self._lengths

    @property
    def rows(self) -> int:
        """B."""
        return self.target.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def sums(self, per_token: Tensor, token_weights: Tensor | None = None) -> Tensor:
        """Per-token values, 0 where not scored -> (B,)."""
        if self.cu_seqlens is None:
            own = sequence_logp(per_token, mask=self.scored, token_weights=token_weights)
        else:
            if token_weights is not None:
                token_weights = torch.where(self.scored, token_weights, 0)
            own = sequence_logp(per_token, cu_seqlens=self.cu_seqlens, token_weights=token_weights)
        return sum_over_ranks(own, self.seq_group)

    def means(self, per_token: Tensor) -> Tensor:
        """Means over each row's scored tokens, 0 for a row without any -> (B,)."""
        return self.sums(per_token) / self.lengths.clamp(min=1)


@dataclass
class Material:
    """What extras can be made of."""

    objective: Objective
    batch: Batch
    arrangement: Arrangement
    token_weights: Tensor | None
    sums: Tensor  # (B,), the policy's, weighted
    policy: TokenScores
    reference: TokenScores | None
    comparison: Comparison | None  # with the hidden states of the reference

    def __post_init__(self) -> None:
        self._kl: Tensor | None = None
        self._margins: tuple[Tensor, ...] | None = None

    @property
    def kl(self) -> Tensor:
        """(B,), sums of KL(reference, policy) over each row's tokens."""
        if self._kl is None:
            self._kl = self.batch.sums(self._compared.kl(), self.token_weights)
        return self._kl

    @property
    def margins(self) -> tuple[Tensor, ...]:
        """Two (P,), gaps of the log-probs under mixed logits."""
        if self._margins is None:
            mixed = self._compared.mixed_logp(self.objective.hyperparameters["epsilon"])
            sums = (self.batch.sums(one, self.token_weights) for one in mixed)
            sides = [self.arrangement.split(one) for one in sums]
            self._margins = tuple(chosen - rejected for chosen, rejected in sides)
        return self._margins

    @property
    def _compared(self) -> Comparison:
        if self.comparison is None:
            filled = [name for name in fillings(self.objective) if name in _COMPARED]
            raise ValueError(
                f"{self.objective.name} compares whole distributions: pass the reference's "
                f"ref_hidden, or extras={{{', '.join(f'{name!r}: ...' for name in filled)}}}"
            )
        return self.comparison

    def side(self, rows: Tensor, name: str) -> Tensor:
        """The chosen or the rejected rows, as the extra's name says; of lists and units all."""
        return self.arrangement.split(rows)[1 if name.startswith("rejected") else 0]


def _lengths(material: Material, name: str) -> Tensor:
    return material.side(material.batch.lengths, name)


def _nll(material: Material, name: str) -> Tensor:
    return material.side(-material.sums / material.batch.lengths.clamp(min=1), name)


def _weights(material: Material, name: str) -> Tensor:
    """Likelihood of a token over that of its distribution's own, geometric mean over the row."""
    scores = material.policy
    relative = _given(scores.logp).detach() - _given(scores.log_sum_sq_probs)
    return material.side(material.batch.means(relative).exp(), name)


def _ref_entropy(material: Material, name: str) -> Tensor:
    """Mean entropy of the reference over both responses, a share of log V."""
    if material.comparison is None or material.reference is None:
        raise ValueError(
            "ref_entropy is filled in from the hidden states of the reference: pass ref_hidden, or "
            "extras={'ref_entropy': ...}"
        )
    sides = material.arrangement.split
    chosen, rejected = sides(material.batch.sums(_given(material.reference.entropy)))
    tokens = sum(sides(material.batch.lengths)).clamp(min=1)  # type: ignore[union-attr]
    share = (chosen + rejected) / tokens / math.log(material.comparison.ref_vocabulary_size)
    edge = torch.finfo(share.dtype).eps
    return share.clamp(edge, 1 - edge)


def _kl(material: Material, name: str) -> Tensor:
    return material.side(material.kl, name)


def _margin(material: Material, name: str) -> Tensor:
    return material.margins[0 if name == "margin_plus" else 1]


def _mask(material: Material, name: str) -> Tensor:
    return material.batch.scored


def _ref_token_logp(material: Material, name: str) -> Tensor | None:
    return None if material.reference is None else material.reference.logp


_FILLINGS: Mapping[str, Callable[[Material, str], Tensor | None]] = {
    "chosen_lengths": _lengths,
    "rejected_lengths": _lengths,
    "lengths": _lengths,
    "chosen_nll": _nll,
    "chosen_weights": _weights,
    "rejected_weights": _weights,
    "ref_entropy": _ref_entropy,
    "chosen_kl": _kl,
    "rejected_kl": _kl,
    "margin_plus": _margin,
    "margin_minus": _margin,
}
_COMPARED = ("chosen_kl", "rejected_kl", "margin_plus", "margin_minus")
_TOKEN_FILLINGS: Mapping[str, Callable[[Material, str], Tensor | None]] = {
    "mask": _mask,
    "ref_token_logp": _ref_token_logp,
}


def fillings(objective: Objective) -> Mapping[str, Callable[[Material, str], Tensor | None]]:
    """What can be filled in for the objective, of its extras."""
    if objective.unit == "token":
        known = _TOKEN_FILLINGS
    else:
        # A function of one's own says by the name alone what it takes.
        filled = [name for name, one in objective.extras.items() if one.filled or not one.shapes]
        known = {name: make for name, make in _FILLINGS.items() if name in filled}
    return {name: make for name, make in known.items() if name in objective.extras}


def differentiable_fillings(objective: Objective, given: Mapping[str, Tensor]) -> set[str]:
    """Extras to be filled in that carry a gradient to more than the log-probs."""
    return {"chosen_kl", "rejected_kl"} & (set(fillings(objective)) - set(given))


def policy_scores(objective: Objective, given: Mapping[str, Tensor]) -> set[str]:
    """The scores of the policy that the objective and its extras are made of."""
    weighs = {"chosen_weights", "rejected_weights"} & (set(fillings(objective)) - set(given))
    return {"logp", "log_sum_sq_probs"} if weighs else {"logp"}


def reference_scores(objective: Objective, given: Mapping[str, Tensor]) -> set[str]:
    """Those of the reference."""
    entropy = "ref_entropy" in fillings(objective) and "ref_entropy" not in given
    return {"logp", "entropy"} if entropy else {"logp"}


def filled_extras(
    objective: Objective, given: Mapping[str, Tensor], material: Material
) -> dict[str, Tensor]:
    """``given``, and what the objective takes beside it and the batch says.

    Raises:
        ValueError: naming a required extra that is neither, and its shape.
    """
    extras = dict(given)
    _check_lengths(extras, material)
    for name, make in fillings(objective).items():
        if name not in extras:
            value = make(material, name)
            if value is not None:
                extras[name] = value
    for name, facts in objective.extras.items():
        if facts.required and name not in extras:
            raise ValueError(
                f"{objective.name} needs extras={{{name!r}: ...}}, {_shape_of(facts, objective)}"
            )
    return extras


def _check_lengths(extras: Mapping[str, Tensor], material: Material) -> None:
    """Lengths are numbers of scored tokens; where there are none any number will do."""
    # Elsewhere than on the CPU reading them would wait for the device.
    readable = material.sums.device.type == "cpu" and not torch.compiler.is_compiling()
    for name in ("chosen_lengths", "rejected_lengths", "lengths"):
        if not readable or name not in fillings(material.objective) or name not in extras:
            continue
        given, own = extras[name], _lengths(material, name)
        if given.shape != own.shape:
            continue  # which the objective refuses
        wrong = (given != own) & (own > 0)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"{name} must be the numbers of scored tokens, as cu_seqlens and target say them: "
                f"got {given[first].item()} for response {first}, which has {int(own[first])}; "
                "leave it out, it is filled in"
            )


def _shape_of(facts: ExtraFacts, objective: Objective) -> str:
    like = {"pair": "(P,)", "unit": "(B,)", "list": "(G, K)", "token": "(B, T)"}[objective.unit]
    shapes = {"logps": f"a {like} tensor", "unit": f"a ({like[1]},) tensor"}
    shapes |= {"rows": f"a ({like[1]}, D) tensor", "number": "a 0-dim tensor"}
    return " or ".join(shapes[shape] for shape in facts.shapes) or "a tensor"


def _given(scores: Tensor | None) -> Tensor:
    if scores is None:
        raise RuntimeError("the score that this extra is made of was not asked for")
    return scores
