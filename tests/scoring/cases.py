# SPDX-License-Identifier: Apache-2.0
"""Inputs for the scoring tests, runs of linear_logprob and of the reference on them, and the error
contract between the two."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastpref import ScoringOptions, linear_logprob
from fastpref.scoring.backends import unavailable_reason
from fastpref.scoring.plain_scores import plain_scores
from fastpref.scoring.statistics import OUTPUTS
from fastpref.scoring.types import statistics_dtype

IGNORED = -100
INPUTS = ("hidden", "weight", "bias")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = [name for name in ("torch", "cpp") if unavailable_reason(name, "cpu") is None]


@dataclass(frozen=True)
class Case:
    """Arguments of one call."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    map: dict[str, Any] = field(default_factory=dict)  # temperature, logit_scale, softcap

    @property
    def scored(self) -> Tensor:
        return self.target != IGNORED

    @property
    def temperature(self) -> Any:
        """What logits are divided by: a number, or one for each row, in the statistics' dtype."""
        value = self.map.get("temperature", 1.0)
        if not isinstance(value, Tensor):
            return value
        return torch.where(self.scored, value, 1)[..., None].to(statistics_dtype(self.hidden.dtype))

    def on(self, device: str) -> Case:
        bias = None if self.bias is None else self.bias.to(device)
        tensors = (one.to(device) for one in (self.hidden, self.weight, self.target))
        map = {name: _on(value, device) for name, value in self.map.items()}
        return Case(*tensors, bias, map)

    def to(self, dtype: torch.dtype) -> Case:
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)


