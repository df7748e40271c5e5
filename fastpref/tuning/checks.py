# SPDX-License-Identifier: Apache-2.0
"""The correctness of a tier: small cases against float64, by the error contract."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..scoring import ScoringOptions, TokenScores, linear_logprob
from ..scoring.plain_scores import plain_scores
from ..scoring.statistics import OUTPUTS

TOP_SHARE = 3  # every third target is the best id, or is_top1 would always be false
OVERFLOWING = 5  # every fifth row of the case of that name
FAR = 200.0  # nats by which its target falls
SPREAD = 3.0  # standard deviation of the logits
YARDSTICK_ROWS = 64  # the error of fewer rows in eager is an accident
BLOCK_ROWS = 256  # in float64 at a time


@dataclass(frozen=True, kw_only=True)
class Check:
    """One case; the hidden size is that of the user's head."""

    # At 128 by 256 logits a tile, more than twice as many tiles as any card has multiprocessors: a
    # kernel that goes from tile to tile must do so.
    rows: int = 2048  # N
    vocab: int = 5632  # V
    outputs: tuple[str, ...] = ("logp",)
    differentiated: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("hidden", "weight")
    schedule: str = "auto"
    bias: bool = False
    softcap: float | None = None
    overflowing: bool = False


CHECKS = {
    "plain": Check(),
    "statistics": Check(outputs=OUTPUTS, bias=True),
    "statistics, softcap": Check(outputs=OUTPUTS, softcap=10.0),
    "frozen head": Check(differentiated=("logp",), needs=("hidden",), schedule="direct"),
    "kept": Check(differentiated=("logp",), schedule="keep"),
    "recomputed": Check(
        outputs=("logp", "entropy"), differentiated=("logp", "entropy"), schedule="recompute"
    ),
    "ragged vocabulary": Check(vocab=5639, differentiated=("logp",), schedule="keep"),
    "overflowing rows": Check(
        outputs=("logp", "entropy", "lse"), differentiated=("logp",), overflowing=True
    ),
    "1 row": Check(rows=1, outputs=("logp", "entropy", "lse")),
    "129 rows": Check(rows=129, differentiated=("logp",), schedule="recompute"),
}


class Setting(NamedTuple):
    """What is tuned."""

    device: str
    dtype: str
    hidden_size: int  # H
    vocab_size: int  # V


class Error(NamedTuple):
    """Of the quantity whose error is largest beside what is allowed."""

    quantity: str
    error: float
    allowed: float

    @property
    def fine(self) -> bool:
        return self.error <= self.allowed  # false for NaN

    def __str__(self) -> str:
        return f"{self.quantity}: {self.error:.1e}, allowed {self.allowed:.1e}"


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # (max(N, YARDSTICK_ROWS), H)
    weight: Tensor  # (V, H)
    target: Tensor
    bias: Tensor | None
    upstream: dict[str, Tensor]
    margin: Tensor  # the target's logit above the best of the others, float32


@dataclass(frozen=True)
class Expected:
    inputs: Inputs
    exact: dict[str, Tensor]  # in float64
    eager: dict[str, Tensor]  # plain torch in the dtype itself


def check(setting: Setting, name: str, tier: str) -> Error:
    """The error of ``tier`` in the case ``name``. An exception of the tier's is raised."""
    case, expected = CHECKS[name], _expected(setting, name)
    inputs, rows = expected.inputs, slice(CHECKS[name].rows)
    found = _results(case, inputs, rows, tier)
    dtype = inputs.hidden.dtype
    errors = [_top1_error(found.pop("is_top1"), inputs, rows)] if "is_top1" in found else []
    for quantity, value in found.items():
        exact, eager = expected.exact[quantity], expected.eager[quantity]
        own = exact if quantity == "d weight" else exact[rows]
        unit = torch.finfo(dtype if quantity.startswith("d ") else torch.float32).eps
        for kind, size in NORMS.items():
            # Of fewer rows than the yardstick has only the largest error tells.
            if kind == "largest" or own.shape == exact.shape:
                allowed = 2 * size(eager.double() - exact, exact) + 2 * unit * size(exact, exact)
                error = size(value.double() - own, own)
                errors.append(Error(f"{quantity}, {kind}", error, allowed))
    return max(errors, key=_badness)


def _largest(values: Tensor, exact: Tensor) -> float:
    return float(values.abs().max())