def _on(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@functools.cache
def make_case(
    rows: int = 140,
    hidden: int = 7,
    vocab: int = 2051,
    *,
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    ignored: float = 0.0,
    spread: float = 3.0,
    below: float = 0.0,
    uneven: bool = False,
    seed: int = 0,
    **map: Any,
) -> Case:
    """Logits of standard deviation ``spread``, a share ``ignored`` of the rows not scored, a share
    ``below`` of the targets 100 to 1000 nats below all else (and many of them the same); with
    ``uneven`` each row has a temperature of its own, which is 0 where it is not scored."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = torch.randint(0, vocab, (rows,), generator=generator)
    if ignored:
        target[torch.rand(rows, generator=generator) < ignored] = IGNORED
    case = Case(
        hidden=normal(rows, hidden),
        weight=normal(vocab, hidden) * (spread / hidden**0.5),
        target=target,
        bias=normal(vocab) if bias else None,
        map=map,
    )
    if below:
        rare = min(40, vocab // 2)
        case.weight[:rare, 0] = -torch.linspace(100, 1000, rare)
        case.hidden[:, 0] = 1
        far = torch.rand(rows, generator=generator) < below
        common = rare + case.target % (vocab - rare)
        low = torch.where(far, case.target % rare, common)
        case.target.copy_(torch.where(case.scored, low, IGNORED))
    if uneven:
        temperature = 0.5 + 1.5 * torch.rand(rows, generator=generator, dtype=torch.float64)
        case.map["temperature"] = torch.where(case.scored, temperature, 0)
    return case.to(dtype)


def upstream_of(case: Case, names: tuple[str, ...], seed: int = 1) -> dict[str, Tensor]:
    """A gradient of both signs at every position, some of them exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    gradients = {}
    for name in names:
        gradient = torch.randn(case.target.shape, generator=generator, dtype=torch.float64)
        gradient[torch.rand(case.target.shape, generator=generator) < 0.1] = 0
        gradients[name] = gradient
    return gradients


def run(
    case: Case,
    *,
    options: ScoringOptions | None = None,
    outputs: tuple[str, ...] = ("logp",),
    upstream: dict[str, Tensor] | None = None,
    needs: tuple[str, ...] = INPUTS,
    reference: bool = False,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Outputs by name, and ``d <input>`` for each of ``needs`` when there is an upstream gradient.

    linear_logprob, unlike the reference, gets NaN in the hidden rows that are not scored.
    """
    hidden = case.hidden
    if not reference:
        hidden = torch.where(case.scored[..., None], hidden, torch.nan)
    inputs = {"hidden": hidden, "weight": case.weight, "bias": case.bias}
    leaves = {
        name: tensor.detach().clone().requires_grad_(upstream is not None and name in needs)
        for name, tensor in inputs.items()
        if tensor is not None
    }
    if reference:
        given = leaves["hidden"], leaves["weight"], case.target
        map = case.map | {"temperature": case.temperature}
        scores = plain_scores(*given, bias=leaves.get("bias"), **map)
    else:
        scores = linear_logprob(
            leaves["hidden"],
            leaves["weight"],
            case.target,
            bias=leaves.get("bias"),
            outputs=outputs,
            options=options,
            **case.map,
            **kwargs,
        )
    results = {name: getattr(scores, name) for name in outputs}
    if upstream:
        tensors = [results[name] for name in upstream]
        torch.autograd.backward(
            tensors, [g.to(t) for g, t in zip(upstream.values(), tensors, strict=True)]
        )
        results |= {
            f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None
        }
    return {name: value.detach() for name, value in results.items()}


@functools.cache
def _cached_reference(
    dtype: torch.dtype,
    outputs: tuple[str, ...],
    differentiated: tuple[str, ...],
    arguments: tuple[tuple[str, Any], ...],
) -> dict[str, Tensor]:
    case = make_case(**dict(arguments))
    upstream = upstream_of(case, differentiated) if differentiated else None
    return run(case.to(dtype), outputs=outputs, upstream=upstream, reference=True)


def ulp(value: float, dtype: torch.dtype) -> float:
    """Spacing of ``dtype`` at ``value``."""
    exponent = torch.tensor(abs(value), dtype=torch.float64).frexp().exponent.item()
    info = torch.finfo(dtype)
    return max(info.eps * 2.0 ** (exponent - 1), info.smallest_normal * info.eps)


def check_contract(
    actual: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """``max|x - x64| <= 2 max|eager - x64| + 2 ulp``, and the same of the root mean square."""
    problems = []
    for name, value in actual.items():
        reference, plain = exact[name], eager[name]
        if value.dtype == torch.bool:
            continue
        if not (torch.isfinite(reference).all() and torch.isfinite(plain).all()):
            raise AssertionError(f"{name}: the reference itself is not finite")
        error = (value.double() - reference).abs()
        allowed = (plain.double() - reference).abs()
        for kind, norm in (
            ("max", lambda x: x.max().item() if x.numel() else 0.0),
            ("rms", lambda x: x.square().mean().sqrt().item() if x.numel() else 0.0),
        ):
            # At float64 eager is the reference itself: its own rounding is the yardstick there.
            units = 2 if value.dtype != torch.float64 or plain.dtype != torch.float64 else 256
            bound = 2 * norm(allowed) + units * ulp(norm(reference.abs()), value.dtype)
            if not norm(error) <= bound:
                problems.append(
                    f"{name} ({value.dtype}): {kind} error {norm(error):.3g} > {bound:.3g}, "
                    f"eager {norm(allowed):.3g}, size {norm(reference.abs()):.3g}"
                )
    assert not problems, "\n".join(problems)


def check_top1(case: Case, actual: Tensor, tolerance: float) -> None:
    """At a tie within ``tolerance`` either answer is right."""
    logits = _logits(case.to(torch.float64))
    own = logits.gather(-1, case.target.clamp(min=0)[..., None])
    others = logits.scatter(-1, case.target.clamp(min=0)[..., None], -torch.inf).amax(-1)
    margin = own[..., 0] - others
    assert torch.equal(actual & (margin.abs() > tolerance), (margin > tolerance) & case.scored)


def _logits(case: Case) -> Tensor:
    logits = case.hidden @ case.weight.t()
    if case.bias is not None:
        logits = logits + case.bias
    logits = logits * case.map.get("logit_scale", 1.0)
    if (cap := case.map.get("softcap")) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits / case.temperature


def verify(
    options: ScoringOptions,
    dtype: torch.dtype,
    *,
    outputs: tuple[str, ...] = ("logp",),
    differentiated: tuple[str, ...] = ("logp",),
    needs: tuple[str, ...] = INPUTS,
    **arguments: Any,
) -> None:
    """linear_logprob within the error contract for the case of ``arguments``."""
    case = make_case(dtype=dtype, **arguments)
    eager, exact = references(dtype, outputs, differentiated, **arguments)
    upstream = upstream_of(case, differentiated) if differentiated else None
    actual = run(case, options=options, outputs=outputs, upstream=upstream, needs=needs)
    expected = {f"d {name}" for name in needs if differentiated}
    if case.bias is None:
        expected -= {"d bias"}
    assert {name for name in actual if name.startswith("d ")} == expected
    check_scores(case, actual, eager, exact)


def check_scores(
    case: Case, actual: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """Dtypes, zeros where nothing is scored, and the error contract."""
    dtype = case.hidden.dtype
    for name, value in actual.items():
        if name == "d hidden" or name in OUTPUTS:
            assert (value[~case.scored] == 0).all(), f"{name} at positions that are not scored"
        if name.startswith("d "):
            assert value.dtype == dtype
        elif name != "is_top1":
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if "is_top1" in actual:
        assert actual["is_top1"].dtype == torch.bool
        check_top1(case, actual["is_top1"], 64 * torch.finfo(dtype).eps)
    check_contract(actual, eager, exact)


def references(
    dtype: torch.dtype,
    outputs: tuple[str, ...],
    differentiated: tuple[str, ...],
    **arguments: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Eager at ``dtype`` and the float64 reference for the same inputs."""
    items = (*sorted(arguments.items()), ("dtype", dtype))
    return (
        _cached_reference(dtype, outputs, differentiated, items),
        _cached_reference(torch.float64, outputs, differentiated, items),
    )