def _root_mean_square(values: Tensor, exact: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _row_by_row(values: Tensor, exact: Tensor) -> float:
    """The largest of a matrix's rows, each relative to itself: beside the others a wrong row of a
    rare id does not show."""
    if values.ndim == 1:
        return 0.0
    return float((values.norm(dim=1) / exact.norm(dim=1)).nan_to_num(nan=0.0).max())


NORMS = {"largest": _largest, "rms": _root_mean_square, "row by row": _row_by_row}


def _badness(one: Error) -> tuple[bool, float]:
    return not one.fine, one.error / one.allowed if one.allowed else one.error


def _top1_error(found: Tensor, inputs: Inputs, rows: slice) -> Error:
    """The share of rows with a wrong answer; at a tie within rounding either is right."""
    margin = inputs.margin[rows]
    clear = margin.abs() > 4 * torch.finfo(inputs.hidden.dtype).eps * 4 * SPREAD
    wrong = (found != (margin > 0)) & clear
    return Error("is_top1", float(wrong.double().mean()), 0.0)


@functools.lru_cache(maxsize=1)
def _expected(setting: Setting, name: str) -> Expected:
    """The same for one tier after the other."""
    case, inputs = CHECKS[name], _inputs(setting, CHECKS[name])
    # What gradients at the weight add up must be the rows that the tier sees.
    rows = slice(case.rows if case.differentiated else max(case.rows, YARDSTICK_ROWS))
    return Expected(
        inputs,
        _exact(case, inputs, rows),
        _results(case, inputs, rows, None, inputs.hidden.dtype),
    )


def _inputs(setting: Setting, case: Check) -> Inputs:
    generator = torch.Generator(setting.device).manual_seed(0)
    dtype: torch.dtype = getattr(torch, setting.dtype)
    rows, width = max(case.rows, YARDSTICK_ROWS), setting.hidden_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=setting.device, dtype=torch.float32)

    weight = (normal(case.vocab, width) * (SPREAD * width**-0.5)).to(dtype)
    hidden = normal(rows, width).to(dtype)
    bias = normal(case.vocab) if case.bias else None
    target = torch.randint(
        case.vocab, (rows,), generator=generator, device=setting.device, dtype=torch.int64
    )
    if case.overflowing:
        far = (
            hidden[::OVERFLOWING].float()
            - (FAR / SPREAD**2) * weight[target[::OVERFLOWING]].float()
        )
        hidden[::OVERFLOWING] = far.to(dtype)
    logits = hidden.float() @ weight.float().t()
    if bias is not None:
        logits += bias
    if not case.overflowing:
        target[::TOP_SHARE] = logits[::TOP_SHARE].argmax(-1)
    own = logits.gather(-1, target[:, None])
    others = logits.scatter(-1, target[:, None], -torch.inf).amax(-1)
    upstream = {name: normal(rows) for name in case.differentiated}
    return Inputs(hidden, weight, target, bias, upstream, own[:, 0] - others)


def _exact(case: Check, inputs: Inputs, rows: slice) -> dict[str, Tensor]:
    """In float64, block by block: the logits of all rows would fill a gigabyte."""
    total: dict[str, list[Tensor]] = {}
    for start in range(0, rows.stop, BLOCK_ROWS):
        block = slice(start, min(rows.stop, start + BLOCK_ROWS))
        for name, part in _results(case, inputs, block, None, torch.float64).items():
            if name == "d weight" and name in total:
                total[name][0] += part
            else:
                total.setdefault(name, []).append(part)
    return {name: torch.cat(parts) for name, parts in total.items()}


def _results(
    case: Check, inputs: Inputs, rows: slice, tier: str | None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Outputs by name and gradients as "d <input>", of a tier, or of plain torch in ``dtype``."""
    dtype = dtype or inputs.hidden.dtype
    leaves: dict[str, Any] = {
        "hidden": inputs.hidden[rows].to(dtype, copy=True),
        "weight": inputs.weight.to(dtype, copy=True),
    }
    if case.differentiated:
        for name in case.needs:
            leaves[name].requires_grad_()
    scores = _scores(case, leaves, inputs.target[rows], inputs.bias, tier)
    found = {name: getattr(scores, name) for name in case.outputs}
    if case.differentiated:
        outputs = [found[name] for name in case.differentiated]
        upstream = [
            inputs.upstream[name][rows].to(one.dtype)
            for name, one in zip(case.differentiated, outputs, strict=True)
        ]
        wanted = [leaves[name] for name in case.needs]
        gradients = torch.autograd.grad(outputs, wanted, upstream)
        found |= {f"d {name}": one for name, one in zip(case.needs, gradients, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def _scores(
    case: Check, leaves: dict[str, Any], target: Tensor, bias: Tensor | None, tier: str | None
) -> TokenScores:
    shared: dict[str, Any] = {"bias": bias, "softcap": case.softcap}
    if tier is None:
        return plain_scores(**leaves, target=target, **shared)
    schedule: Any = case.schedule if case.differentiated else "auto"
    options = ScoringOptions(backend=tier, schedule=schedule)  # type: ignore[arg-type]
    return linear_logprob(**leaves, target=target, outputs=case.outputs, options=options, **shared)
